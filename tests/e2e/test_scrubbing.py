"""What a client sends is shown to nobody else: a secret in each place of a request, searched in all
that a real server gives out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body
from tests.support.forked import self_hosted
from tests.support.otlp_endpoint import OtlpEndpoint, otlp_endpoint
from tests.support.processes import ServerProcess
from tests.support.raw_client import connected

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPTS = {"prompt": "Vc1nHs7F", "negative prompt": "Kd9wTb3X"}


def secret(number: int) -> str:
    """A word that nothing else contains, of its own for each place."""
    return f"Zq{number:02d}vXw{number:02d}Yk"


@dataclass
class Planting:
    """Sends requests, each with secrets in it, and keeps what came back."""

    url: str
    client: httpx.Client
    planted: dict[str, str] = field(default_factory=dict)
    """By secret: the place that it is in."""
    answers: list[tuple[int, str]] = field(default_factory=list)

    def new(self, place: str) -> str:
        word = secret(len(self.planted))
        self.planted[word] = place
        return word

    def post(self, path: str = "/", headers: dict[str, str] | None = None, **fields: Any) -> None:
        fields = body(width=64, height=64) | fields
        self.keep(self.client.post(path, json=fields, headers=headers))

    def keep(self, answer: httpx.Response) -> None:
        self.answers.append((answer.status_code, f"{answer.headers} {answer.text}"))


def in_headers(plant: Planting) -> None:
    names = ("Authorization", "X-API-Key", "Cookie", "User-Agent", "Referer", "Origin", "X-Other",
             "Baggage", "X-Forwarded-For", "X-Forwarded-Host", "Accept", "Accept-Language",
             "If-None-Match", "X-Request-Id", "X-Fal-Request-Id", "Traceparent",
             "Proxy-Authorization")  # fmt: skip
    for path in ("/", "/stream"):
        # A blank, so that none is a request id or a trace context that is well formed.
        plant.post(path, {name: f"a {plant.new(name)}" for name in names})
    # A state without its parent is nobody's.
    plant.post(headers={"Tracestate": f"v={plant.new('Tracestate')}"})
    plant.post(headers={"Content-Type": f"text/{plant.new('Content-Type')}"})
    plant.post(headers={"Content-Encoding": plant.new("Content-Encoding")})
    with connected(plant.url) as client:
        host, method = plant.new("Host"), plant.new("method")
        client.send(f"GET /nowhere HTTP/1.1\r\nHost: {host}\r\n\r\n")
        plant.answers.append((0, str(client.answer())))
        client.send(f"{method} /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        plant.answers.append((0, str(client.answer())))
    with connected(plant.url) as client:
        client.send(f"GET /health HTTP/1.1\r\nHost: x\r\n{plant.new('bad header')} \r\n\r\n")
        plant.answers.append((0, client.read().decode()))


def in_urls(plant: Planting) -> None:
    for method in ("GET", "POST"):
        plant.keep(plant.client.request(method, f"/{plant.new('path')}"))
    plant.keep(plant.client.get(f"/timeline/{plant.new('trace id')}"))
    plant.keep(plant.client.get(f"/health?key={plant.new('query')}"))
    plant.post(f"/?key={plant.new('query')}")


def in_fields(plant: Planting) -> None:
    picture = "https://me:{}@127.0.0.1:9/{}?sig={}"
    wrong: list[dict[str, Any]] = [
        {"width": plant.new("width")},
        {"format": plant.new("format")},
        {"image_size": plant.new("image_size")},
        {"image_size": {"width": plant.new("size"), "height": 64}},
        {"loras": [{"path": plant.new("lora")}]},
        {"loras": [{"path": "../" + plant.new("lora path")}]},
        {"request_id": "a " + plant.new("request_id")},
        {"embeddings": [plant.new("embeddings")]},
        {"safety_checker_version": plant.new("version")},
        {"trace_context": {"traceparent": plant.new("trace_context")}},
        {"trace_context": {"tracestate": "v=" + plant.new("tracestate")}},
        {"prompt": [plant.new("prompt of a wrong type")]},
        {"prompt": "", "negative_prompt": plant.new("prompt beside an error")},
        {"prompt": plant.new("prompt that is too long") * 1000},
    ]
    for path in ("/", "/stream"):
        for fields in wrong:
            plant.post(path, **fields)
    for uri in (
        f"data:image/png;base64,{plant.new('data URI')}",
        f"data:image/{plant.new('type of a data URI')};base64,AAAA",
        picture.format(*(plant.new(f"picture's {part}") for part in ("user", "path", "query"))),
    ):
        plant.post("/image-to-image", image_url=uri)
    for field_name in ("model", "size", "quality", "user", "style", "response_format"):
        plant.keep(
            plant.client.post(
                "/v1/images/generations",
                json={"prompt": "a circle", field_name: plant.new(f"OpenAI's {field_name}")},
            )
        )
    content = f'{{"prompt": "{plant.new("broken JSON")}'
    plant.keep(
        plant.client.post("/", content=content, headers={"content-type": "application/json"})
    )


def with_prompts(plant: Planting) -> None:
    both = {"prompt": PROMPTS["prompt"], "negative_prompt": PROMPTS["negative prompt"]}
    for path in ("/", "/stream"):
        plant.client.post(path, json=body(width=64, height=64, **both)).raise_for_status()
    plant.client.post("/v1/images/generations", json=both | {"num_inference_steps": 1})
    plant.client.post("/", json=body(width=64, height=64, **both, deadline_seconds=0.001))


@contextmanager
def server(otlp: OtlpEndpoint, **settings: str) -> Iterator[ServerProcess]:
    common = {
        "SDXL_DEVICE": "cpu",
        "SDXL_SHAPES": "64x64",
        "OMP_NUM_THREADS": "1",
        "SDXL_IMAGE_HOSTS": "pictures.example",
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url,
        "SDXL_OTLP_METRICS": "true",
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
    }
    with self_hosted(common | settings) as started:
        started.wait_until_ready(START_SECONDS)
        yield started


def shown(process: ServerProcess, otlp: OtlpEndpoint, client: httpx.Client) -> dict[str, str]:
    """All that the server gives to others than the sender, after the last request was recorded."""
    last = client.post("/", json=body(width=64, height=64)).json()["trace_id"]
    otlp.wait_for_trace(last, ANSWER_SECONDS)
    time.sleep(1.5)  # one more push of metrics
    paths = ("/metrics", "/stats", "/debug/requests", f"/timeline/{last}", "/ready", "/health")
    pages = {path: client.get(path).text for path in paths}
    openmetrics = client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    return pages | {
        "OpenMetrics": openmetrics.text,
        "log": process.output(),
        "spans": repr(otlp.spans),
        "pushed metrics": repr(otlp.pushes),
    }


@pytest.mark.parametrize("log_format", ["json", pytest.param("text", marks=pytest.mark.slow)])
def test_no_secret_of_a_request_is_shown_to_anybody(log_format: str) -> None:
    with (
        otlp_endpoint() as otlp,
        server(otlp, SDXL_LOG_FORMAT=log_format) as process,
        httpx.Client(base_url=process.url, timeout=ANSWER_SECONDS) as client,
    ):
        plant = Planting(process.url, client)
        in_headers(plant)
        in_urls(plant)
        in_fields(plant)
        with_prompts(plant)
        given_out = shown(process, otlp, client)
    assert len(plant.planted) > 50
    assert not [status for status, _ in plant.answers if status >= 500]
    for place, text in given_out.items():
        assert "denoise_step" in text or place != "spans"
        found = [plant.planted[word] for word in plant.planted if word in text]
        found += [name for name, word in PROMPTS.items() if word in text]
        assert not found, place
    # Their sender gets the error, without them too.
    for status, text in plant.answers:
        assert not [plant.planted[word] for word in plant.planted if word in text], status


def test_prompts_are_in_spans_if_the_operator_says_so_and_nowhere_else() -> None:
    with (
        otlp_endpoint() as otlp,
        server(otlp, SDXL_TRACE_PROMPTS="true") as process,
        httpx.Client(base_url=process.url, timeout=ANSWER_SECONDS) as client,
    ):
        with_prompts(Planting(process.url, client))
        given_out = shown(process, otlp, client)
    assert PROMPTS["prompt"] in given_out.pop("spans")
    for place, text in given_out.items():
        assert not [name for name, word in PROMPTS.items() if word in text], place
