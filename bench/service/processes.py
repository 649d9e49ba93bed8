"""Servers in processes of their own on loopback, asked over HTTP; always ended.

What a server takes is read from outside: its time from the client's clock, its CPU from the kernel.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.errors import BenchError
from bench.harness.environment import ROOT
from bench.harness.work import PROMPT

SETTINGS = ("SDXL_", "OTEL_", "ENABLE_TRACING", "FAL_")
_READY = re.compile(r"ready at (http://\S+)")


@dataclass
class Server:
    """A process that answers HTTP on loopback."""

    name: str
    process: subprocess.Popen[bytes]
    address: str = ""
    started: float = field(default_factory=time.monotonic)
    """`time.monotonic` just before its start."""
    _connection: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and body of one request, on a connection that is kept."""
        if self._connection is None:
            self._connection = connect(self.address)
        return ask(self._connection, method, path, body)

    def generate(self, seed: int, steps: int, **more: object) -> dict[str, Any]:
        """One picture. Raises BenchError unless it is answered."""
        status, body = self.ask("POST", "/", request_body(seed, steps) | more)
        if status != 200:
            raise BenchError(f"{self.name} answered {status} to a request: {body[:200]!r}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def cpu_seconds(self) -> float:
        """CPU time of all its threads until now, those that have ended too."""
        # The kernel's clock id of another process, as clock_getcpuclockid(3) makes it.
        return time.clock_gettime((~self.process.pid << 3) | 2)


def connect(address: str) -> http.client.HTTPConnection:
    parts = urlsplit(address)
    assert parts.hostname is not None
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=600)


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: object = None
) -> tuple[int, bytes]:
    """Status and body; a kept connection that the server has hung up on is opened again."""
    data = None if body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
    except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
        connection.close()
        connection.request(method, path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
    return answer.status, answer.read()


def request_body(seed: int, steps: int) -> dict[str, object]:
    return {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}


@contextmanager
def running(
    name: str,
    module: Sequence[str],
    environment: Mapping[str, str] | None = None,
    ready_seconds: float = 1800,
    wait_for_line: bool = True,
) -> Iterator[Server]:
    """`python -m MODULE ...` until the block ends, once it says `ready at URL`.

    It sees this process's environment without settings of ours, and `environment`.

    Raises:
        BenchError: it ended, or was not ready in time; with its last line.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
    with tempfile.TemporaryDirectory(prefix="stepspan-bench-") as folder:
        output = Path(folder) / "output"
        with output.open("wb") as file:
            started = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                env=kept | dict(environment or {}),
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        server = Server(name, process, started=started)
        try:
            if wait_for_line:
                server.address = _address(server, output, ready_seconds)
            yield server
        finally:
            if server._connection is not None:
                server._connection.close()
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _address(server: Server, output: Path, seconds: float) -> str:
    while time.monotonic() - server.started < seconds:
        ended = server.process.poll() is not None
        text = output.read_text(errors="replace")
        if match := _READY.search(text):
            return match[1]
        if ended:
            last = (text.strip().splitlines() or ["without a word"])[-1]
            raise BenchError(f"{server.name} ended before it was ready: {last[:300]}")
        time.sleep(0.01)
    raise BenchError(f"{server.name} was not ready after {seconds:.0f} s")
