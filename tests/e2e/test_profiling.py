"""Profiling on a real server: requested over HTTP, written, and no delay to the shutdown."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment
from tests.support.forked import self_hosted
from tests.support.otlp_endpoint import otlp_endpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.slow
def test_a_request_is_profiled_on_a_real_server(tmp_path: Path) -> None:
    with otlp_endpoint() as otlp:
        settings = environment(otlp, SDXL_PROFILE_DIR=str(tmp_path), SDXL_SHAPES="128x128")
        with self_hosted(settings) as server:
            server.wait_until_ready(START_SECONDS)
            order = server.url + "/debug/profile"
            assert httpx.post(order, json={"requests": 1}).json() == {"armed": 1, "profiles": []}
            behind_a_proxy = {"x-forwarded-for": "192.0.2.7"}
            assert httpx.post(order, json={}, headers=behind_a_proxy).status_code == 403

            answer = httpx.post(server.url, json=body(), timeout=ANSWER_SECONDS)
            assert answer.status_code == 200
            spans = {s.name: s for s in otlp.wait_for_trace(answer.json()["trace_id"])}
            profile = tmp_path / spans["inference"].attributes["inference.profile"]
            deadline = time.monotonic() + 60
            while not profile.exists():
                assert time.monotonic() < deadline, server.output()
                time.sleep(0.05)
            events = json.loads(gzip.decompress(profile.read_bytes()))["traceEvents"]
            assert {"denoise_step 0", "denoise_step 1", "aten::linear"} <= {
                event["name"] for event in events
            }

            # One more, which is still being written at SIGTERM.
            httpx.post(order, json={"requests": 1})
            httpx.post(server.url, json=body(num_inference_steps=20), timeout=ANSWER_SECONDS)
            assert server.terminate() < 10
            assert server.process.returncode == 0, server.output()
            assert "could not be written" not in server.output()
