"""Every parser of the bench: any input gives a value or the documented error."""

from __future__ import annotations

import argparse
import contextlib
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from bench.errors import BenchError
from bench.option_types import count, from_zero, positive, share
from bench.service import load
from bench.service.arrivals import Mix
from bench.service.processes import holds_image
from bench.service.server_histograms import HISTOGRAM, parse

pytestmark = pytest.mark.parser

LINES = st.sampled_from(
    [
        f'{HISTOGRAM}_bucket{{endpoint="/",outcome="ok",le="0.5"}} 3',
        f'{HISTOGRAM}_bucket{{endpoint="/",outcome="ok",le="+Inf"}} 4',
        f'{HISTOGRAM}_bucket{{endpoint="/",outcome="ok",le="half"}} 4',
        f'{HISTOGRAM}_bucket{{endpoint="/",outcome="ok"}} 4',
        f'{HISTOGRAM}_sum{{endpoint="/",outcome="ok"}} 1.5',
        *("# TYPE a histogram", f"# TYPE {HISTOGRAM} histogram", "# HELP a", "#", "a", "a 1 2 3"),
        *('a{b="c} 1', 'a{b="\\', "a{", "a}", "a{} NaN", "<html>", "\\", '"', "= 1", "", " "),
    ]
)


@given(st.lists(LINES | st.text(max_size=10), max_size=6).map("\n".join))
@example(f'# TYPE {HISTOGRAM} histogram\n{HISTOGRAM}_bucket{{endpoint="/",outcome="ok"}} 4')
def test_any_metrics_are_a_histogram_none_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        found = parse(text)
        assert found is None or len(found.bounds) == len(found.counts)


@given(st.lists(st.floats(0, 100), max_size=8))
def test_a_histogram_is_read_as_it_was_written(seconds: list[float]) -> None:
    registry = CollectorRegistry()
    written = Histogram(HISTOGRAM, "", ("endpoint", "outcome"), registry=registry)
    for value in seconds:
        written.labels("/", "ok").observe(value)
    found = parse(generate_latest(registry).decode())
    if not seconds:
        assert found is None
        return
    assert found is not None
    assert found.count == len(seconds)
    assert math.isclose(found.total_seconds, math.fsum(seconds), abs_tol=1e-6)
    assert found.bounds[-1] == math.inf


NUMBERS = st.sampled_from(["1", "0", "-1", "128", "x", "1e999", "nan", "²", "=", "64x64", " "])


@given(st.lists(NUMBERS | st.text(max_size=4), max_size=4).map("".join))
def test_any_option_of_the_load_test_is_read_or_refused(text: str) -> None:
    for kind in (positive, share, count, from_zero, load._clients, load._weighted):
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            kind(text)
    with contextlib.suppress(BenchError):
        mix = Mix.of([(text, 1.0)], [(text, 1.0)])
        assert math.isclose(sum(share for _, share in mix.bodies()), 1)
    with contextlib.suppress(BenchError):
        mix = Mix.of([("64x64", 1.0)], [(text, 1.0)])
        ((body, _),) = mix.bodies()
        assert body["num_inference_steps"] >= 1
    with contextlib.suppress(BenchError):
        mix = Mix.of([(text, 1.0)], [("1", 1.0)])
        ((body, _),) = mix.bodies()
        assert body["width"] >= 0


URLS = st.lists(
    st.sampled_from(
        ["http://", "https://", "127.0.0.1", "localhost", "[::1]", ":", "80", "99999", "/", "@"]
    )
    | st.text(max_size=3),
    max_size=5,
).map("".join)


@given(URLS)
@example(" http://127.0.0.1")
def test_any_url_is_of_this_machine_or_refused(url: str) -> None:
    with contextlib.suppress(BenchError):
        assert load.checked_url(url, anywhere=False).startswith("http")


@given(
    st.binary(max_size=40)
    | st.sampled_from([b'{"image": {"url": 1}}', b'{"image": []}', b'{"image": {"url": "data:"}}'])
)
def test_bytes_hold_no_image_unless_they_are_an_answer_with_one(body: bytes) -> None:
    assert not holds_image(body)
