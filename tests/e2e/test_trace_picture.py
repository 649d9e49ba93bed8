"""The README's picture of a trace: it shows the spans that the service exports."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tests.e2e.trace_picture import PICTURE, draw
from tests.e2e.transcript import README, in_readme
from tests.support.otlp_endpoint import ReceivedSpan

SVG = "{http://www.w3.org/2000/svg}"


def span(
    name: str, parent: str, start_ms: float, end_ms: float, **attributes: object
) -> ReceivedSpan:
    own = f"{name}{start_ms}"
    return ReceivedSpan(
        name=name,
        trace_id="t",
        span_id=own,
        parent_span_id=parent,
        start_ns=round(start_ms * 1e6),
        end_ns=round(end_ms * 1e6),
        kind=1,
        status_code=0,
        status_message="",
        attributes=attributes,
        events=(),
        resource={},
        trace_state="",
    )


SPANS = [
    span("denoise_step", "denoise11", 20, 40, **{"inference.step.index": 1}),
    span("denoise_step", "denoise11", 12, 20, **{"inference.step.index": 0}),
    span("denoise", "inference10", 11, 41),
    span("inference", "text-to-image0", 10, 50),
    span("receive", "text-to-image0", 0, 1),
    span("text-to-image", "", 0, 100),
]


def test_each_span_is_a_bar_at_its_time() -> None:
    picture = ElementTree.fromstring(draw(SPANS))
    bars = {bar.findtext(f"{SVG}title"): bar for bar in picture.iter(f"{SVG}rect")}
    assert list(bars) == [
        "text-to-image: 100.00 ms",
        "receive: 1.00 ms",
        "inference: 40.00 ms",
        "denoise: 30.00 ms",
        "step 0: 8.00 ms",
        "step 1: 20.00 ms",
    ]
    root = bars["text-to-image: 100.00 ms"]
    left, width = float(root.attrib["x"]), float(root.attrib["width"])
    step = bars["step 1: 20.00 ms"]
    assert abs(float(step.attrib["x"]) - (left + 0.2 * width)) < 0.2
    assert abs(float(step.attrib["width"]) - 0.2 * width) < 0.2
    assert step.attrib["y"] == bars["step 0: 8.00 ms"].attrib["y"]
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert "denoise_step × 2" in texts
    assert "100.0 ms" in texts


@pytest.mark.docs
def test_the_picture_in_the_readme_shows_the_exported_spans() -> None:
    assert str(PICTURE.relative_to(README.parent)) in README.read_text()
    picture = ElementTree.fromstring(PICTURE.read_text())
    drawn = [text.text or "" for text in picture.iter(f"{SVG}text")]
    names = [re.sub(r" × \d+$", "", text) for text in drawn if not text.endswith(" ms")]
    tree = in_readme().split("```text")[1].split("```")[0].strip().splitlines()
    exported = list(dict.fromkeys(line.split()[0] for line in tree))
    assert names == exported
