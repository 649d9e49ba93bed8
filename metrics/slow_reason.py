"""Why a request was slow: one reason.

Time around the runs is checked first: a wait or an upload of at least half the runs' time. Then
the runs themselves, causes before symptoms: eager code makes the GPU wait for the host, and a
throttled GPU never waits for it.
"""

from __future__ import annotations

import math
import statistics
from typing import Literal, get_args

from metrics.records import GpuConditions, RequestTiming, RunTiming

SlowReason = Literal["queue", "host_starved", "gpu_throttled", "eager_fallback", "upload"]
SLOW_REASONS: tuple[SlowReason, ...] = get_args(SlowReason)

# Waiting or uploading for this share of the run's time makes a request half as long again. Two
# requests that alternate on one GPU wait less than that for each other.
OUTSIDE_SHARE = 0.5
# Less than a tenth of a second does not matter, whatever the share: a small model's run is shorter.
OUTSIDE_FLOOR_NS = 100_000_000

# The host is one to two steps ahead of a busy GPU. A tenth of a step is far below that and well
# above zero, the queue time on an idle GPU.
STARVED_QUEUE_SHARE = 0.1
# If the queue is empty at this share of the boundaries between steps, the host is the bottleneck.
STARVED_STEPS_SHARE = 0.5
# A step of twice the median with an empty queue at its end: the host stalled in it.
STALL_RATIO = 2.0
# The first two boundaries do not count: the host is not ahead yet.
FILLING_STEPS = 2

# Protection against heat or failing power is a fault at any clock. A power cap is normal for a busy
# GPU; if it lowers the clock by a fifth, the speed falls by about a fifth.
FAULT_REASONS = frozenset({"hardware_slowdown", "thermal", "hardware_thermal", "power_brake"})
THROTTLED_CLOCK_SHARE = 0.8


def slow_reason(request: RequestTiming) -> SlowReason | None:
    """The reason, or None if none applies."""
    # Without a run the request only waited; a request that fails at once is not slow.
    enough_ns = max(OUTSIDE_FLOOR_NS, round(OUTSIDE_SHARE * request.runs_ns))
    queue_ns, upload_ns = request.stage_ns("queue") or 0, request.stage_ns("upload") or 0
    if max(queue_ns, upload_ns) >= enough_ns:
        return "queue" if queue_ns >= upload_ns else "upload"
    if any(run.eager_fallback for run in request.runs):
        return "eager_fallback"
    if any(_throttled(reading) for run in request.runs for reading in run.conditions):
        return "gpu_throttled"
    if any(_host_starved(run) for run in request.runs):
        return "host_starved"
    return None


def _throttled(reading: GpuConditions) -> bool:
    if reading.throttle & FAULT_REASONS:
        return True
    slowed = (
        reading.sm_clock_mhz is not None
        and reading.max_sm_clock_mhz is not None
        and reading.sm_clock_mhz < THROTTLED_CLOCK_SHARE * reading.max_sm_clock_mhz
    )
    return bool(reading.throttle) and slowed


def _host_starved(run: RunTiming) -> bool:
    """Whether the GPU waited for the host. The host's clock cannot show it: there a step starts
    when it is enqueued."""
    steps = run.steps
    if run.clock == "host" or len(steps) <= FILLING_STEPS:
        return False
    # A step without guidance takes half as long: each is compared with its own kind.
    medians_ns = {
        guidance: statistics.median(step.duration_ns for step in of_kind)
        for guidance, of_kind in run.steps_by_guidance.items()
    }
    # A queue time within the clock's error may be zero.
    near_zero_ns = max(STARVED_QUEUE_SHARE * min(medians_ns.values()), run.error_bound_ns)
    starved = [step.gpu_queue_ns <= near_zero_ns for step in steps[FILLING_STEPS:]]
    if sum(starved) >= math.ceil(STARVED_STEPS_SHARE * len(starved)):
        return True
    # A host that stalls during a step enqueues the next step too late.
    return any(
        step.duration_ns >= STALL_RATIO * medians_ns[run.has_guidance(step)]
        and after.gpu_queue_ns <= near_zero_ns
        for step, after in zip(steps[FILLING_STEPS:], steps[FILLING_STEPS + 1 :], strict=False)
    )
