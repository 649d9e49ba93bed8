"""Servers in about a tenth of the processor time of a start: most of a start is imports.

One process imports everything once and then forks the servers; it ends with the tests. Tests call
`self_hosted`, `fal_local` or `forked_servers`; run as a program, this file is the process that
forks. Code whose own start is tested is started by tests.support.processes.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import queue
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels_warmup.cache.working_directory import remove_process_directory
from tests.support.faults import Faults, install
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

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout_seconds: float) -> None:
        if not self.ended.wait(timeout_seconds):
            raise TimeoutError(f"{self.pid} still runs after {timeout_seconds} s")


class Parent:
    """The process that forks, as seen from here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked"],
            env=clean_environment({"OMP_NUM_THREADS": "1"}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        self._started: queue.Queue[Forked] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def fork(self, order: Mapping[str, Any]) -> Forked:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._started.get(timeout=240)

    def _read(self) -> None:
        running: dict[int, Forked] = {}
        assert self._process.stdout is not None
        for line in self._process.stdout:
            what, pid, status = line.split()
            if what == "started":
                running[int(pid)] = Forked(int(pid))
                self._started.put(running[int(pid)])
            else:
                process = running.pop(int(pid))
                process.returncode = int(status)
                process.ended.set()

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


@functools.cache
def parent() -> Parent:
    """One for all tests of this process."""
    started = Parent()
    atexit.register(started.end)
    return started


@contextmanager
def _running(
    url: str,
    metrics_url: str,
    environment: Mapping[str, str] | None,
    module: str,
    *arguments: str,
    open_files: int | None = None,
    faults: Faults | None = None,
) -> Iterator[ServerProcess]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        output.touch()
        process = parent().fork(
            {
                "environment": dict(environment or {}),
                "output": str(output),
                "module": module,
                "arguments": arguments,
                "open_files": open_files,
                "faults": None if faults is None else faults.as_json(),
            }
        )
        try:
            yield ServerProcess(url, process, output, metrics_url)
        finally:
            process.terminate()
            if not process.ended.wait(20):
                process.send_signal(signal.SIGKILL)
                process.wait(20)


@contextmanager
def program(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """`python -m MODULE ARGUMENTS` of a program that is no server: it has no URL."""
    with _running("", "", environment, module, *arguments) as process:
        yield process


@contextmanager
def self_hosted(
    environment: Mapping[str, str] | None = None,
    open_files: int | None = None,
    port: int | None = None,
    faults: Faults | None = None,
) -> Iterator[ServerProcess]:
    """`python -m serve` on a loopback port, not yet ready.

    Args:
        port: None: a free one.
        open_files: how many files the process may open; None: as many as this one.
        faults: switches faults in it.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = ("serve", "--port", str(port))
    with _running(
        url,
        url + "/metrics",
        environment,
        *command,
        open_files=open_files,
        faults=faults,
    ) as server:
        yield server


@contextmanager
def fal_local(
    environment: Mapping[str, str] | None = None, app: str = "sdxl"
) -> Iterator[ServerProcess]:
    """`fal run --local` of an app of pyproject.toml, on free ports, not yet ready."""
    port, metrics_port = free_port(), free_port()
    # Without the developer's key: with it, images would be uploaded to fal's CDN.
    settings = {"FAL_CONFIG_PATH": os.devnull} | dict(environment or {})
    ports = ["--exposed-port", str(port), "--exposed-metrics-port", str(metrics_port)]
    metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
    command = ("fal", "run", "--local", app, *ports)
    with _running(f"http://127.0.0.1:{port}", metrics_url, settings, *command) as server:
        yield server


@contextmanager
def forked_servers(environments: Sequence[Mapping[str, str]]) -> Iterator[list[ServerProcess]]:
    """A self-hosted server for each environment, not yet ready."""
    with ExitStack() as stack:
        yield [stack.enter_context(self_hosted(environment)) for environment in environments]


def main() -> None:
    """Import, fork a server for each line of standard input, and print each start and each end.

    At the end of the input all that still run are killed.
    """
    import diffusers  # noqa: F401
    import pydantic.v1  # noqa: F401
    import structlog  # noqa: F401
    import torch  # noqa: F401

    import kernels_warmup.compile  # noqa: F401
    import serve.model.sdxl
    import serve.server
    import serve.telemetry.logs  # noqa: F401

    _count_flops()
    gc.freeze()  # else each server's first collection copies the pages of all that is imported
    running: set[int] = set()

    def reap(*_: object) -> None:
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            running.discard(pid)
            _say("ended", pid, os.waitstatus_to_exitcode(status))

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        # A child that ends at once is said to have started first.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if not pid:
            _serve(json.loads(line))
        running.add(pid)
        _say("started", pid, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _count_flops() -> None:
    """Count the demo model's FLOPs, which a process counts once: half of the rest of a start."""
    from kernels_warmup.flops import count_encode, count_run
    from kernels_warmup.shapes import DEMO_SHAPES, CompiledShape
    from serve.model.loading import load_model

    pipeline = load_model("demo", device_name="cpu").pipeline
    for shape in (*DEMO_SHAPES, CompiledShape(64, 64)):
        count_run(pipeline, shape)
        count_encode(pipeline.vae.config, shape)


def _say(what: str, pid: int, status: int) -> None:
    # Unbuffered, for the handler of a signal may interrupt another writer.
    os.write(1, f"{what} {pid} {status}\n".encode())


def _serve(order: Mapping[str, Any]) -> None:
    """`python -m MODULE ARGUMENTS` in this process, which it ends."""
    status: Any = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(order["output"], os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # What the parent's imports have set from its own TMPDIR.
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        tempfile.tempdir = None
        os.environ.update(order["environment"])
        if (files := order["open_files"]) is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        if order["faults"] is not None:
            install(Faults.from_json(order["faults"]))
        sys.argv = [order["module"], *order["arguments"]]
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
        raise  # no further than to the end below
    finally:
        # Exit as the interpreter does, but without returning into the parent's main.
        threading._shutdown()
        remove_process_directory()
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
