"""The compared servers' processes: paused, resumed and ended together; and starts that fail."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from bench.errors import BenchError
from bench.peers import servers
from bench.peers.servers import ComparedServer
from bench.service.processes import ROOT, Server, clean_environment, launched

WAIT_SECONDS = 30

# BentoML's worker has a process group of its own, so a signal to the first one's does not reach it.
TWO_PROCESSES = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(100)
"""

# BentoML prints its worker's failure, and starts another.
FAILING_WORKER = """
import time
print("ValueError: no such model")
print("Application startup failed. Exiting.", flush=True)
time.sleep(100)
"""


@contextmanager
def started(code: str) -> Iterator[Server]:
    """A Python program as a server that takes connections, and never answers."""
    with (
        launched([sys.executable, "-c", code], clean_environment()) as (process, output),
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Server("fake", process, time.monotonic(), output, address)


def family(server: Server, count: int) -> list[psutil.Process]:
    """Its processes, once there are so many and each has begun its program."""
    first = psutil.Process(server.process.pid)
    deadline = time.monotonic() + WAIT_SECONDS

    def begun(processes: list[psutil.Process]) -> bool:
        # Until a child has begun its program its parent cannot be stopped: it waits in vfork().
        return all(process.status() != psutil.STATUS_DISK_SLEEP for process in processes)

    while len(found := [first, *first.children(recursive=True)]) < count or not begun(found):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def stopped(processes: list[psutil.Process], expected: bool) -> bool:
    """Whether all are stopped, or none is. A signal takes effect when its process next runs."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if {process.status() == "stopped" for process in processes} == {expected}:
            return True
        time.sleep(0.02)
    return False


def test_all_processes_are_paused_resumed_and_ended() -> None:
    with started(TWO_PROCESSES) as server:
        processes = family(server, 2)
        compared = ComparedServer(server, servers._Command((), {}), 1)
        compared.pause()
        assert stopped(processes, True)
        compared.resume()
        assert stopped(processes, False)
        compared.pause()
        compared.end()
        assert psutil.wait_procs(processes, timeout=1)[1] == []


def test_what_the_first_process_leaves_behind_is_ended() -> None:
    with started(TWO_PROCESSES) as server:
        processes = family(server, 2)
        compared = ComparedServer(server, servers._Command((), {}), 1)
        compared.pause()
        server.process.kill()
        server.process.wait()
        with pytest.raises(BenchError, match="fake has ended"):
            compared.resume()
        compared.end()
        assert psutil.wait_procs(processes, timeout=1)[1] == []


@pytest.mark.parametrize("code", ["raise ValueError('no such model')", FAILING_WORKER])
def test_a_server_that_cannot_start_says_why(code: str) -> None:
    with started(code) as server, pytest.raises(BenchError, match="ValueError: no such model"):
        servers._wait_until_ready(server, "/ready")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_measurement_leaves_no_server_behind(number: int) -> None:
    command = [sys.executable, "-m", "bench", "peers", "--steps", "2", "--shape", "64x64"]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=clean_environment()
    ) as bench:
        assert bench.stderr is not None
        for line in bench.stderr:
            if "block" in line:  # from now on one of the two is always paused
                break
        everybody = psutil.Process(bench.pid).children(recursive=True)
        assert len(everybody) >= 2
        bench.send_signal(number)
        bench.stderr.read()
        assert bench.wait(60) == 128 + number
        assert psutil.wait_procs(everybody, timeout=1)[1] == []
