from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.clock import CudaEventClock, HostClock, WallAnchor
from metrics.records import Failure, RequestTiming, StageTiming
from metrics.timeline import RequestTimeline, RunTimeline
from tests.metrics.test_clock import FakeDevice, Ticker
from tests.metrics.test_spans import assert_nested, emitted, named
from tests.metrics.timings import MS, START_NS, request_timing, run_timing


def run_timeline(clock: HostClock | CudaEventClock, ticker: Ticker) -> RunTimeline:
    anchor = WallAnchor(unix_ns=10_000_000_000, monotonic_ns=ticker.now_ns)
    return RunTimeline(clock, anchor, run_id="r", shape="128x128", guidance=True, monotonic=ticker)


def test_n_steps_need_n_plus_one_marks() -> None:
    ticker = Ticker()
    timeline = run_timeline(HostClock(ticker), ticker)
    with timeline.stage("denoise"):
        ticker.now_ns += 5
        timeline.loop_begins()
        for duration in (100, 200, 300):
            ticker.now_ns += duration
            timeline.step_enqueued()
    run = timeline.finish()
    assert [step.duration_ns for step in run.steps] == [100, 200, 300]
    assert run.steps[0].start_ns == 10_000_000_005
    denoise = run.stage("denoise")
    assert denoise is not None
    assert denoise.duration_ns == 605
    assert run.clock == "host"
    summary = run.step_summary()
    assert summary is not None
    assert (summary.median_ns, summary.slowest_ns, summary.slowest_index) == (200, 300, 2)


def test_queue_time_is_how_long_a_step_waited_in_the_devices_queue() -> None:
    host = Ticker()
    device = FakeDevice(host)
    timeline = run_timeline(CudaEventClock(device.new_event, host), host)
    with timeline.stage("denoise"):
        timeline.loop_begins()
        for _ in range(4):
            host.now_ns += 2_000_000
            device.lag_ns += 38_000_000
            timeline.step_enqueued()
    run = timeline.finish()
    assert run.clock == "cuda"
    waited = [step.gpu_queue_ns / 1e6 for step in run.steps]
    assert waited == pytest.approx([0, 38, 76, 114], abs=0.01)
    assert [step.duration_ns / 1e6 for step in run.steps] == pytest.approx([40] * 4, abs=0.01)


def test_a_failed_run_keeps_the_work_that_ran() -> None:
    ticker = Ticker()
    timeline = run_timeline(HostClock(ticker), ticker)
    with timeline.stage("text_encode"):
        ticker.now_ns += 10

    def denoise_and_fail() -> None:
        with timeline.stage("denoise"):
            timeline.loop_begins()
            ticker.now_ns += 7
            timeline.step_enqueued()
            ticker.now_ns += 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        denoise_and_fail()
    run = timeline.finish()
    assert [stage.name for stage in run.stages] == ["text_encode", "denoise"]
    assert [step.duration_ns for step in run.steps] == [7]
    assert run.stages[1].duration_ns == 10


def test_a_lost_device_does_not_lose_the_timing() -> None:
    host = Ticker()
    device = FakeDevice(host)
    clock = CudaEventClock(device.new_event, host)
    timeline = run_timeline(clock, host)
    with timeline.stage("text_encode"):
        host.now_ns += 1_000

    def broken(_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    clock.resolve = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        timeline.finish()  # the pixels were never copied, so they must not be used
    run = timeline.finish(failed=True)
    assert run.clock == "host"
    assert run.stages[0].duration_ns == 1_000


def test_waiting_for_a_step_returns_its_duration() -> None:
    host = Ticker()
    device = FakeDevice(host)
    timeline = run_timeline(CudaEventClock(device.new_event, host), host)
    timeline.loop_begins()
    device.lag_ns = 9_000_000
    timeline.step_enqueued()
    assert not timeline.step_has_ended(0)
    assert timeline.wait_for_step(0) == pytest.approx(9_000_000, abs=200)
    assert timeline.step_has_ended(0)


def test_request_stages_follow_one_another() -> None:
    ticker = Ticker()
    timeline = RequestTimeline(WallAnchor(1_000, ticker.now_ns), ticker)
    timeline.begin_at_arrival("receive")
    ticker.now_ns += 4
    timeline.begin("queue")  # closes receive
    ticker.now_ns += 6
    timeline.end()
    timeline.end()  # closing twice is nothing
    ticker.now_ns += 1
    with timeline.stage("upload"):
        ticker.now_ns += 2
    timing = timeline.finish(endpoint="/", method="POST", status_code=200, outcome="ok")
    assert [(s.name, s.duration_ns) for s in timing.stages] == [
        ("receive", 4),
        ("queue", 6),
        ("upload", 2),
    ]
    assert timing.duration_ns == 13
    assert timing.unattributed_ns == 1
    assert timeline.stage_ms("queue") == 6e-6
    assert timeline.stage_ms("respond") is None
    assert timeline.elapsed_seconds() == 13e-9


def test_unattributed_time_is_what_nothing_covers() -> None:
    # The fixture has 1 ms between the run and the image encoding, and no other gap.
    assert request_timing().unattributed_ns == 1_000_000


def test_a_stepped_system_clock_moves_a_request_as_a_whole() -> None:
    ticker = Ticker()
    timeline = RequestTimeline(WallAnchor(unix_ns=500_000, monotonic_ns=ticker.now_ns), ticker)
    ticker.now_ns += 100
    # The request's own anchor counts, whatever time.time_ns() returns now.
    assert timeline.now_unix_ns() == 500_100


class Aborted(Exception):
    pass


@dataclass(frozen=True)
class Script:
    """A made-up run: the time of the host and of the device for each piece of work, in us."""

    clock: str
    text_us: tuple[int, int]
    steps_us: tuple[tuple[int, int], ...]
    decode_us: tuple[int, int]
    late_us: int
    """How late the host resolves the marks."""
    fails_after: int | None
    """The piece of work after which the run fails."""


works = st.tuples(st.integers(0, 5_000), st.integers(0, 80_000))
scripts = st.builds(
    Script,
    clock=st.sampled_from(("host", "cuda")),
    text_us=works,
    steps_us=st.lists(works, max_size=12).map(tuple),
    decode_us=works,
    late_us=st.integers(0, 3_000),
    fails_after=st.none() | st.integers(0, 13),
)


def play(script: Script) -> tuple[RequestTiming, list[int]]:
    """The request of a scripted run, and the true time of each of its steps."""
    host = Ticker()
    device = FakeDevice(host)
    clock = HostClock(host)
    if script.clock == "cuda":
        clock = CudaEventClock(device.new_event, host, preallocate=4)  # type: ignore[assignment]
    request = RequestTimeline(WallAnchor(10_000_000_000, host.now_ns), host)
    request.begin_at_arrival("receive")
    host.now_ns += 700
    request.begin("queue")
    host.now_ns += 1_000
    request.end()
    run = RunTimeline(clock, request.anchor, run_id="r", shape="s", guidance=True, monotonic=host)
    free_ns = host.now_ns
    truth: list[int] = []
    left = script.fails_after

    def work(taken_us: tuple[int, int]) -> None:
        nonlocal free_ns, left
        if left == 0:
            raise Aborted
        left = None if left is None else left - 1
        host.now_ns += taken_us[0] * 1_000
        free_ns = max(free_ns, host.now_ns) + taken_us[1] * 1_000
        if script.clock == "host":
            host.now_ns = free_ns
        device.lag_ns = free_ns - host.now_ns

    failed = False
    try:
        with run.stage("text_encode"):
            work(script.text_us)
        with run.stage("denoise"):
            run.loop_begins()
            before_ns = host.now_ns + device.lag_ns
            for index, taken_us in enumerate(script.steps_us):
                work(taken_us)
                run.step_enqueued()
                truth.append(free_ns - before_ns)
                before_ns = free_ns
                if index >= 2:
                    run.wait_for_step(index - 2)
                    device.lag_ns = max(0, free_ns - host.now_ns)
        with run.stage("vae_decode"):
            work(script.decode_us)
    except Aborted:
        failed = True
    device.lag_ns = max(0, free_ns - host.now_ns)
    host.now_ns = max(host.now_ns, free_ns) + script.late_us * 1_000
    timing = run.finish(failed=failed)
    failure = None
    if failed:
        failure = Failure("internal", "Aborted", "aborted", timing.stages[-1].end_ns)
    else:
        with request.stage("image_encode"):
            host.now_ns += 500
    with request.stage("respond"):
        host.now_ns += 500
    finished = request.finish(
        endpoint="/",
        method="POST",
        status_code=500 if failed else 200,
        outcome="error" if failed else "ok",
        runs=(timing,),
        failure=failure,
    )
    return finished, truth


def assert_true(script: Script) -> None:
    request, truth = play(script)
    assert request.run is not None
    run = request.run
    # A float32 of milliseconds resolves to 10 ns at the longest step.
    assert [step.duration_ns for step in run.steps] == pytest.approx(truth, abs=20)
    for earlier, later in pairwise(run.steps):
        assert earlier.end_ns == later.start_ns
    assert all(step.gpu_queue_ns >= 0 for step in run.steps)
    spans = emitted(request)
    assert_nested(spans)
    assert sum(span.name == "denoise_step" for span in spans) == len(truth)
    # The clamping is at most the clock's error bound, at each end of a span.
    cut_ns = dict(named(spans, "inference").attributes or {})["inference.clamped_us"] * 1e3  # type: ignore[operator]
    assert cut_ns <= (run.error_bound_ns + 200) * 2 * len(spans)


@given(scripts)
@settings(max_examples=200, deadline=None)
def test_the_record_of_any_run_is_true_on_either_clock(script: Script) -> None:
    assert_true(script)


@pytest.mark.slow
@given(scripts)
@settings(max_examples=10_000, deadline=None)
def test_the_records_of_many_runs_are_true(script: Script) -> None:
    assert_true(script)


@pytest.mark.parametrize("clock", ["host", "cuda"])
def test_the_sum_of_steps_is_the_loops_wall_time(clock: str) -> None:
    script = Script(clock, (200, 9_000), ((2_000, 40_000),) * 12, (300, 30_000), 0, None)
    request, truth = play(script)
    assert request.run is not None
    total = sum(step.duration_ns for step in request.run.steps)
    assert total == pytest.approx(sum(truth), rel=1e-6)
    denoise = request.run.stage("denoise")
    assert denoise is not None
    assert total == pytest.approx(denoise.duration_ns, rel=0.01)


def test_a_run_that_is_moved_keeps_every_duration() -> None:
    run = replace(run_timing(START_NS), between_steps=(StageTiming("preview_decode", 5, 7),))
    moved = run.moved(-10 * MS)
    assert run.moved(0) is run
    assert moved.moved(10 * MS) == run
    for one, other in zip(
        (run, *run.stages, *run.steps, *run.between_steps),
        (moved, *moved.stages, *moved.steps, *moved.between_steps),
        strict=True,
    ):
        assert (other.start_ns, other.end_ns) == (one.start_ns - 10 * MS, one.end_ns - 10 * MS)
