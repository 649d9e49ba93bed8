"""Many self-hosted servers in about the time of one start.

Most of a start is imports. One process imports everything once and then forks the servers. Tests
call `forked_servers`; run as a program, this file is the process that forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT, ServerProcess, clean_environment, free_port


@dataclass
class Forked:
    """A process that is not a child of this one, with the methods of `Popen` that tests use."""

    pid: int
    returncode: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout_seconds: float) -> None:
        if not self.ended.wait(timeout_seconds):
            raise TimeoutError(f"{self.pid} still runs after {timeout_seconds} s")


@contextmanager
def forked_servers(environments: Sequence[Mapping[str, str]]) -> Iterator[list[ServerProcess]]:
    """`python -m serve` once for each environment, not yet ready; killed when the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        orders = [
            {
                "environment": dict(environment),
                "port": free_port(),
                "output": str(Path(folder) / str(number)),
            }
            for number, environment in enumerate(environments)
        ]
        parent = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked", json.dumps(orders)],
            env=clean_environment({"OMP_NUM_THREADS": "1"}),
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            text=True,
        )
        assert parent.stdout is not None
        processes: list[Forked] = []
        reaper = threading.Thread(target=_note_ends, args=(parent.stdout, processes), daemon=True)
        try:
            processes += [Forked(int(parent.stdout.readline())) for _ in orders]
            reaper.start()
            yield [
                _server(order, process) for order, process in zip(orders, processes, strict=True)
            ]
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
            parent.kill()
            parent.wait()
            reaper.join()
            parent.stdout.close()


def _server(order: Mapping[str, Any], process: Forked) -> ServerProcess:
    url = f"http://127.0.0.1:{order['port']}"
    return ServerProcess(url, process, Path(order["output"]), url + "/metrics")


def _note_ends(lines: Any, processes: list[Forked]) -> None:
    by_pid = {process.pid: process for process in processes}
    for line in lines:
        pid, status = map(int, line.split())
        by_pid[pid].returncode = status
        by_pid[pid].ended.set()


def main() -> None:
    """Import, fork a server for each order, print its pid; then print each end: pid and status."""
    import diffusers  # noqa: F401
    import torch  # noqa: F401

    import serve.model.sdxl
    import serve.server  # noqa: F401

    orders = json.loads(sys.argv[1])
    children = [_fork(order) for order in orders]
    for pid in children:
        print(pid, flush=True)
    for _ in children:
        pid, status = os.wait()
        print(pid, os.waitstatus_to_exitcode(status), flush=True)


def _fork(order: Mapping[str, Any]) -> int:
    if pid := os.fork():
        return pid
    status = 1
    try:
        output = os.open(order["output"], os.O_CREAT | os.O_WRONLY, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(order["environment"])
        from serve.__main__ import main as serve_main

        status = serve_main(["--port", str(order["port"])])
    finally:
        # Exit as the interpreter does, but without returning into the parent's main.
        threading._shutdown()
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
