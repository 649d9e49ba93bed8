"""Clocks, exact against fakes. The CUDA clock's test on hardware is in tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics.clock import CudaEventClock, HostClock, WallAnchor, make_clock


class Ticker:
    """A monotonic clock that a test moves."""

    def __init__(self, now_ns: int = 1_000_000) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns


class FakeDevice:
    """A stream in order: the test says when the device reaches an event."""

    def __init__(self, host: Ticker, offset_ns: int = 0) -> None:
        self.host = host
        self.offset_ns = offset_ns
        self.lag_ns = 0  # how far the device is behind the host
        self.synchronisations = 0

    def new_event(self) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.happens_ns = -1

    def record(self) -> None:
        self.happens_ns = self.device.host.now_ns + self.device.lag_ns

    def query(self) -> bool:
        return self.device.host.now_ns >= self.happens_ns

    def synchronize(self) -> None:
        self.device.synchronisations += 1
        self.device.host.now_ns = max(self.device.host.now_ns, self.happens_ns)

    def elapsed_time(self, end: FakeEvent) -> float:
        # As in CUDA: a float32 of milliseconds.
        return float(np.float32((end.happens_ns - self.happens_ns) / 1e6))


def test_wall_anchor_is_centred_and_converts() -> None:
    readings = iter([100, 300])
    anchor = WallAnchor.now(unix=lambda: 5_000, monotonic=lambda: next(readings))
    assert anchor.monotonic_ns == 200
    assert anchor.to_unix(250) == 5_050
    assert anchor.to_unix(150) == 4_950


@given(*[st.integers(0, 2**61)] * 4, st.integers(0, 2**61))
def test_a_moment_of_one_anchor_is_moved_to_another(
    unix: int, monotonic: int, other_unix: int, other_monotonic: int, moment: int
) -> None:
    anchor, other = WallAnchor(unix, monotonic), WallAnchor(other_unix, other_monotonic)
    assert other.to_unix(moment) + anchor.ahead_of(other) == anchor.to_unix(moment)
    assert anchor.ahead_of(anchor) == 0


def test_host_marks_happen_at_the_call() -> None:
    ticker = Ticker()
    clock = HostClock(ticker)
    clock.begin()
    first = clock.mark()
    ticker.now_ns += 42
    second = clock.mark()
    assert (first.index, second.index) == (0, 1)
    assert clock.poll(second) == second.enqueued_ns
    assert clock.resolve([second, first]).happened_ns == (1_000_042, 1_000_000)


def test_a_mark_that_has_not_happened_polls_as_none_and_never_blocks() -> None:
    host = Ticker()
    device = FakeDevice(host)
    clock = CudaEventClock(device.new_event, host, preallocate=1)
    clock.begin()
    device.lag_ns = 5_000_000
    before = device.synchronisations
    mark = clock.mark()
    assert clock.poll(mark) is None
    assert device.synchronisations == before
    host.now_ns += 5_000_000
    assert clock.poll(mark) == mark.enqueued_ns + 5_000_000


def test_wait_blocks_until_the_device_reaches_the_mark() -> None:
    host = Ticker()
    device = FakeDevice(host)
    clock = CudaEventClock(device.new_event, host)
    clock.begin()
    device.lag_ns = 7_000_000
    mark = clock.mark()
    clock.wait(mark)
    assert host.now_ns == mark.enqueued_ns + 7_000_000


def test_resolving_places_marks_behind_the_host_and_synchronises_once() -> None:
    host = Ticker()
    device = FakeDevice(host)
    clock = CudaEventClock(device.new_event, host)
    clock.begin()
    device.lag_ns = 30_000_000
    marks = []
    for _ in range(5):
        marks.append(clock.mark())
        host.now_ns += 2_000_000  # the host enqueues in 2 ms what takes the device 40
        device.lag_ns += 38_000_000
    before = device.synchronisations
    resolved = clock.resolve(marks)
    assert device.synchronisations == before + 1
    gaps = np.diff(resolved.happened_ns)
    assert gaps == pytest.approx([40_000_000] * 4, abs=200)
    waited = [ns - m.enqueued_ns for ns, m in zip(resolved.happened_ns, marks, strict=True)]
    assert waited == pytest.approx([30e6 + 38e6 * i for i in range(5)], abs=200)
    assert resolved.error_bound_ns < 1_000
    assert abs(resolved.drift_ns) < 1_000


def test_a_late_host_is_drift_and_not_device_time() -> None:
    host = Ticker()
    device = FakeDevice(host)
    clock = CudaEventClock(device.new_event, host)
    clock.begin()
    first = clock.mark()
    host.now_ns += 10_000_000
    last = clock.mark()
    host.now_ns += 3_000_000  # the host comes back late to ask
    resolved = clock.resolve([first, last])
    assert resolved.drift_ns == pytest.approx(3_000_000, abs=200)
    assert resolved.happened_ns[1] == pytest.approx(last.enqueued_ns, abs=200)


def test_more_marks_than_preallocated_events_are_served() -> None:
    host = Ticker()
    device = FakeDevice(host)
    clock = CudaEventClock(device.new_event, host, preallocate=2)
    clock.begin()
    marks = [clock.mark() for _ in range(10)]
    assert len(clock.resolve(marks).happened_ns) == 10


def test_a_new_run_starts_from_a_new_anchor() -> None:
    host = Ticker()
    device = FakeDevice(host)
    clock = CudaEventClock(device.new_event, host)
    for start_ns in (0, 3_600_000_000_000):  # an hour later a float32 of ms resolves 256 us
        host.now_ns = start_ns + 1_000
        clock.begin()
        mark = clock.mark()
        host.now_ns += 1_000_000
        end = clock.mark()
        happened = clock.resolve([mark, end]).happened_ns
        assert happened[1] - happened[0] == pytest.approx(1_000_000, abs=100)


@given(
    gaps=st.lists(st.integers(1_000, 80_000_000), min_size=2, max_size=101),
    lag=st.integers(0, 100_000_000),
)
def test_the_sum_of_steps_equals_the_loop(gaps: list[int], lag: int) -> None:
    host = Ticker()
    device = FakeDevice(host)
    clock = CudaEventClock(device.new_event, host)
    clock.begin()
    device.lag_ns = lag
    marks = [clock.mark()]
    for gap in gaps:
        host.now_ns += gap
        marks.append(clock.mark())
    happened = clock.resolve(marks).happened_ns
    assert list(happened) == sorted(happened)
    total = happened[-1] - happened[0]
    assert total == pytest.approx(sum(gaps), rel=1e-6, abs=100 * len(gaps))


def test_no_marks_resolve_to_nothing() -> None:
    host = Ticker()
    clock = CudaEventClock(FakeDevice(host).new_event, host)
    clock.begin()
    assert clock.resolve([]).happened_ns == ()


def test_the_device_string_chooses_the_clock() -> None:
    assert make_clock("cpu").name == "host"
