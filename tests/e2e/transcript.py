"""The README's example request: `python -m tests.e2e.transcript` writes it there.

A server process gives the response; the tree is what a real OTLP/HTTP endpoint received.
"""

from __future__ import annotations

import json
import re

import httpx

from tests.support.forked import self_hosted
from tests.support.otlp_endpoint import ReceivedSpan, otlp_endpoint
from tests.support.processes import ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- transcript: begin -->", "<!-- transcript: end -->"

REQUEST = {
    "prompt": "a small red circle left of a large blue square on a white background",
    "num_inference_steps": 4,
    "seed": 1,
}


def record() -> str:
    """Serve one request; returns its transcript as Markdown."""
    with (
        otlp_endpoint() as otlp,
        self_hosted(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url, "SDXL_MODEL": "demo", "SDXL_DEVICE": "cpu"}
        ) as server,
    ):
        server.wait_until_ready(240)
        httpx.post(server.url, json=REQUEST, timeout=120)  # fills caches
        answer = httpx.post(server.url, json=REQUEST, timeout=120)
        answer.raise_for_status()
        body = answer.json()
        spans = otlp.wait_for_trace(body["trace_id"])
    for image in (body["image"], *body["images"]):
        image["url"] = image["url"][:48] + "..."
    _round(body["timings"])
    request = json.dumps(REQUEST)
    return "\n".join(
        [
            "```console",
            "$ curl -s http://127.0.0.1:8080 -H 'content-type: application/json' \\",
            f"    -d '{request}'",
            json.dumps(body, indent=2),
            "```",
            "",
            "and the trace that the OTLP endpoint received for it:",
            "",
            "```text",
            *tree_with_times(spans),
            "```",
        ]
    )


def tree_with_times(spans: list[ReceivedSpan]) -> list[str]:
    """The tree of one trace, one line a span: its start after the root's start, and its
    duration."""
    root = next(span for span in spans if span.name == "text-to-image")
    lines = []

    def add(span: ReceivedSpan, depth: int) -> None:
        start_ms = (span.start_ns - root.start_ns) / 1e6
        duration_ms = (span.end_ns - span.start_ns) / 1e6
        name = "  " * depth + span.name
        lines.append(f"{name:<22} {start_ms:>8.2f} ms {duration_ms:>8.2f} ms{_attributes(span)}")
        children = [s for s in spans if s.parent_span_id == span.span_id]
        for child in sorted(children, key=lambda s: (s.start_ns, s.end_ns)):
            add(child, depth + 1)

    add(root, 0)
    return lines


_SHOWN_ATTRIBUTES = {
    "text-to-image": ("http.response.status_code", "request.unattributed_ms"),
    "inference": ("run.id", "inference.clock"),
    "denoise": ("inference.step.median_ms", "inference.step.slowest_index"),
    "denoise_step": ("inference.step.index", "inference.step.gpu_queue_ms"),
}


def _attributes(span: ReceivedSpan) -> str:
    pairs = []
    for key in _SHOWN_ATTRIBUTES.get(span.name, ()):
        value = span.attributes[key]
        if isinstance(value, float):
            value = round(value, 2)
        elif isinstance(value, str) and len(value) > 8:
            value = value[:8] + "..."
        pairs.append(f"{key}={value}")
    return "  " + " ".join(pairs) if pairs else ""


def _round(timings: dict[str, object]) -> None:
    for key, value in timings.items():
        if isinstance(value, float):
            timings[key] = round(value, 2)
        elif isinstance(value, list):
            timings[key] = [round(item, 2) for item in value]


def shape(text: str) -> str:
    """A transcript without the values that differ from run to run."""
    text = re.sub(r"data:image/jpeg;base64,[^\"]*", "data", text)
    text = re.sub(r"\b[0-9a-f]{8,32}(\.\.\.)?", "id", text)
    text = re.sub(r"\d+(\.\d+)?", "0", text)
    return re.sub(r"[ \t]+", " ", text)


def in_readme() -> str:
    """The transcript in the README."""
    return README.read_text().split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{record()}\n{END}{after}")


if __name__ == "__main__":
    main()
