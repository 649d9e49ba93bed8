"""A server that needs keys: real clients, the load test and the playground with and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fal_client
import httpx
import openai
import pytest

from bench.__main__ import main as bench
from tests.e2e.browser import CHROMIUM, DRIVER, Page, chromium, violations
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment
from tests.e2e.test_openapi import CHECKS
from tests.support.forked import self_hosted
from tests.support.otlp_endpoint import OtlpEndpoint
from tests.support.processes import ROOT, ServerProcess
from tests.support.raw_client import PATIENCE, connected, post

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ALICE, ALICES_NEXT, BOB = "Wm4tZc8NvR2qLx6Y", "pK7dHs3BgF9jTe5A", "uC1yXn6VbM4wQz8E"
ADMIN = "hG2rSk5UeJ8oDi3P"
WRONG = "aaaaaaaaaaaaaaaaa"
FEW: dict[str, Any] = {"num_inference_steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def server(otlp: OtlpEndpoint) -> Iterator[ServerProcess]:
    settings = {
        "SDXL_SHAPES": "64x64",
        "SDXL_STEPS": "1",
        "SDXL_API_KEYS": f"alice={ALICE},alice={ALICES_NEXT},bob:1={BOB}",
        "SDXL_ADMIN_TOKEN": ADMIN,
    }
    with self_hosted(environment(otlp, **settings)) as process:
        process.wait_until_ready(START_SECONDS)
        yield process


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_openais_client_with_a_right_and_a_wrong_key(server: ServerProcess) -> None:
    def client(key: str) -> openai.OpenAI:
        url = f"{server.url}/v1"
        return openai.OpenAI(base_url=url, api_key=key, timeout=ANSWER_SECONDS, max_retries=0)

    for key in (ALICE, ALICES_NEXT):
        with client(key) as right:
            drawn = right.images.generate(prompt="a red circle", extra_body=FEW)
            assert drawn.data is not None
            assert drawn.data[0].b64_json
            assert right.models.list().data
            *_, last = right.images.generate(prompt="a red circle", stream=True, extra_body=FEW)
            assert last.type == "image_generation.completed"
    with client(WRONG) as wrong:
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.images.generate(prompt="a red circle", extra_body=FEW)
        assert (caught.value.code, caught.value.type) == ("unauthorized", "invalid_request_error")
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_fals_client_with_a_right_and_a_wrong_key(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fal_client.client, "RUN_URL_FORMAT", server.url)
    arguments = body(num_inference_steps=1)
    right = fal_client.SyncClient(key=ALICE, default_timeout=ANSWER_SECONDS)
    assert len(right.run("", arguments=arguments)["images"]) == 1
    assert [event["type"] for event in right.stream("", arguments=arguments)][-1] == "image"
    right._client.close()
    wrong = fal_client.SyncClient(key=WRONG, default_timeout=ANSWER_SECONDS)
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        wrong.run("", arguments=arguments)
    wrong._client.close()
    assert caught.value.status_code == 401


def test_spans_metrics_and_the_log_have_the_name_and_never_the_key(
    server: ServerProcess, otlp: OtlpEndpoint
) -> None:
    drawn = httpx.post(server.url, json=body(), headers=bearer(ALICES_NEXT), timeout=60)
    refused = httpx.post(server.url, json=body(), headers=bearer(WRONG), timeout=60)
    assert (drawn.status_code, refused.status_code) == (200, 401)
    roots = {}
    for answer in (drawn, refused):
        spans = otlp.wait_for_trace(answer.headers["x-trace-id"])
        roots[answer] = next(span for span in spans if span.name == "text-to-image")
    assert roots[drawn].attributes["enduser.id"] == "alice"
    assert "enduser.id" not in roots[refused].attributes
    assert roots[refused].attributes["error.type"] == "unauthorized"
    assert roots[refused].attributes["http.response.status_code"] == 401

    assert httpx.get(server.metrics_url, headers={"x-real-ip": "192.0.2.7"}).status_code == 401
    scraped = httpx.get(server.metrics_url, headers=bearer(ADMIN) | {"x-real-ip": "192.0.2.7"})
    assert 'sdxl_api_key_requests_total{api_key="alice",outcome="ok"}' in scraped.text
    assert 'sdxl_api_key_requests_in_flight{api_key="bob"} 0.0' in scraped.text

    lines = [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]
    [line] = [each for each in lines if each.get("trace_id") == drawn.headers["x-trace-id"]]
    assert line["api_key"] == "alice"
    shown = server.output() + scraped.text + drawn.text + refused.text
    shown += repr(otlp.spans) + httpx.get(server.url + "/stats", headers=bearer(BOB)).text
    shown += httpx.get(server.url + "/openapi.json", headers=bearer(BOB)).text
    for key in (ALICE, ALICES_NEXT, BOB, ADMIN, WRONG):
        assert not any(key[at : at + 6] in shown for at in range(len(key) - 5))


def test_a_streams_place_is_free_when_it_has_ended(server: ServerProcess) -> None:
    long = body(num_inference_steps=100, num_images=4)
    with httpx.Client(base_url=server.url, headers=bearer(BOB), timeout=60) as client:
        with client.stream("POST", "/stream", json=long) as stream:
            lines = stream.iter_lines()  # closes the stream when nothing holds it any more
            next(lines)
            refused = client.post("/", json=body())
            assert refused.status_code == 429
            assert refused.json()["error_type"] == "key_limit_reached"
            assert int(refused.headers["retry-after"]) >= 1
            others = client.post("/", json=body(prompt=""), headers=bearer(ALICE))
            assert others.status_code == 422  # it has a place; a valid one would wait for the run
        # The server notices within moments that the client has left, and two steps later the run
        # ends.
        deadline = time.monotonic() + PATIENCE
        while (again := client.post("/", json=body())).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert again.status_code == 200


def test_the_load_test_reads_its_key_from_the_environment(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["load", "--url", server.url, "--steps", "1", "--rate", "5", "--max-requests", "3"]
    command += ["--deadline", "60", "--json"]
    monkeypatch.delenv("SDXL_API_KEY", raising=False)
    assert bench(command) == 2
    assert "401" in capsys.readouterr().err
    monkeypatch.setenv("SDXL_API_KEY", ALICE)
    assert bench(command) in (0, 1)  # 1: so few requests say little of the server's histogram
    shown = capsys.readouterr()
    [level] = json.loads(shown.out)["levels"]
    assert level["ok"] == level["sent"] == 3
    assert ALICE[:6] not in shown.out + shown.err


def test_who_has_no_key_need_not_send_a_body(server: ServerProcess) -> None:
    for path in ("/", "/image-to-image", "/v1/images/generations", "/nothing"):
        with connected(server.url) as client:
            client.send(post(path, b"", "Expect: 100-continue", length=50_000))
            answer = client.answer()
            assert answer.status == 401
            assert answer.headers["connection"] == "close"
            assert answer.headers["www-authenticate"] == "bearer"  # read in lower case
            assert client.is_closed()


def test_a_line_break_behind_a_path_opens_nothing(server: ServerProcess) -> None:
    """The server decodes it, and the router would overlook it."""
    with httpx.Client(base_url=server.url) as client:
        for headers in ({}, bearer(BOB), bearer(ADMIN)):
            for path in ("/metrics", "/debug/requests", "/timeline/" + "0" * 32, "/"):
                assert client.get(path + "%0A", headers=headers).status_code == 404
            for path in ("/", "/stream", "/v1/images/generations", "/debug/profile"):
                answer = client.post(path + "%0A", json=body(), headers=headers)
                assert answer.status_code == 404


def test_a_browser_that_asks_first_is_told_no(server: ServerProcess) -> None:
    asked = {
        "origin": "https://elsewhere.test",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = httpx.options(server.url, headers=asked)
    assert answer.status_code in (401, 405)
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_answer_is_as_the_document_says(server: ServerProcess, tmp_path: Path) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(
        '[checks.negative_data_rejection]\nexpected-statuses = ["400", "413", "415", "422"]\n'
    )
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [server.url + "/openapi.json", "--header", f"x-api-key: {ALICE}", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "12", "--seed", "1"]
    command += ["--checks", ",".join(CHECKS)]
    hooks = {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks"}
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | hooks, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


# The page

in_a_browser = pytest.mark.skipif(
    (CHROMIUM is None or DRIVER is None) and os.environ.get("CI") != "true",
    reason="Debian's chromium and its driver are not installed",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@in_a_browser
def test_the_page_asks_for_a_key_and_forgets_it(browser: Any, server: ServerProcess) -> None:
    page = Page(browser, server.url)
    page.open()
    page.until(page.find("#key-card").is_displayed)
    assert page.text("#state") == "needs a key"
    assert page.run("return document.activeElement.id") == "key"
    assert not page.find("#generate").is_enabled()
    assert page.find("#key").get_attribute("type") == "password"

    page.find("#key").send_keys(WRONG + "\n")
    page.until(lambda: page.text("#key-error"))
    assert page.run("return document.activeElement.id") == "key"
    assert page.run("return sessionStorage.getItem('stepspan.key')") is None
    page.find("#key").send_keys(ALICE + "\n")
    page.wait_ready()
    assert not page.find("#key-card").is_displayed()
    assert page.run("return document.activeElement.id") == "prompt"
    page.generate(num_inference_steps=2, prompt="a red circle")
    assert page.run("return document.querySelector('#pictures img').naturalWidth") == 64

    page.find("#code summary").click()
    for kind in ("curl", "openai", "fal"):
        page.run(f"document.querySelector('[data-code={kind}]').click()")
        assert ("SDXL_API_KEY" in page.text("#code-text")) == (kind != "fal")
    page.driver.get(server.url)  # the session has it
    page.wait_ready()
    everything = page.run(
        "return document.documentElement.outerHTML + location.href + document.cookie"
        " + JSON.stringify(localStorage) + JSON.stringify(performance.getEntries())"
    )
    assert ALICE[:6] not in everything

    page.find("#forget-key").click()
    page.until(page.find("#key-card").is_displayed)
    assert page.run("return sessionStorage.getItem('stepspan.key')") is None
    assert not page.find("#generate").is_enabled()
    # A refused answer is the browser's to complain of; nothing else is.
    assert all("401" in line for line in page.console())


@in_a_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)], ids=["wide", "phone"])
def test_asking_for_a_key_is_readable(
    browser: Any, server: ServerProcess, width: int, dark: bool
) -> None:
    page = Page(browser, server.url)
    page.open(width, 900, dark)
    page.until(page.find("#key-card").is_displayed)
    page.find("#key").send_keys(WRONG + "\n")
    page.until(lambda: page.text("#key-error"))
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert violations(page) == []
