"""The endpoints in process: answers, refusals, states, metrics. Real processes: tests/e2e."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from serve.engine.readiness import State
from serve.engine.runtime import Runtime
from serve.engine.waiting.estimates import EVIDENCE_RUNS
from serve.http.request_body import MAX_BODY_BYTES
from tests.support.app_client import PROMPT, fetch, post, valid


def test_a_request_is_answered(app: FastAPI) -> None:
    response = post(app, valid())
    assert response.status_code == 200
    body = response.json()
    assert body["trace_id"] == response.headers["x-trace-id"]
    assert body["timings"]["receive_ms"] is not None
    assert body["prompt"] == PROMPT
    assert body["prompt_tokens"] > 2
    assert set(body) == {
        "image",
        "images",
        "seed",
        "prompt",
        "timings",
        "trace_id",
        "prompt_truncated",
        "prompt_tokens",
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"null", "body"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b"\xff\xfe\x00", "body"),
        (b'{"prompt": "\xff"}', "body"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b"[" * 10_000, "body"),
        ({}, "prompt"),
        (valid(prompt=""), "prompt"),
        (valid(prompt=" "), "prompt"),
        (valid(prompt=[PROMPT]), "prompt"),
        (valid(prompt=PROMPT * 200), "prompt"),
        (valid(num_inference_steps=0), "num_inference_steps"),
        (valid(num_inference_steps=10**40), "num_inference_steps"),
        (valid(guidance_scale=float("nan")), "guidance_scale"),
        (valid(guidance_scale=float("inf")), "guidance_scale"),
        (valid(guidance_scale=-1), "guidance_scale"),
        (valid(width=256), "width"),
        (valid(height=-8), "height"),
        (valid(width=10**20), "width"),
        (valid(seed=2**63), "seed"),
        (valid(format="gif"), "format"),
        (valid(typo=PROMPT), "typo"),
    ],
)
def test_bad_input_is_named_and_never_echoed(
    app: FastAPI, caplog: pytest.LogCaptureFixture, body: Any, field: str
) -> None:
    caplog.set_level("DEBUG")
    response = post(app, body)
    assert response.status_code == 422, response.text
    answer = response.json()
    assert answer["error_type"] == "invalid_request"
    assert len(answer["trace_id"]) == 32
    assert answer["detail"][0]["loc"][-1] == field
    assert "input" not in answer["detail"][0]
    assert len(response.content) < 1000
    assert "zebra" not in response.text + caplog.text


def test_the_longest_valid_body_fits(app: FastAPI) -> None:
    emoji = json.dumps("\N{LARGE RED CIRCLE}" * 2000)
    body = f'{{"prompt": {emoji}, "negative_prompt": {emoji}, "num_inference_steps": 1}}'
    assert len(body) < MAX_BODY_BYTES
    assert post(app, body.encode()).status_code == 200


def test_health_and_readiness(app: FastAPI, runtime: Runtime) -> None:
    assert fetch(app, "GET", "/health").json() == {"status": "ok"}
    ready = fetch(app, "GET", "/ready")
    assert ready.status_code == 200
    body = ready.json()
    assert body["state"] == "ready"
    assert body["shapes"] == ["128x128", "160x96"]
    assert {"load_model", "verify", "compile 128x128"} <= set(body["warmup_ms"])


def test_not_ready_and_unhealthy(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.readiness, "state", State.STARTING)
    assert fetch(app, "GET", "/ready").status_code == 503
    assert fetch(app, "GET", "/health").status_code == 200
    answer = post(app, valid())
    assert answer.status_code == 503
    assert answer.json()["error_type"] == "not_ready"
    assert answer.headers["retry-after"] == "5"
    monkeypatch.setattr(runtime.readiness, "state", State.FAILED)
    assert fetch(app, "GET", "/health").status_code == 503


def test_errors_carry_their_headers(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(runtime.loaded.model, "denoise", full)
    answer = post(app, valid())
    assert answer.status_code == 500
    assert answer.json()["error_type"] == "out_of_memory"
    assert answer.headers["x-fal-needs-retry"] == "0"


def test_an_unexpected_exception_is_a_500_that_names_its_type(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError(PROMPT)

    monkeypatch.setattr(runtime, "_plan", broken)
    answer = post(app, valid())
    assert answer.status_code == 500
    assert answer.json()["error_type"] == "generation_failed"
    assert "LookupError" in answer.json()["detail"]
    assert "zebra" not in answer.text


def test_a_deadline_is_a_504(app: FastAPI) -> None:
    answer = post(app, valid(num_inference_steps=100, deadline_seconds=0.05))
    assert answer.status_code == 504
    assert answer.json()["error_type"] == "deadline_exceeded"
    assert answer.headers["x-fal-needs-retry"] == "0"


def test_a_deadline_that_cannot_be_met_is_a_504_at_once(app: FastAPI, runtime: Runtime) -> None:
    for seed in range(EVIDENCE_RUNS):
        post(app, valid(seed=seed))
    rejected = {"reason": "deadline_exceeded"}
    count = runtime.metrics.registry.get_sample_value
    before = count("sdxl_rejections_total", rejected) or 0
    answer = post(app, valid(num_inference_steps=100, deadline_seconds=0.05))
    assert answer.status_code == 504
    assert answer.json()["error_type"] == "deadline_exceeded"
    assert answer.json()["eta_ms"] > 50
    runtime.recorder._executor.submit(lambda: None).result(10)
    assert count("sdxl_rejections_total", rejected) == before + 1


def test_several_images(app: FastAPI) -> None:
    answer = post(app, valid(num_images=3, seed=5))
    assert answer.status_code == 200
    body = answer.json()
    assert [image["seed"] for image in body["images"]] == [5, 6, 7]
    assert body["image"] == body["images"][0]
    assert body["seed"] == 5
    assert len({image["url"] for image in body["images"]}) == 3
    for image in body["images"]:
        data = base64.b64decode(image["url"].removeprefix("data:image/jpeg;base64,"))
        assert data[:3] == b"\xff\xd8\xff"


def test_urls_that_are_not_inline_reach_the_body(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = 'https://cdn.test/"a"'
    urls = iter([odd, "data:image/jpeg;base64,AAAA"])
    monkeypatch.setattr(runtime, "_upload", lambda *_: next(urls))
    body = post(app, valid(num_images=2)).json()
    assert {image["url"] for image in body["images"]} == {odd, "data:image/jpeg;base64,AAAA"}


def test_a_full_queue_is_a_429(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.queue, "_max_waiting", -1)
    answer = post(app, valid())
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["eta_ms"] > 0
    streamed = post(app, valid(), "/stream")
    assert streamed.status_code == 429  # a refusal is a status, not an event


def test_metrics_in_both_formats(app: FastAPI) -> None:
    post(app, valid())
    plain = fetch(app, "GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert "sdxl_request_duration_seconds_bucket" in plain.text
    modern = fetch(
        app, "GET", "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name for family in text_string_to_metric_families(modern.text)}
    assert {"sdxl_stage_duration_seconds", "sdxl_denoise_step_duration_seconds"} <= families
