from __future__ import annotations

import pytest

from metrics.clock import CudaEventClock, HostClock, WallAnchor
from metrics.timeline import RequestTimeline, RunTimeline
from tests.metrics.test_clock import FakeDevice, Ticker
from tests.metrics.timings import request_timing


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


def test_lead_is_the_time_a_step_lay_in_the_devices_queue() -> None:
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
    leads = [step.lead_ns / 1e6 for step in run.steps]
    assert leads == pytest.approx([0, 38, 76, 114], abs=0.01)
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


def test_a_device_that_no_longer_answers_does_not_cost_the_timing() -> None:
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
        timeline.finish()  # the pixels were never copied: nobody may take them for good
    run = timeline.finish(failed=True)
    assert run.clock == "host"
    assert run.stages[0].duration_ns == 1_000


def test_waiting_for_a_step_tells_its_duration() -> None:
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
    # Between the run and the image encoding lies 1 ms in the fixture, and nowhere else.
    assert request_timing().unattributed_ns == 1_000_000


def test_a_stepped_system_clock_moves_a_request_as_a_whole() -> None:
    ticker = Ticker()
    timeline = RequestTimeline(WallAnchor(unix_ns=500_000, monotonic_ns=ticker.now_ns), ticker)
    ticker.now_ns += 100
    # Whatever time.time_ns() says now, the request's own anchor stands.
    assert timeline.now_unix_ns() == 500_100
