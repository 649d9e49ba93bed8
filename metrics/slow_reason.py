"""Why a request was slow: one word, decided here and nowhere else.

What lay around the run comes first, for it is known to the millisecond: a wait or an upload that
took at least half as long again as the work itself. Then what ails the run, causes before symptoms:
eager code starves the GPU of work, and a throttled GPU is never starved.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, get_args

from metrics.records import GpuConditions, RequestTiming, RunTiming, StepTiming

SlowReason = Literal["queue", "host_starved", "gpu_throttled", "eager_fallback", "upload"]
SLOW_REASONS: tuple[SlowReason, ...] = get_args(SlowReason)

# A request that spent this share of its run's time on waiting or uploading took half as long again
# as it had to. Two requests that alternate on one GPU wait less than that for each other.
OUTSIDE_SHARE = 0.5
# Below a tenth of a second nobody notices, whatever the share: a small model's run is shorter.
OUTSIDE_FLOOR_NS = 100_000_000

# The host is ahead by one to two steps where the GPU is kept busy. A tenth of a step is far below
# the jitter of that, and well above zero, what an idle GPU shows.
STARVED_QUEUE_SHARE = 0.1
# Most boundaries between steps without work in the queue: the host is the bottleneck throughout.
STARVED_STEPS_SHARE = 0.5
# One step that took twice the median, at whose end nothing was queued: the host was held up in it.
STALL_RATIO = 2.0
# The first two boundaries prove nothing: the host has only begun to get ahead.
FILLING_STEPS = 2

# Protection against heat and failing power is a fault at any clock. A power cap is the everyday
# life of a busy GPU; where it costs a fifth of the clock it costs about a fifth of the speed.
FAULTS = frozenset({"hardware_slowdown", "thermal", "hardware_thermal", "power_brake"})
THROTTLED_CLOCK_SHARE = 0.8


def slow_reason(request: RequestTiming) -> SlowReason | None:
    """The reason, or None where there is none of these."""
    run = request.run
    # Without a run nothing was done but waiting; failing at once is not slow.
    enough_ns = OUTSIDE_FLOOR_NS
    if run is not None:
        enough_ns = max(enough_ns, round(OUTSIDE_SHARE * run.duration_ns))
    queue_ns, upload_ns = _stage_ns(request, "queue"), _stage_ns(request, "upload")
    if max(queue_ns, upload_ns) >= enough_ns:
        return "queue" if queue_ns >= upload_ns else "upload"
    if run is None:
        return None
    if run.eager_fallback:
        return "eager_fallback"
    if any(_throttled(seen) for seen in run.conditions):
        return "gpu_throttled"
    if _host_starved(run):
        return "host_starved"
    return None


def _stage_ns(request: RequestTiming, name: str) -> int:
    stage = request.stage(name)
    return 0 if stage is None else stage.duration_ns


def _throttled(seen: GpuConditions) -> bool:
    if seen.throttle & FAULTS:
        return True
    slowed = (
        seen.sm_clock_mhz is not None
        and seen.max_sm_clock_mhz is not None
        and seen.sm_clock_mhz < THROTTLED_CLOCK_SHARE * seen.max_sm_clock_mhz
    )
    return bool(seen.throttle) and slowed


def _host_starved(run: RunTiming) -> bool:
    """Whether the GPU waited for the host. The host's own clock cannot tell: there a step begins
    when it is enqueued."""
    steps = run.steps
    if run.clock == "host" or len(steps) <= FILLING_STEPS:
        return False
    median_ns = statistics.median(step.duration_ns for step in steps)
    # A queue time within the error of the clock may be none at all.
    near_zero_ns = max(STARVED_QUEUE_SHARE * median_ns, run.error_bound_ns)
    starved = [step.gpu_queue_ns <= near_zero_ns for step in steps[FILLING_STEPS:]]
    if sum(starved) >= math.ceil(STARVED_STEPS_SHARE * len(starved)):
        return True
    return _stalled_once(steps, median_ns, near_zero_ns)


def _stalled_once(steps: Sequence[StepTiming], median_ns: float, near_zero_ns: float) -> bool:
    # A host held up in the middle of a step enqueues its end, the start of the next, too late.
    return any(
        step.duration_ns >= STALL_RATIO * median_ns and after.gpu_queue_ns <= near_zero_ns
        for step, after in zip(steps[FILLING_STEPS:], steps[FILLING_STEPS + 1 :], strict=False)
    )
