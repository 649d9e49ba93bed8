"""The playground's routes in process. The page in a browser: tests/e2e/test_playground.py."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from kernels_warmup.shapes import CompiledShape
from metrics.gpu_metrics import GpuMetrics, MemoryUse
from metrics.records import GenerationFacts, RequestTiming, RunTiming, StageTiming, StepTiming
from metrics.sampling import TraceIdentity
from metrics.spans import placed_spans, request_tree
from metrics.tracing import drawn_identity
from serve.engine.readiness import Readiness, State
from serve.engine.runtime import Runtime
from serve.http.playground.page_files import page_files
from serve.http.playground.recent import MOST_REQUESTS, WINDOW_SECONDS, RecentRequests
from serve.http.playground.stats import shown_trace_url, warmup_progress
from serve.server import create_app

PROMPT = "a zebra that no timeline may mention"
MAX_SEED = 2**63 - 1


@pytest.fixture(scope="module")
def app(runtime: Runtime) -> Iterator[FastAPI]:
    listeners = list(runtime.recorder._listeners)
    yield create_app(runtime)
    runtime.recorder._listeners[:] = listeners


def ask(
    app: FastAPI, method: str, path: str, client: str = "127.0.0.1", **options: Any
) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.request(method, path, **options)

    return asyncio.run(once())


def draw(app: FastAPI, runtime: Runtime, **fields: Any) -> dict[str, Any]:
    """A finished request that the recorder has passed on."""
    body = {"prompt": PROMPT, "num_inference_steps": 2, "seed": MAX_SEED, **fields}
    answer = ask(app, "POST", "/", json=body)
    assert answer.status_code == 200, answer.text
    runtime.recorder._executor.submit(lambda: None).result(30)
    found: dict[str, Any] = answer.json()
    return found


def test_the_page_and_its_files_are_served_with_strict_headers(app: FastAPI) -> None:
    page = ask(app, "GET", "/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    used = re.findall(r'(?:src|href)="(/playground/[^"]+)"', page.text)
    assert len(used) >= 3
    imported = {
        f"/playground/{name}"
        for file in page_files().values()
        for name in re.findall(rb'from "\./([\w.-]+)"', file.body)
        for name in [name.decode()]
    }
    for path in ("/", *used, *imported):
        answer = ask(app, "GET", path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
    served = {path.rpartition("/")[2] for path in (*used, *imported)} | {"index.html"}
    assert served == set(page_files())


def test_the_page_has_nothing_inline_and_nothing_from_outside() -> None:
    files = page_files()
    html = files["index.html"].body.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", html)
    for file in files.values():
        text = file.body.decode()
        outside = set(re.findall(r"https?://[^\s\"'`)>]+", text))
        assert outside <= {"http://www.w3.org/2000/svg"}, file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_the_files_are_small() -> None:
    assert sum(len(file.body) for file in page_files().values()) < 120_000


def test_head_has_the_same_headers_and_no_body(app: FastAPI) -> None:
    head, page = ask(app, "HEAD", "/"), ask(app, "GET", "/")
    assert (head.status_code, head.headers["etag"]) == (200, page.headers["etag"])


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*"])
def test_a_client_with_this_version_gets_no_body(app: FastAPI, form: str) -> None:
    tag = ask(app, "GET", "/").headers["etag"]
    answer = ask(app, "GET", "/", headers={"if-none-match": form.format(tag)})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == tag
    assert "content-security-policy" in answer.headers
    assert ask(app, "GET", "/", headers={"if-none-match": '"another"'}).status_code == 200


def test_post_is_still_the_api(app: FastAPI, runtime: Runtime) -> None:
    assert draw(app, runtime)["seed"] == MAX_SEED
    assert ask(app, "PUT", "/").headers["allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize(
    ("playground", "debug", "statuses"),
    [
        (True, True, [200, 200, 200, 200]),
        (True, False, [200, 200, 200, 404]),
        (False, True, [405, 404, 404, 200]),
        (False, False, [405, 404, 404, 404]),
    ],
)
def test_both_parts_can_be_switched_off(
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    playground: bool,
    debug: bool,
    statuses: list[int],
) -> None:
    changes = {"playground": playground, "debug": debug}
    monkeypatch.setattr(runtime, "settings", runtime.settings.model_copy(update=changes))
    monkeypatch.setattr(runtime.recorder, "_listeners", [])
    app = create_app(runtime)
    paths = ("/", "/playground/style.css", "/stats", "/debug/requests")
    assert [ask(app, "GET", path).status_code for path in paths] == statuses
    assert len(runtime.recorder._listeners) == (playground or debug)


def test_stats_tell_of_the_server_and_of_the_runs(app: FastAPI, runtime: Runtime) -> None:
    before = ask(app, "GET", "/stats").json()
    answer = draw(app, runtime, num_images=2, seed=5)
    after = ask(app, "GET", "/stats")
    stats = after.json()
    assert after.headers["cache-control"] == "no-store"
    assert (stats["state"], stats["serving"], stats["problem"]) == ("ready", True, "")
    assert (stats["in_flight"], stats["waiting"], stats["batch_size"]) == (0, 0, 2)
    assert (before["steps"] or {}).get("batch_size") != 2
    steps = answer["timings"]["steps_ms"]
    assert stats["steps"]["count"] >= len(steps) == 2
    assert stats["steps"]["median_ms"] <= stats["steps"]["p95_ms"]
    assert stats["steps"]["budget_ms"] == 100
    assert stats["memory"]["resident"] > 100e6
    assert stats["mfu"] is None  # no peak is known of a CPU
    fields = stats["request"]
    assert fields["num_inference_steps"] == {"default": 20, "minimum": 1, "maximum": 100}
    assert fields["seed"] == {"minimum": "0", "maximum": str(MAX_SEED)}
    assert fields["num_images"]["maximum"] == runtime.settings.max_images
    assert fields["shapes"] == [[128, 128], [160, 96]]
    assert fields["formats"] == ["jpeg", "png", "webp"]
    assert stats["operator_token"] is False
    assert len(after.content) < 4000


def test_utilisation_is_known_with_a_peak(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(app, runtime)
    monkeypatch.setattr(runtime.metrics, "_peak_flops", 1e12)
    assert 0 < ask(app, "GET", "/stats").json()["mfu"] < 1


def test_memory_of_a_gpu(app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GpuMetrics(None, lambda: MemoryUse(allocated=7, reserved=8, peak=9), lambda: None)
    monkeypatch.setattr(runtime, "_gpu_metrics", gpu)
    memory = ask(app, "GET", "/stats").json()["memory"]
    assert (memory["gpu_allocated"], memory["gpu_peak"]) == (7, 9)


@pytest.mark.parametrize("state", [State.DRAINING, State.FAILED])
def test_stats_say_why_nothing_is_drawn(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    monkeypatch.setattr(runtime.readiness, "state", state)
    stats = ask(app, "GET", "/stats").json()
    assert (stats["state"], stats["serving"]) == (state.value, False)
    assert stats["problem"]


def test_a_timeline_has_the_times_of_the_response(app: FastAPI, runtime: Runtime) -> None:
    answer = draw(app, runtime)
    timeline = ask(app, "GET", f"/timeline/{answer['trace_id']}").json()
    by_name = {span["name"]: span["ms"] for span in timeline["spans"]}
    timings = answer["timings"]
    for stage in ("receive", "queue", "text_encode", "denoise", "vae_decode", "image_encode"):
        assert by_name[stage] == pytest.approx(timings[f"{stage}_ms"])
    steps = [span["ms"] for span in timeline["spans"] if span["name"] == "denoise_step"]
    assert steps == pytest.approx(timings["steps_ms"])
    assert timeline["spans"][0]["ms"] == timeline["duration_ms"]
    assert timeline["request"]["seed"] == str(MAX_SEED)
    assert (timeline["outcome"], timeline["status"]) == ("ok", 200)
    assert ask(app, "GET", "/timeline/" + "0" * 32).status_code == 404


def test_no_timeline_has_the_prompt(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"trace_prompts": True}
    monkeypatch.setattr(runtime, "settings", runtime.settings.model_copy(update=changes))
    trace_id = draw(app, runtime)["trace_id"]
    for path in (f"/timeline/{trace_id}", "/debug/requests", "/stats"):
        assert "zebra" not in ask(app, "GET", path).text


def test_a_failed_request_has_a_timeline_too(app: FastAPI, runtime: Runtime) -> None:
    answer = ask(app, "POST", "/", json={"prompt": PROMPT, "width": 7})
    runtime.recorder._executor.submit(lambda: None).result(30)
    timeline = ask(app, "GET", f"/timeline/{answer.json()['trace_id']}").json()
    assert (timeline["status"], timeline["error_type"]) == (422, "invalid_request")


TOKEN = "a-token-of-an-operator"


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("192.0.2.7", {}, 403),
        ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, 403),
        ("127.0.0.1", {"origin": "http://evil.test"}, 403),
        ("192.0.2.7", {"authorization": f"Bearer {TOKEN}"}, 200),
        ("192.0.2.7", {"authorization": "Bearer wrong"}, 403),
    ],
)
def test_the_requests_of_all_are_for_operators(
    app: FastAPI,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    client: str,
    headers: dict[str, str],
    status: int,
) -> None:
    settings = type(runtime.settings)(model="demo", device="cpu", admin_token=TOKEN)
    monkeypatch.setattr(runtime, "settings", settings)
    draw(app, runtime)
    answer = ask(app, "GET", "/debug/requests", client, headers=headers)
    assert answer.status_code == status
    assert ("requests" in answer.json()) == (status == 200)


def a_request(number: int = 0, steps_ms: tuple[float, ...] = (5.0,)) -> RequestTiming:
    """A made-up request with a run whose decode sticks out of it by a millisecond."""
    steps, at = [], 12.0
    for index, step_ms in enumerate(steps_ms):
        steps.append(StepTiming(index, round(at * 1e6), round((at + step_ms) * 1e6), 3_000_000))
        at += step_ms
    run = RunTiming(
        run_id=f"run-{number}",
        clock="cuda",
        shape="128x64",
        guidance=True,
        batch_size=1,
        start_ns=11_000_000,
        end_ns=round((at + 2) * 1e6),
        stages=(
            StageTiming("denoise", 11_500_000, round(at * 1e6)),
            StageTiming("vae_decode", round(at * 1e6), round((at + 3) * 1e6)),
        ),
        steps=tuple(steps),
    )
    return RequestTiming(
        endpoint="/stream",
        method="POST",
        status_code=200,
        outcome="ok",
        start_ns=10_000_000,
        end_ns=round((at + 4) * 1e6),
        stages=(StageTiming("queue", 10_100_000, 10_900_000),),
        runs=(run,),
        observed_runs=(run,),
        facts=GenerationFacts("demo", 5, len(steps_ms), 5.0, 128, 64, number),
    )


def test_the_last_requests_are_kept_newest_first() -> None:
    recent = RecentRequests()
    identities: list[TraceIdentity] = [drawn_identity() for _ in range(MOST_REQUESTS + 2)]
    for number, identity in enumerate(identities):
        recent.add(a_request(number), identity)
    kept = recent.timelines()
    assert [each["request"]["seed"] for each in kept] == [
        str(number) for number in range(MOST_REQUESTS + 1, 1, -1)
    ]
    assert recent.timeline_of(identities[0].trace_id_hex) is None


def test_spans_know_their_clock_and_stay_inside_their_parents() -> None:
    spans = {span.node.name: span for span in placed_spans(request_tree(a_request()))}
    assert {name: (span.clock, span.depth) for name, span in spans.items()} == {
        "text-to-image": ("host", 0),
        "queue": ("host", 1),
        "inference": ("host", 1),
        "denoise": ("cuda", 2),
        "denoise_step": ("cuda", 3),
        "vae_decode": ("cuda", 2),
    }
    assert spans["vae_decode"].end_ns == spans["inference"].end_ns


def test_the_latency_of_steps_is_that_of_the_last_minute() -> None:
    now = 0.0
    recent = RecentRequests(monotonic=lambda: now)
    assert recent.steps(None) is None
    recent.add(a_request(steps_ms=(900.0,)), drawn_identity())
    now = WINDOW_SECONDS + 1
    recent.add(a_request(steps_ms=tuple(map(float, range(1, 21)))), drawn_identity())
    found = recent.steps(None)
    assert found is not None
    assert (found["count"], found["median_ms"], found["p95_ms"]) == (20, 10.5, 20.0)
    now += WINDOW_SECONDS + 1
    assert recent.steps(None) is None


def test_the_latency_of_steps_is_that_of_the_newest_runs_guidance() -> None:
    recent = RecentRequests()
    for guidance, steps_ms in ((True, (40.0, 42.0)), (False, (20.0, 21.0, 22.0))):
        request = a_request(steps_ms=steps_ms)
        assert request.run is not None
        run = replace(request.run, guidance=guidance)
        recent.add(replace(request, runs=(run,), observed_runs=(run,)), drawn_identity())
    found = recent.steps(None)
    assert found is not None
    assert (found["count"], found["median_ms"]) == (3, 21.0)


def test_the_progress_of_the_warm_up() -> None:
    readiness = Readiness(phase="load_model")
    found = warmup_progress(readiness)
    assert found["phases"][0] == {"name": "load_model", "ms": None}
    assert found["eta_ms"] is None
    readiness.phase = "prepare"
    assert {"name": "prepare", "ms": None} in warmup_progress(readiness)["phases"]
    one, two, three = (CompiledShape(64, 64 + 32 * more) for more in range(3))
    readiness.planned_shapes = (one, two, three)
    readiness.phases_ms |= {"load_model": 1000.0, f"compile {one}": 400.0}
    readiness.phase = f"compile {two}"
    found = warmup_progress(readiness)
    assert [phase["name"] for phase in found["phases"]] == [
        "load_model",
        f"compile {one}",
        f"compile {two}",
        f"compile {three}",
        "verify",
        *(f"count_flops {shape}" for shape in (one, two, three)),
    ]
    assert found["eta_ms"] == 800
    readiness.state = State.READY
    assert warmup_progress(readiness)["eta_ms"] is None


def test_a_trace_url_with_a_password_is_not_shown() -> None:
    assert shown_trace_url("https://traces.test/{trace_id}") == "https://traces.test/{trace_id}"
    assert shown_trace_url("https://me:secret@traces.test/{trace_id}") is None
    assert shown_trace_url(None) is None


def test_everything_answers_while_the_model_warms_up(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "readiness", Readiness(phase="load_model"))
    assert ask(app, "GET", "/").status_code == 200
    stats = ask(app, "GET", "/stats").json()
    assert (stats["state"], stats["serving"]) == ("starting", False)
    assert stats["warmup"]["phases"][0] == {"name": "load_model", "ms": None}
