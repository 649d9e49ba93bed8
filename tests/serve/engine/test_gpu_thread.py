from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest

from metrics.clock import Clock, CudaEventClock, HostClock, WallAnchor
from metrics.timeline import RunTimeline
from serve.engine.cancellation import Cancellation
from serve.engine.gpu_thread import STEPS_AHEAD, GpuThread, StepPacer
from serve.errors import ClientGone
from tests.metrics.test_clock import FakeDevice, Ticker


def test_work_runs_in_order_on_one_thread() -> None:
    gpu = GpuThread()
    futures = [gpu.submit(lambda i=i: (i, threading.get_ident())) for i in range(20)]  # type: ignore[misc]
    results = [future.result(5) for future in futures]
    assert [index for index, _ in results] == list(range(20))
    assert len({ident for _, ident in results}) == 1
    assert gpu.stop(5)


def test_a_failure_reaches_its_future_and_the_thread_goes_on() -> None:
    gpu = GpuThread()
    failing = gpu.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(5)
    assert gpu.submit(lambda: 7).result(5) == 7
    gpu.stop(5)


def test_waiting_work_can_be_cancelled() -> None:
    gpu = GpuThread()
    release = threading.Event()
    running = gpu.submit(lambda: release.wait(5))
    waiting = gpu.submit(lambda: pytest.fail("ran after it was cancelled"))
    assert waiting.cancel()
    release.set()
    assert running.result(5)
    assert gpu.stop(5)


def test_silence_is_measured_while_work_runs_and_not_at_rest() -> None:
    now = [0.0]
    gpu = GpuThread(monotonic=lambda: now[0])
    started, release = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait(5)

    future = gpu.submit(work)
    started.wait(5)
    now[0] = 100.0
    assert gpu.silent_seconds() == 100.0
    gpu.sign_of_life()
    assert gpu.silent_seconds() == 0.0
    assert not gpu.stop(0)  # it still runs
    release.set()
    future.result(5)
    assert gpu.stop(5)
    assert gpu.silent_seconds() == 0.0


def test_work_that_may_be_silent_does_not_count_as_hung() -> None:
    now = [0.0]
    gpu = GpuThread(monotonic=lambda: now[0])
    for may_be_silent, silent_seconds in ((True, 0.0), (False, 100.0)):
        started, release = threading.Event(), threading.Event()

        def work(started: threading.Event = started, release: threading.Event = release) -> None:
            gpu.sign_of_life()
            started.set()
            release.wait(5)

        future = gpu.submit(work, may_be_silent=may_be_silent)
        assert started.wait(5)
        now[0] += 100.0
        assert gpu.silent_seconds() == silent_seconds
        release.set()
        future.result(5)
    assert gpu.stop(5)


class PacedRun:
    """A pacer over a fake device on which every step takes 40 ms and enqueueing 1 ms."""

    def __init__(self) -> None:
        self.host = Ticker()
        self.device = FakeDevice(self.host)
        self.cancellation = Cancellation()
        self.reported: list[int] = []
        self.told_at_ns: list[int] = []
        self.life = 0
        anchor = WallAnchor(0, self.host.now_ns)
        self.timeline = RunTimeline(
            CudaEventClock(self.device.new_event, self.host),
            anchor,
            run_id="r",
            shape="s",
            guidance=True,
            monotonic=self.host,
        )
        self.pacer = StepPacer(self.timeline, self.cancellation, self.on_step, self.on_sign_of_life)
        self.timeline.loop_begins()
        self.device_free_ns = self.host.now_ns

    def on_step(self, index: int, _duration_ns: int) -> None:
        self.reported.append(index)
        self.told_at_ns.append(self.host.now_ns)

    def on_sign_of_life(self) -> None:
        self.life += 1

    def step(self) -> None:
        self.host.now_ns += 1_000_000
        self.device_free_ns = max(self.device_free_ns, self.host.now_ns) + 40_000_000
        self.device.lag_ns = self.device_free_ns - self.host.now_ns
        self.pacer.step_enqueued()


def test_the_host_is_never_more_than_two_steps_ahead() -> None:
    run = PacedRun()
    for index in range(30):
        run.step()
        ahead_ns = run.device_free_ns - run.host.now_ns
        assert ahead_ns <= STEPS_AHEAD * 40_000_000
        if index >= STEPS_AHEAD:
            assert ahead_ns >= 40_000_000  # and the device is never starved
    assert run.reported == list(range(30 - STEPS_AHEAD))
    run.pacer.drain()
    assert run.reported == list(range(30))
    assert run.life == 30


def test_steps_are_reported_as_they_end_and_not_in_a_burst() -> None:
    run = PacedRun()
    for _ in range(10):
        run.step()
    run.pacer.drain()
    gaps = [b - a for a, b in zip(run.told_at_ns, run.told_at_ns[1:], strict=False)]
    assert min(gaps) >= 38_000_000


def test_a_cancelled_run_stops_within_two_steps() -> None:
    run = PacedRun()
    for _ in range(5):
        run.step()
    run.cancellation.cancel(ClientGone())
    with pytest.raises(ClientGone):
        run.step()
    assert run.device_free_ns - run.host.now_ns <= STEPS_AHEAD * 40_000_000


class FreeDevice:
    """Events that cost nothing, so that only our own code is timed."""

    def record(self) -> None:
        self.at_ns = time.perf_counter_ns()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FreeDevice) -> float:
        return 1.0


@pytest.mark.parametrize("clock", [HostClock, lambda: CudaEventClock(FreeDevice)])
def test_a_step_costs_its_thread_microseconds(clock: Callable[[], Clock]) -> None:
    """Everything that is done for telemetry between two steps: mark, wait, tell. What the driver
    takes to record an event is measured on hardware, in tests/gpu."""
    best_us = math.inf
    for _ in range(20):  # the fastest of many, because other processes only slow it down
        timeline = RunTimeline(clock(), WallAnchor.now(), run_id="r", shape="s", guidance=True)
        pacer = StepPacer(timeline, Cancellation(), lambda *_: None, lambda: None)
        timeline.loop_begins()
        start = time.perf_counter_ns()
        for _ in range(100):
            pacer.step_enqueued()
        best_us = min(best_us, (time.perf_counter_ns() - start) / 100 / 1e3)
    print(f"\na step: {best_us:.1f} us")
    assert best_us < 50
