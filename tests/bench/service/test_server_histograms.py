"""A server's histogram compared with its clients: agreement within a bucket, and disagreement."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from bench.service.server_histograms import HISTOGRAM, check, parse
from metrics.buckets import REQUEST

DURATIONS = list(np.random.default_rng(1).gamma(4, 0.1, 500))


def exposition(seconds: list[float], outcome: str = "ok", endpoint: str = "/") -> str:
    registry = CollectorRegistry()
    histogram = Histogram(
        HISTOGRAM, "", ("endpoint", "outcome"), registry=registry, buckets=REQUEST
    )
    for value in seconds:
        histogram.labels(endpoint, outcome).observe(value)
    return generate_latest(registry).decode()


def counted(seconds: list[float], before: list[float] | None = None):  # type: ignore[no-untyped-def]
    now = parse(exposition((before or []) + seconds))
    then = parse(exposition(before)) if before else None
    assert now is not None
    return now if then is None else now.since(then)


def test_only_what_was_counted_in_between_matters() -> None:
    found = check(counted(DURATIONS, before=[9.0] * 50), DURATIONS)
    assert found.agrees
    assert found.server_count == 500
    assert found.mean_overhead_ms == pytest.approx(0, abs=0.01)


def test_a_client_may_see_a_little_more() -> None:
    found = check(counted(DURATIONS), [value + 0.004 for value in DURATIONS])
    assert found.agrees
    assert found.mean_overhead_ms == pytest.approx(4)
    assert "+4.0 ms on average outside the server" in found.sentence()
    for quantile in found.quantiles:
        assert quantile.server_low < quantile.client < 1.5 * quantile.server_high


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_another_scale_is_noticed(factor: float) -> None:
    """Milliseconds instead of seconds, a stage instead of the request, the wrong clock."""
    found = check(counted(DURATIONS), [factor * value for value in DURATIONS])
    assert not found.agrees
    assert "the server puts p50 between" in found.sentence()


def test_requests_of_others_are_noticed() -> None:
    found = check(counted([*DURATIONS, 1.0]), DURATIONS)
    assert not found.agrees
    assert "counted 501 successful requests and the clients 500" in found.sentence()
    assert found.mean_overhead_ms is None


def test_without_requests_nothing_is_compared() -> None:
    found = check(counted([], before=[1.0]), [])
    assert found.agrees
    assert (found.client_count, found.server_count, found.quantiles) == (0, 0, ())


def test_other_endpoints_and_outcomes_do_not_count() -> None:
    assert parse(exposition([1.0], outcome="rejected")) is None
    assert parse(exposition([1.0], endpoint="/stream")) is None
    assert parse("") is None


def test_a_restarted_server_is_noticed() -> None:
    now, before = parse(exposition([1.0])), parse(exposition([1.0] * 10))
    assert now is not None
    assert before is not None
    assert not check(now.since(before), [1.0]).agrees
