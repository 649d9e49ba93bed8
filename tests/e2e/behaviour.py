"""What a client, a trace backend and a scraper see of a running service, recorded for comparison.

    python -m tests.e2e.behaviour record before.json
    python -m tests.e2e.behaviour compare before.json after.json

Run it before and after a refactoring that must not change behaviour. It keeps status codes, header
names, the fields and types of answers, span trees with their attributes, metrics with labels and
buckets, and the fields of log lines. It drops what differs from run to run, and wording.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, STARTS, body, environment
from tests.support.otlp_endpoint import OtlpEndpoint, ReceivedSpan, otlp_endpoint
from tests.support.processes import ServerProcess, fal_local

WORDING = {
    "msg",
    "message",
    "detail",
    "reason",
    "event",
    "exception.message",
    "exception.stacktrace",
}
"""Fields that are sentences for people, by name."""
KEPT = {
    "error_type",
    "error.type",
    "type",
    "clock",
    "state",
    "content_type",
    "level",
    "otel.status",
}
"""Fields whose text is part of the contract."""

REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {"json": body()},
    "unguided": {"json": body(guidance_scale=1.0, format="png")},
    "negative prompt": {"json": body(negative_prompt="a square", format="webp")},
    "unknown field": {"json": body(colour="red")},
    "wrong type": {"json": body(num_inference_steps="many")},
    "cold shape": {"json": body(width=72, height=72)},
    "no body": {"content": b""},
    "not JSON": {"content": b"{", "headers": {"content-type": "application/json"}},
    "too large": {"json": body(prompt="x" * (1 << 21))},
    "deadline": {"json": body(num_inference_steps=50, deadline_seconds=0.05)},
    "not found": {"method": "GET", "path": "/nope"},
    "not allowed": {"method": "DELETE"},
    "health": {"method": "GET", "path": "/health"},
    "ready": {"method": "GET", "path": "/ready"},
    "stream": {"path": "/stream", "json": body(preview=True)},
    "stream of a cold shape": {"path": "/stream", "json": body(width=72, height=72)},
}


def shape_of(value: Any, name: str = "") -> Any:
    """A JSON value by its fields and types."""
    if isinstance(value, dict):
        return {key: shape_of(item, key) for key, item in sorted(value.items())}
    if isinstance(value, list):
        shapes = [shape_of(item, name) for item in value]
        return shapes if name in ("loc", "shapes") else shapes[:1]
    if isinstance(value, str) and name not in WORDING:
        return value if name in KEPT else "string"
    return "text" if isinstance(value, str) else type(value).__name__


def answer_of(response: httpx.Response) -> dict[str, Any]:
    kind = response.headers.get("content-type", "").partition(";")[0]
    shown: Any = kind
    if kind == "application/json":
        shown = shape_of(response.json())
    elif kind == "text/event-stream":
        shown = [
            [line.partition(":")[0] for line in event.splitlines()[:-1]]
            + [shape_of(json.loads(event.splitlines()[-1].partition("data: ")[2] or "null"))]
            for event in response.text.strip().split("\n\n")
        ]
    headers = sorted({name.lower() for name in response.headers} - {"transfer-encoding"})
    return {"status": response.status_code, "headers": headers, "body": shown}


def tree_of(spans: list[ReceivedSpan]) -> list[Any]:
    """Spans of one trace with attributes and events, children in the order of their start."""
    known = {span.span_id for span in spans}

    def subtree(parent: ReceivedSpan) -> dict[str, Any]:
        children = [span for span in spans if span.parent_span_id == parent.span_id]
        # A cancelled run's number of steps depends on the machine's speed.
        steps = [child for child in children if child.name == "denoise_step"]
        children = [child for child in children if child not in steps[1:]]
        return {
            "name": parent.name,
            "kind": parent.kind,
            "status": parent.status_code,
            "attributes": shape_of(parent.attributes),
            "events": [[name, shape_of(attributes)] for name, attributes in parent.events],
            "children": [
                subtree(c) for c in sorted(children, key=lambda s: (s.start_ns, s.end_ns))
            ],
        }

    return [subtree(span) for span in spans if span.parent_span_id not in known]


def metrics_of(text: str) -> dict[str, Any]:
    """Our metrics: type, labels with their values where these are of a closed set, and buckets."""
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(("sdxl_", "otel_")):
            labels = sorted(
                {
                    json.dumps({k: v for k, v in s.labels.items() if k != "server_port"})
                    for s in family.samples
                }
            )
            if family.name == "sdxl_build_info":
                labels = sorted(json.loads(labels[0]))
            found[family.name] = [family.type, labels]
    return found


def log_fields_of(output: str) -> list[str]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return sorted({json.dumps(sorted(line)) for line in lines})


def record_server(process: ServerProcess, otlp: OtlpEndpoint) -> dict[str, Any]:
    recorded: dict[str, Any] = {"answers": {}, "traces": {}}
    with httpx.Client(base_url=process.url, timeout=ANSWER_SECONDS) as client:
        for name, request in REQUESTS.items():
            options = dict(request)
            method, path = options.pop("method", "POST"), options.pop("path", "/")
            response = client.request(method, path, **options)
            recorded["answers"][name] = answer_of(response)
            trace_id = response.headers.get("x-trace-id")
            if trace_id and method == "POST":
                recorded["traces"][name] = tree_of(otlp.wait_for_trace(trace_id))
    recorded["metrics"] = metrics_of(httpx.get(process.metrics_url, timeout=60).text)
    warmup = [span.trace_id for span in otlp.spans if span.name == "warmup"]
    recorded["warmup"] = tree_of(otlp.trace(warmup[0]))
    recorded["resource"] = sorted(otlp.spans[0].resource)
    recorded["exit seconds below 10"] = process.terminate() < 10
    recorded["log fields"] = log_fields_of(process.output())
    return recorded


def record() -> dict[str, Any]:
    recorded: dict[str, Any] = {}
    for kind, start in STARTS.items():
        with ExitStack() as stack:
            otlp = stack.enter_context(otlp_endpoint())
            settings = environment(otlp, SDXL_MODEL="demo", SDXL_LOG_FORMAT="json")
            process = stack.enter_context(start(settings))
            process.wait_until_ready(START_SECONDS)
            if kind == "fal":
                recorded["gateway"] = record_gateway(process, otlp)
            recorded[kind] = record_server(process, otlp)
    return recorded


def whole_tree(spans: list[ReceivedSpan], trace_id: str) -> bool:
    """Whether the gateway's spans have arrived, and the image app's if the gateway called it."""
    names = {span.name for span in spans if span.trace_id == trace_id}
    return "prompt-gateway" in names and ("call" not in names or "text-to-image" in names)


def record_gateway(image_app: ServerProcess, otlp: OtlpEndpoint) -> dict[str, Any]:
    settings = environment(otlp, SDXL_GATEWAY_TARGET=image_app.url, SDXL_LOG_FORMAT="json")
    with fal_local(settings, app="gateway") as gateway:
        gateway.wait_until_ready(START_SECONDS)
        recorded: dict[str, Any] = {"answers": {}, "traces": {}}
        for name in ("guided", "unknown field", "cold shape"):
            response = httpx.post(gateway.url, timeout=ANSWER_SECONDS, **REQUESTS[name])
            recorded["answers"][name] = answer_of(response)
            trace_id = response.headers["x-trace-id"]
            otlp.wait_for(lambda spans, of=trace_id: whole_tree(spans, of))
            recorded["traces"][name] = tree_of(otlp.trace(trace_id))
        recorded["metrics"] = metrics_of(httpx.get(gateway.metrics_url, timeout=60).text)
        gateway.terminate()
        recorded["log fields"] = log_fields_of(gateway.output())
        return recorded


def main(arguments: list[str]) -> int:
    match arguments:
        case ["record", path]:
            Path(path).write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
            return 0
        case ["compare", before, after]:
            texts = [Path(path).read_text().splitlines() for path in (before, after)]
            lines = list(difflib.unified_diff(*texts, before, after, lineterm="", n=2))
            print("\n".join(lines) or "no difference")
            return int(bool(lines))
    print(re.sub(r"\n\n.*", "", __doc__ or "", flags=re.S), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
