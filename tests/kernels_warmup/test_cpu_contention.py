"""How CPU threads wait: they spin while there is room and sleep while others need the cores."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.service.busy import endless_loops
from kernels_warmup import cpu_contention
from kernels_warmup.cpu_contention import (
    CALM_MEASUREMENTS,
    ComputingThreads,
    CpuContention,
    Judge,
    SleepingTeam,
    Usage,
    cores_used_by_others,
    read_usage,
)
from kernels_warmup.cpu_threads import CpuThreads, cpus_allowed

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_measurement_leaves_our_own_time_out() -> None:
    before = Usage(at=10.0, idle=100.0, own=5.0)
    # Half a second on two CPUs: 0.2 s of them idle, 0.5 s ours, and so 0.3 s of others.
    after = Usage(at=10.5, idle=100.2, own=5.5)
    assert cores_used_by_others(before, after, cpus=2) == pytest.approx(0.6)
    assert cores_used_by_others(before, Usage(10.5, 101.0, 5.1), cpus=2) == 0.0


def test_only_the_cpus_that_are_ours_are_read(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9999 999 9 9 9 9 9\n"
        "cpu0 9 9 9 1000 10 9 9 9 9 9\ncpu1 9 9 9 2000 20 9 9 9 9 9\ncpu10 9 9 9 50 5 9 9 9 9 9\n"
        "intr 1 2 3\n"
    )
    second = os.sysconf("SC_CLK_TCK")
    for cpus, ticks in (({0}, 1010), ({1}, 2020), ({0, 10}, 1065)):
        usage = read_usage(cpus, stat)
        assert usage is not None
        assert usage.idle == pytest.approx(ticks / second)
    assert read_usage({0, 7}, stat) is None
    assert read_usage({0}, tmp_path / "none") is None


def test_threads_yield_at_once_and_spin_again_after_a_while() -> None:
    judge = Judge(cpus=2, threads=2)
    assert not judge.judge(0.1)
    assert judge.judge(1.0)
    for _ in range(CALM_MEASUREMENTS - 1):
        assert judge.judge(0.0)
    assert judge.judge(0.3)  # not calm: counted from the start
    for _ in range(CALM_MEASUREMENTS - 1):
        assert judge.judge(0.0)
    assert not judge.judge(0.0)


def test_what_others_leave_free_is_no_contention() -> None:
    judge = Judge(cpus=8, threads=4)
    assert not judge.judge(4.0)
    assert judge.judge(5.0)
    assert [judge.free_cpus(others) for others in (0.9, 1.2, 2.0, 8.0)] == [7, 7, 6, 0]
    assert [Judge(2, 2).free_cpus(others) for others in (1.0, 1.5, 2.0)] == [1, 0, 0]


@on_linux
def test_a_sleeping_team_makes_the_others_wait_by_sleeping() -> None:
    """In a process of its own: CPU time that a thread spends on waiting for another."""
    code = """
import ctypes, sys, time
import torch
from kernels_warmup.cpu_contention import SleepingTeam, _libgomp
from kernels_warmup.cpu_threads import cpus_allowed
gomp = _libgomp()
wait = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
    # One of two threads sleeps; the other waits for it at the region's end.
    lambda _: time.sleep(0.006) if gomp.omp_get_thread_num() else None
)
def spent():
    before = time.process_time()
    for _ in range(20):
        gomp.GOMP_parallel(wait, None, 2, 0)
    return time.process_time() - before
spent()
spinning = spent()
team = SleepingTeam(len(cpus_allowed()) + 1)
time.sleep(0.2)
sleeping = spent()
team.release()
time.sleep(0.2)
print(spinning, sleeping, spent())
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    spinning, sleeping, after = map(float, ended.stdout.split())
    assert sleeping < spinning / 3
    assert after > 3 * sleeping


@on_linux
def test_it_changes_with_what_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real threads, with the measurement made up."""
    torch.ones(8).sum()  # libgomp is loaded
    others = 0.0
    monkeypatch.setattr(cpu_contention, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(cpu_contention, "cores_used_by_others", lambda *_: others)
    before = os.sched_getaffinity(0)
    owner, stop = _idle_thread()
    watch = CpuContention(len(before), owner)
    try:
        time.sleep(0.1)
        assert not watch.yielding
        others = 1.0
        _until(lambda: watch.yielding)
        if len(before) > 1:
            _until(lambda: os.sched_getaffinity(owner) == set(sorted(before)[:-1]))
        others = float(len(before))
        _until(lambda: os.sched_getaffinity(owner) == before)
        assert watch.yielding
        others = 0.0
        _until(lambda: not watch.yielding)
        others = 1.0
        _until(lambda: watch.yielding)
    finally:
        watch.close()
        stop.set()
    assert not watch.yielding
    # Threads that do not compute run where they always could.
    assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(owner) == before


@on_linux
def test_an_endless_loop_is_noticed() -> None:
    cpus = cpus_allowed()
    with endless_loops(1):
        before = read_usage(cpus)
        time.sleep(0.5)
        after = read_usage(cpus)
    assert before is not None
    assert after is not None
    # Others' tests may use the other cores meanwhile, and this loop's in part.
    assert cores_used_by_others(before, after, len(cpus)) > 0.6


@pytest.mark.parametrize(
    ("device", "threads", "set_by_user", "watched"),
    [
        ("cpu", 2, {}, True),
        ("cpu", 1, {}, False),
        ("cuda:0", 2, {}, False),
        ("cpu", 2, {"OMP_WAIT_POLICY": "PASSIVE"}, False),
        ("cpu", 2, {"GOMP_SPINCOUNT": "10"}, False),
        ("cpu", 2, {"OMP_PROC_BIND": "true"}, False),
        ("cpu", 2, {"OMP_NUM_THREADS": "2"}, True),
    ],
)
@on_linux
def test_only_threads_that_are_ours_are_watched(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    threads: int,
    set_by_user: dict[str, str],
    watched: bool,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    computing = ComputingThreads(CpuThreads(2, 2, None, set_by_user))
    try:
        computing.loaded(device, threading.get_native_id())
        said = computing.describe()
    finally:
        computing.close()
    assert (said["waiting"] != "as OpenMP does") == watched
    assert said["threads"] == threads
    assert said["set_by_user"] == set_by_user


@on_linux
def test_another_openmp_runtime_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> ctypes.CDLL:
        raise OSError("libgomp is not loaded")

    monkeypatch.setattr(cpu_contention, "_libgomp", none)
    with pytest.raises(OSError, match="libgomp"):
        SleepingTeam(2)
    monkeypatch.setattr(cpu_contention, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(cpu_contention, "cores_used_by_others", lambda *_: 2.0)
    watch = CpuContention(2, threading.get_native_id())
    watch._thread.join(5)
    assert not watch.yielding
    watch.close()


def _idle_thread() -> tuple[int, threading.Event]:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, daemon=True)
    thread.start()
    assert thread.native_id is not None
    return thread.native_id, stop


def _until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
