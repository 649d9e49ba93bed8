"""Draws a trace: `python -m tests.e2e.trace_picture` writes docs/images/trace.svg.

It serves one request and draws the spans that a real OTLP/HTTP endpoint received. Each span has a
row, in the order of the tree. The steps of a run share a row, because they never overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import httpx

from tests.support.otlp_endpoint import ReceivedSpan, otlp_endpoint
from tests.support.processes import ROOT, self_hosted

PICTURE = ROOT / "docs" / "images" / "trace.svg"

REQUEST = {
    "prompt": "a small red circle left of a large blue square on a white background",
    "num_inference_steps": 20,
    "seed": 1,
}

WIDTH, NAMES, TIMES, ROW, HEAD = 960, 170, 80, 22, 34

# Readable on white and on black, and distinguishable with red-green blindness.
COLOURS = {
    "text-to-image": "#8c8c8c",
    "inference": "#6f7fb5",
    "denoise": "#3b75c4",
    "denoise_step": "#3b75c4",
}
OTHER = "#c9852b"


@dataclass(frozen=True)
class Axis:
    """The position of a moment of the trace in the picture."""

    start_ns: int
    total_ns: int

    def x(self, ns: int) -> float:
        return NAMES + (ns - self.start_ns) / self.total_ns * (WIDTH - NAMES - TIMES)


def draw(spans: list[ReceivedSpan]) -> str:
    """The trace of one request as SVG."""
    root = next(span for span in spans if span.name == "text-to-image")
    total_ns = root.end_ns - root.start_ns
    rows = _rows(spans, root)
    height = HEAD + ROW * len(rows) + 8
    axis = Axis(root.start_ns, total_ns)
    title = f"The trace of one request, {total_ns / 1e6:.0f} ms from its arrival to its last byte"
    font = 'font-family="ui-monospace, monospace" font-size="12" fill="#808080"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {font}>',
        f"<title>{escape(title)}</title>",
        *_ruler(axis, height),
    ]
    for number, (depth, row) in enumerate(rows):
        y = HEAD + ROW * number
        name = row[0].name if len(row) == 1 else f"{row[0].name} × {len(row)}"
        parts.append(f'<text x="{4 + 10 * depth}" y="{y + 14}">{escape(name)}</text>')
        for index, span in enumerate(row):
            parts.append(_bar(span, axis, y, dimmed=index % 2 == 1))
        if len(row) == 1:
            took = f"{(row[0].end_ns - row[0].start_ns) / 1e6:.1f} ms"
            parts.append(f'<text x="{WIDTH - 4}" y="{y + 14}" text-anchor="end">{took}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _rows(spans: list[ReceivedSpan], root: ReceivedSpan) -> list[tuple[int, list[ReceivedSpan]]]:
    """Depth and spans of each row, from the root down."""
    rows: list[tuple[int, list[ReceivedSpan]]] = []

    def add(span: ReceivedSpan, depth: int) -> None:
        rows.append((depth, [span]))
        children = [s for s in spans if s.parent_span_id == span.span_id]
        children.sort(key=lambda s: (s.start_ns, s.end_ns))
        if children and all(child.name == "denoise_step" for child in children):
            rows.append((depth + 1, children))
            return
        for child in children:
            add(child, depth + 1)

    add(root, 0)
    return rows


def _bar(span: ReceivedSpan, axis: Axis, y: int, dimmed: bool) -> str:
    milliseconds = (span.end_ns - span.start_ns) / 1e6
    label = f"{span.name}: {milliseconds:.2f} ms"
    if "inference.step.index" in span.attributes:
        label = f"step {span.attributes['inference.step.index']}: {milliseconds:.2f} ms"
    left, right = axis.x(span.start_ns), axis.x(span.end_ns)
    opacity = "0.55" if dimmed else "1"
    return (
        f'<rect x="{left:.1f}" y="{y + 4}" width="{max(1, right - left):.1f}" height="{ROW - 8}" '
        f'rx="2" fill="{COLOURS.get(span.name, OTHER)}" fill-opacity="{opacity}">'
        f"<title>{escape(label)}</title></rect>"
    )


def _ruler(axis: Axis, height: int) -> list[str]:
    """At most nine lines, at round numbers of milliseconds."""
    total_ms = axis.total_ns / 1e6
    rounds = (digit * 10**power for power in range(6) for digit in (1, 2, 5))
    step_ms = next(step for step in rounds if total_ms / step < 9)
    lines = []
    for milliseconds in range(0, int(total_ms) + 1, step_ms):
        at = f"{axis.x(axis.start_ns + milliseconds * 1_000_000):.1f}"
        line = f'<line x1="{at}" x2="{at}" y1="{HEAD - 8}" y2="{height - 4}" stroke="#808080"'
        lines.append(line + ' stroke-opacity="0.25"/>')
        lines.append(f'<text x="{at}" y="16" text-anchor="middle">{milliseconds} ms</text>')
    return lines


def main() -> None:
    settings = {"SDXL_MODEL": "demo", "SDXL_DEVICE": "cpu"}
    with (
        otlp_endpoint() as otlp,
        self_hosted(settings | {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url}) as server,
    ):
        server.wait_until_ready(240)
        for _ in range(3):  # fills caches
            answer = httpx.post(server.url, json=REQUEST, timeout=120)
        answer.raise_for_status()
        PICTURE.write_text(draw(otlp.wait_for_trace(answer.json()["trace_id"])))


if __name__ == "__main__":
    main()
