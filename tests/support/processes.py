"""The service's servers as real processes on loopback, started and ended by tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from bench.service import processes
from bench.service.processes import ROOT, free_port, launched
from kernels_warmup.cache.working_directory import CODE_FOLDERS

if TYPE_CHECKING:
    from tests.support.forked import Forked

__all__ = [
    "READY_SECONDS",
    "ROOT",
    "ServerProcess",
    "clean_environment",
    "fal_local",
    "free_port",
    "read",
    "running",
    "self_hosted",
]

READY_SECONDS = 90.0


def read(url: str) -> str:
    """What `url` answers, for loops that ask often: no certificates are read, which takes 24 ms."""
    return httpx.get(url, timeout=60, verify=False).text


@dataclass
class ServerProcess:
    """A running server: its URL, its process, and the file of its output."""

    url: str
    process: subprocess.Popen[bytes] | Forked
    output_path: Path
    metrics_url: str

    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def wait_until_ready(self, timeout_seconds: float = READY_SECONDS) -> float:
        """Wait until `/ready` returns 200; returns the seconds that it took."""
        start = time.monotonic()
        with httpx.Client(timeout=5) as client:  # making one takes longer than a request
            while time.monotonic() - start < timeout_seconds:
                if self.process.poll() is not None:
                    raise AssertionError(f"exited {self.process.returncode}:\n{self.output()}")
                try:
                    if client.get(self.url + "/ready").status_code == 200:
                        return time.monotonic() - start
                except httpx.TransportError:
                    pass
                time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_seconds} s:\n{self.output()}")

    def terminate(self, timeout_seconds: float = 40.0) -> float:
        """Send SIGTERM and wait; returns the seconds until the process had ended."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout_seconds)
        return time.monotonic() - start


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of the service and the compiler, plus `extra`."""
    # torch and the service write cache directories into the environment, and child processes
    # inherit them.
    compilers = ("TORCHINDUCTOR_", "TRITON_", *CODE_FOLDERS)
    return processes.clean_environment(extra, (*processes.SETTINGS, *compilers))


@contextmanager
def running(
    command: Sequence[str],
    url: str,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    metrics_url: str | None = None,
) -> Iterator[ServerProcess]:
    """Run a server until the block ends; killed if SIGTERM does not end it."""
    with launched(command, clean_environment(environment), cwd) as (process, output):
        yield ServerProcess(url, process, output, metrics_url or url + "/metrics")


@contextmanager
def refusing_port() -> Iterator[int]:
    """A port of 127.0.0.1 that refuses connections, and that nothing else can take meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # without listening
        yield bound.getsockname()[1]


@contextmanager
def self_hosted(
    environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[ServerProcess]:
    """`python -m serve` on a free loopback port, not yet ready."""
    port = free_port()
    command = [sys.executable, "-m", "serve", "--port", str(port)]
    with running(command, f"http://127.0.0.1:{port}", environment, cwd) as server:
        yield server


@contextmanager
def fal_local(
    environment: Mapping[str, str] | None = None, app: str = "sdxl"
) -> Iterator[ServerProcess]:
    """`fal run --local` of an app of pyproject.toml, on free ports, not yet ready.

    fal listens on all interfaces, which cannot be changed: end it soon.
    """
    port, metrics_port = free_port(), free_port()
    # Without the developer's key: with it, images would be uploaded to fal's CDN.
    no_config = {"FAL_CONFIG_PATH": os.devnull}
    ports = ["--exposed-port", str(port), "--exposed-metrics-port", str(metrics_port)]
    with running(
        [sys.executable, "-m", "fal", "run", "--local", app, *ports],
        f"http://127.0.0.1:{port}",
        no_config | dict(environment or {}),
        ROOT,
        f"http://127.0.0.1:{metrics_port}/metrics",
    ) as server:
        yield server


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Ask until it holds. Raises AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.05)
