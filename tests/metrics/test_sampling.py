"""Head and tail sampling, and the weights of exported traces."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from metrics.records import Failure
from metrics.sampling import KeepRules, TokenBucket, TraceIdentity, TraceSampling
from tests.metrics.timings import START_NS, request_timing

FAILED = Failure("internal", "E", "m", START_NS)
REFUSED = Failure("queue_full", "QueueFull", "full", START_NS, server_fault=False)


class Seconds:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def caller(sampled: bool, tracestate: str = "") -> SpanContext:
    return SpanContext(
        trace_id=0xABC,
        span_id=0xDEF,
        is_remote=True,
        trace_flags=TraceFlags(1 if sampled else 0),
        trace_state=TraceState.from_header([tracestate]),
    )


def decided(sampling: TraceSampling, parent: SpanContext | None = None) -> TraceIdentity:
    return sampling.decide_at_start(
        random.getrandbits(128) or 1, random.getrandbits(64) or 1, parent
    )


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (KeepRules(), None),
        (KeepRules(slow_seconds=0.05), "slow"),
        (KeepRules(slow_seconds=0.052), None),  # it takes 51 ms
        (KeepRules(slow_step_ms=11.9), "slow_step"),
        (KeepRules(slow_step_ms=12), None),  # its slowest step takes 12 ms
    ],
)
def test_slow_is_slower_than_the_limit(rules: KeepRules, expected: str | None) -> None:
    request = request_timing()
    assert request.duration_ns == 51_000_000
    assert rules.reason(request) == expected


def test_a_failure_is_kept_and_a_refusal_is_not() -> None:
    assert KeepRules().reason(request_timing(failure=FAILED)) == "failed"
    assert KeepRules().reason(request_timing(failure=REFUSED)) is None
    assert KeepRules(slow_step_ms=1).reason(replace(request_timing(), runs=())) is None


def test_a_request_with_a_keep_reason_is_kept_despite_the_ratio() -> None:
    sampling = TraceSampling(0.0, keep=KeepRules())
    identity = decided(sampling)
    assert not identity.exported
    assert not sampling.decide_at_end(identity, keep=False).exported
    kept = sampling.decide_at_end(identity, keep=True)
    assert kept == replace(identity, exported=True, probability=1.0)


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("sampled", [True, False])
def test_a_trusted_callers_decision_is_followed(rate: float, sampled: bool) -> None:
    sampling = TraceSampling(rate, keep=KeepRules())
    identity = decided(sampling, caller(sampled))
    assert identity.exported == sampled
    assert (identity.trace_id, identity.parent) == (0xABC, caller(sampled))
    assert sampling.decide_at_end(identity, keep=True).exported == sampled


def test_a_sampler_that_is_not_parent_based_decides_by_itself() -> None:
    identity = decided(TraceSampling(1.0, parent_based=False), caller(sampled=False))
    assert identity.exported
    assert identity.trace_id == 0xABC
    assert not decided(TraceSampling(0.0, parent_based=False), caller(sampled=True)).exported


@pytest.mark.parametrize("sampled", [True, False])
def test_a_caller_that_is_not_trusted_decides_nothing(sampled: bool) -> None:
    sampling = TraceSampling(0.0, trust_parent=False, keep=KeepRules())
    identity = decided(sampling, caller(sampled))
    assert identity.trace_id != 0xABC
    assert identity.parent is None
    assert identity.caller == caller(sampled)
    assert not identity.exported
    assert sampling.decide_at_end(identity, keep=True).exported


@pytest.mark.parametrize(
    ("tracestate", "probability"),
    [
        ("", 1.0),
        ("vendor=1", 1.0),
        ("ot=th:0", 1.0),
        ("ot=th:8", 0.5),
        ("ot=rv:abcdef01234567;th:c", 0.25),
        ("ot=th:fd70a3d70a3d71", 0.01),
        ("ot=th:xyz", 1.0),
        ("ot=th:0123456789abcdef", 1.0),
        ("ot=th:", 1.0),
        ("ot=th:-1", 1.0),
        ("ot=th:1_0", 1.0),
        ("ot=th:C", 1.0),
    ],
)
def test_a_callers_own_probability_is_carried_on(tracestate: str, probability: float) -> None:
    identity = decided(TraceSampling(0.3), caller(True, tracestate))
    assert identity.probability == pytest.approx(probability)


def test_the_smallest_probability_of_a_caller_is_not_zero() -> None:
    identity = decided(TraceSampling(), caller(True, "ot=th:ffffffffffffff"))
    assert identity.probability == 2**-56


def test_the_bucket_bounds_what_an_incident_keeps() -> None:
    clock = Seconds()
    sampling = TraceSampling(0.0, keep=KeepRules(), bucket=TokenBucket(3, 0.5, clock))

    def kept(count: int) -> int:
        return sum(sampling.decide_at_end(decided(sampling), True).exported for _ in range(count))

    assert kept(10) == 3
    clock.now += 2
    assert kept(10) == 1
    clock.now += 1
    assert kept(10) == 0
    clock.now += 1
    assert kept(10) == 1
    clock.now += 3600
    assert kept(10) == 3


def test_a_trace_that_the_ratio_chose_costs_no_token() -> None:
    sampling = TraceSampling(1.0, keep=KeepRules(), bucket=TokenBucket(1, 0, Seconds()))
    for _ in range(5):
        identity = decided(sampling)
        settled = sampling.decide_at_end(identity, keep=True)
        assert settled == identity
    assert settled.probability == 1.0


def test_without_a_token_the_ratios_decision_and_weight_hold() -> None:
    sampling = TraceSampling(0.5, keep=KeepRules(), bucket=TokenBucket(0, 0, Seconds()))
    identity = decided(sampling)
    assert sampling.decide_at_end(identity, keep=True) == identity
    assert identity.probability == 0.5


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.25, 1.0])
def test_the_ratio_holds(rate: float) -> None:
    sampling = TraceSampling(rate)
    count = 20_000
    chosen = sum(decided(sampling).exported for _ in range(count))
    assert chosen / count == pytest.approx(rate, abs=5 * (rate * (1 - rate) / count) ** 0.5)


@pytest.mark.parametrize("tokens", [0, 200, 10**9])
def test_weights_add_up_over_any_mix(tokens: int) -> None:
    """A tenth of the requests failed, and the bucket keeps none, some or all of these."""
    generator = random.Random(7)
    rate, count = 0.2, 20_000
    clock = Seconds()
    sampling = TraceSampling(rate, keep=KeepRules(), bucket=TokenBucket(tokens, 0.05, clock))
    weights = {True: 0.0, False: 0.0}
    truth = {True: 0, False: 0}
    for _ in range(count):
        clock.now += 1
        failed = generator.random() < 0.1
        truth[failed] += 1
        settled = sampling.decide_at_end(decided(sampling), keep=failed)
        if settled.exported:
            weights[failed] += 1 / settled.probability
    for failed, true_count in truth.items():
        # Five standard deviations; each request was exported with the rate's probability or surely.
        deviation = (true_count * (1 - rate) / rate) ** 0.5
        assert weights[failed] == pytest.approx(true_count, abs=5 * deviation)
    if tokens == 10**9:
        assert weights[True] == truth[True]


@given(
    st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=60),
    st.integers(1, 10),
    st.floats(0.01, 5),
)
def test_a_bucket_never_gives_more_than_its_tokens(
    events: list[tuple[float, bool]], burst: int, per_second: float
) -> None:
    clock = Seconds()
    bucket = TokenBucket(burst, per_second, clock)
    taken = 0
    for seconds, wants in events:
        clock.now += seconds
        if wants and bucket.has_token:
            bucket.take()
            taken += 1
    assert taken <= burst + clock.now * per_second + 1e-6
