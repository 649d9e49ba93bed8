"""Why a request was slow: the condition of each reason, and which comes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from metrics.clock import CudaEventClock, HostClock, WallAnchor
from metrics.records import GpuConditions, RequestTiming, RunTiming, StageTiming, StepTiming
from metrics.slow_reason import SLOW_REASONS, slow_reason
from metrics.timeline import RunTimeline
from tests.metrics.test_clock import FakeDevice, Ticker
from tests.metrics.timings import MS, request_timing

STEPS = 12
STEP_MS = 40


def run_on(clock: str = "cuda", enqueue_ms: Callable[[int], float] = lambda _: 2) -> RunTiming:
    """A run of steps of 40 ms on a device, whose host takes `enqueue_ms(index)` to enqueue each and
    waits for the step before the last, as the service does."""
    host = Ticker()
    device = FakeDevice(host)
    free_ns = host.now_ns
    made = CudaEventClock(device.new_event, host) if clock == "cuda" else HostClock(host)
    anchor = WallAnchor(10_000_000_000, host.now_ns)
    timeline = RunTimeline(made, anchor, run_id="r", shape="s", guidance=True, monotonic=host)
    with timeline.stage("denoise"):
        timeline.loop_begins()
        for index in range(STEPS):
            host.now_ns += round(enqueue_ms(index) * MS)
            # The device works in order. It ends a step after the later of two moments, the end of
            # the step before and the enqueueing of the step's last kernel, plus the step's time.
            free_ns = max(free_ns + STEP_MS * MS, host.now_ns)
            device.lag_ns = max(0, free_ns - host.now_ns)
            if clock == "host":
                host.now_ns = free_ns
            timeline.step_enqueued()
            if index >= 2:
                timeline.wait_for_step(index - 2)
        device.lag_ns = max(0, free_ns - host.now_ns)
    return timeline.finish()


def request_of(run: RunTiming | None, **stage_ms: float) -> RequestTiming:
    stages = tuple(
        StageTiming(name, 0, round(stage_ms.get(name, 1) * MS))
        for name in ("receive", "queue", "image_encode", "upload", "respond")
    )
    return replace(request_timing(), stages=stages, runs=() if run is None else (run,))


def test_a_gpu_with_a_full_queue_is_no_reason() -> None:
    run = run_on()
    assert min(step.gpu_queue_ns for step in run.steps[2:]) > STEP_MS * MS
    assert slow_reason(request_of(run)) is None
    assert slow_reason(request_timing()) is None


def test_a_host_that_is_slower_than_the_gpu_starves_it() -> None:
    run = run_on(enqueue_ms=lambda _: 55)
    assert slow_reason(request_of(run)) == "host_starved"


def test_one_long_stall_of_the_host_starves_it_too() -> None:
    stalled = run_on(enqueue_ms=lambda index: 300 if index == 6 else 2)
    assert stalled.step_summary().slowest_index == 6  # type: ignore[union-attr]
    assert slow_reason(request_of(stalled)) == "host_starved"


def test_a_step_is_long_compared_with_steps_of_its_guidance() -> None:
    """A step with guidance takes twice the median of a run that has few of them."""
    guided, at, steps = 4, 0, []
    for index in range(STEPS):
        end = at + (STEP_MS if index < guided else STEP_MS // 2 - 4) * MS
        queue_ns = 0 if index == guided else 10 * MS  # the first without guidance had no wait
        steps.append(StepTiming(index, at, end, queue_ns))
        at = end
    run = replace(run_on(), steps=tuple(steps), guided_steps=guided)
    assert slow_reason(request_of(run)) is None
    stalled = replace(steps[guided - 1], end_ns=steps[guided - 1].end_ns + 2 * STEP_MS * MS)
    run = replace(run, steps=(*steps[: guided - 1], stalled, *steps[guided:]))
    assert slow_reason(request_of(run)) == "host_starved"


def test_a_slow_step_with_a_full_queue_is_not_the_hosts_fault() -> None:
    run = run_on()
    at = run.steps[6]
    slow = replace(at, end_ns=at.end_ns + 300 * MS)
    steps = (*run.steps[:6], slow, *run.steps[7:])
    assert slow_reason(request_of(replace(run, steps=steps))) is None


def test_short_runs_and_the_hosts_own_clock_prove_nothing() -> None:
    starved = run_on(enqueue_ms=lambda _: 55)
    assert slow_reason(request_of(replace(starved, steps=starved.steps[:2]))) is None
    assert slow_reason(request_of(run_on("host"))) is None


def test_a_queue_time_within_the_clocks_error_is_none() -> None:
    run = run_on()
    assert slow_reason(request_of(replace(run, error_bound_ns=5 * STEP_MS * MS))) == "host_starved"


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (GpuConditions(), None),
        (GpuConditions(frozenset(), 600, 1980), None),  # slow, but nothing holds it back: idle
        (GpuConditions(frozenset({"power_cap"}), 1900, 1980), None),
        (GpuConditions(frozenset({"power_cap"}), 1500, 1980), "gpu_throttled"),
        (GpuConditions(frozenset({"power_cap"})), None),
        (GpuConditions(frozenset({"thermal"}), 1980, 1980), "gpu_throttled"),
        (GpuConditions(frozenset({"hardware_thermal"})), "gpu_throttled"),
    ],
)
def test_a_throttled_gpu(conditions: GpuConditions, expected: str | None) -> None:
    run = replace(run_on(), conditions=(GpuConditions(), conditions))
    assert slow_reason(request_of(run)) == expected


@pytest.mark.parametrize("name", ["queue", "upload"])
@pytest.mark.parametrize(("milliseconds", "slow"), [(90, False), (230, False), (260, True)])
def test_waiting_and_uploading_count_against_the_run(
    name: str, milliseconds: float, slow: bool
) -> None:
    run = run_on()
    assert 480 <= run.duration_ns / MS <= 500
    reason = slow_reason(request_of(run, **{name: milliseconds}))
    assert reason == (name if slow else None)


def test_beside_a_short_run_a_tenth_of_a_second_is_needed() -> None:
    run = replace(run_on(), start_ns=0, end_ns=20 * MS)
    assert slow_reason(request_of(run, queue=99)) is None
    assert slow_reason(request_of(run, queue=101)) == "queue"


def test_a_request_that_only_waited() -> None:
    assert slow_reason(request_of(None, queue=101)) == "queue"
    assert slow_reason(request_of(None, queue=1)) is None


def test_what_took_longer_comes_first_and_causes_before_symptoms() -> None:
    hot = GpuConditions(frozenset({"thermal"}))
    starved = run_on(enqueue_ms=lambda _: 55)
    ill: dict[str, Any] = {"conditions": (hot,), "eager_fallback": True}
    run = replace(starved, **ill)
    assert slow_reason(request_of(run, queue=600, upload=500)) == "queue"
    assert slow_reason(request_of(run, queue=500, upload=600)) == "upload"
    assert slow_reason(request_of(run)) == "eager_fallback"
    assert slow_reason(request_of(replace(run, eager_fallback=False))) == "gpu_throttled"
    assert slow_reason(request_of(starved)) == "host_starved"


def test_the_reasons_are_a_closed_set() -> None:
    assert set(SLOW_REASONS) == {
        "queue",
        "host_starved",
        "gpu_throttled",
        "eager_fallback",
        "upload",
    }
