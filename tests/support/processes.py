"""Servers as real processes on loopback, started and ended by tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from tests.support.forked import Forked

ROOT = Path(__file__).resolve().parents[2]

READY_SECONDS = 90.0


@dataclass
class ServerProcess:
    """A running server: where it answers, and what it has printed."""

    url: str
    process: subprocess.Popen[bytes] | Forked
    output_path: Path
    metrics_url: str

    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def wait_until_ready(self, timeout_seconds: float = READY_SECONDS) -> float:
        """Seconds until `/ready` said so."""
        start = time.monotonic()
        while time.monotonic() - start < timeout_seconds:
            if self.process.poll() is not None:
                raise AssertionError(f"exited {self.process.returncode}:\n{self.output()}")
            try:
                if httpx.get(self.url + "/ready", timeout=5).status_code == 200:
                    return time.monotonic() - start
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_seconds} s:\n{self.output()}")

    def terminate(self, timeout_seconds: float = 40.0) -> float:
        """Send SIGTERM and wait; seconds until the process was gone."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout_seconds)
        return time.monotonic() - start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of ours, and with `extra`."""
    # The last two: torch names its own default cache there, for whatever it starts to inherit.
    ours = ("SDXL_", "OTEL_", "ENABLE_TRACING", "FAL_", "TORCHINDUCTOR_", "TRITON_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return environment | dict(extra or {})


@contextmanager
def running(
    command: Sequence[str],
    url: str,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    metrics_url: str | None = None,
) -> Iterator[ServerProcess]:
    """Run a server until the block ends; killed if SIGTERM does not end it."""
    with tempfile.TemporaryDirectory() as folder:
        output_path = Path(folder) / "output"
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=clean_environment(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
            )
        server = ServerProcess(url, process, output_path, metrics_url or url + "/metrics")
        try:
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextmanager
def self_hosted(
    environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[ServerProcess]:
    """`python -m serve` on a free loopback port, not yet ready."""
    port = free_port()
    with running(
        [sys.executable, "-m", "serve", "--port", str(port)],
        f"http://127.0.0.1:{port}",
        environment,
        cwd,
    ) as server:
        yield server


@contextmanager
def fal_local(
    environment: Mapping[str, str] | None = None, app: str = "sdxl"
) -> Iterator[ServerProcess]:
    """`fal run --local` of an app of pyproject.toml, on free ports, not yet ready.

    fal listens on all interfaces and offers no other way: end it soon.
    """
    port, metrics_port = free_port(), free_port()
    # No key of the developer's: its images would be put on fal's CDN.
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
