"""Both servers as real processes, each started once for all tests that only send requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.support import forked, processes
from tests.support.otlp_endpoint import OtlpEndpoint, otlp_endpoint
from tests.support.processes import ServerProcess

# A busy machine takes many times the seconds that an idle one does.
START_SECONDS = 240.0
ANSWER_SECONDS = 120.0

Start = Callable[..., AbstractContextManager[ServerProcess]]

COMMANDS: dict[str, Start] = {
    "self-hosted": processes.self_hosted,
    "fal": processes.fal_local,
}
"""Started as an operator starts them."""

STARTS: dict[str, Start] = {"self-hosted": forked.self_hosted, "fal": forked.fal_local}
"""The same, without the seconds of imports."""


@dataclass
class Server:
    """A ready server and where its spans arrive."""

    kind: str
    process: ServerProcess
    otlp: OtlpEndpoint
    client: httpx.Client

    def generate(self, path: str = "/", **fields: Any) -> httpx.Response:
        return self.client.post(path, json=body(**fields))

    def metrics(self, accept: str = "") -> str:
        return self.client.get(self.process.metrics_url, headers={"accept": accept}).text


def body(**fields: Any) -> dict[str, Any]:
    """A small valid request, changed."""
    small = {"prompt": "a red circle on a white background", "num_inference_steps": 2, "seed": 1}
    return small | fields


def picture_body(**fields: Any) -> dict[str, Any]:
    """A small valid request for image to image, changed."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return body(image_url=url, strength=1.0) | fields


def environment(otlp: OtlpEndpoint, **more: str) -> dict[str, str]:
    return {
        "SDXL_DEVICE": "cpu",
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url,
        # Two servers of several spinning threads each would starve each other on a small machine.
        "OMP_NUM_THREADS": "1",
        **more,
    }


@pytest.fixture(scope="module")
def otlp() -> Iterator[OtlpEndpoint]:
    """Where the spans of a file's own server arrive."""
    with otlp_endpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, Server]]:
    """Both, started side by side. One request may wait, so that a third is refused."""
    with ExitStack() as stack:
        started = {}
        # As an operator starts it fal is started here, and the self-hosted one in test_wheel.py.
        for kind, start in (STARTS | {"fal": COMMANDS["fal"]}).items():
            otlp = stack.enter_context(otlp_endpoint())
            process = stack.enter_context(start(environment(otlp, SDXL_MAX_WAITING="1")))
            client = stack.enter_context(httpx.Client(base_url=process.url, timeout=ANSWER_SECONDS))
            started[kind] = Server(kind, process, otlp, client)
        for server in started.values():
            server.process.wait_until_ready(START_SECONDS)
        yield started


@pytest.fixture(params=list(STARTS))
def server(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Server:
    return servers[request.param]
