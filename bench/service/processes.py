"""Servers in processes of their own, on loopback; they are always ended.

`running` starts one and waits until it is ready; `Server` sends it requests. `launched` starts any
command, and is what the tests' servers are started by too. A server is measured from outside: wall
time by the client's clock, CPU time by the kernel's.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bench.errors import BenchError

if TYPE_CHECKING:
    from serve.engine.runtime import Runtime
    from serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("SDXL_", "OTEL_", "ENABLE_TRACING", "FAL_")
"""How the names of the service's settings begin."""
_IMAGE_URL = re.compile(r"https?://[^/\s]|data:image/[\w.+-]+;base64,[\w+/]")
_READY = re.compile(r"ready at (http://\S+)")


# Processes ---------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def clean_environment(
    extra: Mapping[str, str] | None = None, left_out: tuple[str, ...] = SETTINGS
) -> dict[str, str]:
    """This process's environment without names that begin with one of `left_out`, plus `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | dict(extra or {})


def serve_here(build: Callable[[ServeSettings], Runtime]) -> int:
    """Make this process the self-hosted server of a runtime of the bench's own, on a free port.
    Returns the exit status.

    Args:
        build: makes the runtime.
    """
    from serve import server
    from serve.engine.call import current_call
    from serve.settings import load_settings
    from serve.telemetry.logs import configure_logging

    settings = load_settings()
    configure_logging(settings.log_format, current_call.get)
    return server.run(settings, "127.0.0.1", 0, build)


@contextmanager
def launched(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a command until the block ends; gives the process and the file of its output.

    Args:
        environment: the whole of it.
    """
    with tempfile.TemporaryDirectory(prefix="stepspan-process-") as folder:
        output = Path(folder) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=cwd,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        try:
            yield process, output
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


# Servers -----------------------------------------------------------------------------------------


@dataclass
class Server:
    """A process that serves HTTP on loopback."""

    name: str
    process: subprocess.Popen[bytes]
    started: float
    """`time.monotonic` just before its start."""
    output: Path
    """What it has printed so far."""
    address: str = ""
    _connection: http.client.HTTPConnection | None = field(default=None, init=False)

    def request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and body of one request, on a connection that is kept."""
        if self._connection is None:
            self._connection = connect(self.address)
        return send_request(self._connection, method, path, body)

    def generate(self, seed: int, steps: int, **more: object) -> dict[str, Any]:
        """Request one image. Raises BenchError unless the status is 200."""
        status, body = self.request("POST", "/", request_body(seed, steps) | more)
        if status != 200:
            raise BenchError(f"{self.name} answered {status} to a request: {body[:200]!r}")
        if not holds_image(body):
            raise BenchError(f"{self.name} answered 200 without an image: {body[:200]!r}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far, including those that have ended."""
        # The kernel's clock id of another process, as clock_getcpuclockid(3) computes it.
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def close(self) -> None:
        """Close the connection that `request` keeps."""
        if self._connection is not None:
            self._connection.close()


@contextmanager
def running(
    name: str,
    module: Sequence[str],
    environment: Mapping[str, str] | None = None,
    ready_seconds: float = 1800,
    wait_for_line: bool = True,
    left_out: tuple[str, ...] = SETTINGS,
) -> Iterator[Server]:
    """Run `python -m MODULE ...` until the block ends, once it has printed `ready at URL`.

    It inherits this process's environment without `left_out`, plus `environment`.

    Args:
        name: what errors call the server.
        wait_for_line: False: do not wait; the caller sets the server's `address`.
        left_out: how the names begin of variables that it does not inherit.

    Raises:
        BenchError: it ended, or was not ready in `ready_seconds`; with its last line of output.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", *module]
    with launched(command, clean_environment(environment, left_out), ROOT) as (process, output):
        server = Server(name, process, started, output)
        try:
            if wait_for_line:
                server.address = _address(server, ready_seconds)
            yield server
        finally:
            server.close()


def _address(server: Server, seconds: float) -> str:
    while time.monotonic() - server.started < seconds:
        ended = server.process.poll() is not None
        text = server.output.read_text(errors="replace")
        if match := _READY.search(text):
            return match[1]
        if ended:
            last = (text.strip().splitlines() or ["no output"])[-1]
            raise BenchError(f"{server.name} ended before it was ready: {last[:300]}")
        time.sleep(0.01)
    raise BenchError(f"{server.name} was not ready after {seconds:.0f} s")


# Requests ----------------------------------------------------------------------------------------


def request_body(seed: int, steps: int) -> dict[str, object]:
    """A request for one image of the bench's prompt."""
    from bench.harness.work import PROMPT

    return {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}


def holds_image(body: bytes) -> bool:
    """Whether the body of a 200 is JSON with an image in it, as a URL or inline.

    A status alone says nothing of who answered: a proxy or another service may answer 200 to
    everything.
    """
    try:
        url = json.loads(body)["image"]["url"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(url, str) and _IMAGE_URL.match(url) is not None


def connect(address: str, timeout_seconds: float = 600) -> http.client.HTTPConnection:
    """A connection to `http://HOST:PORT`, opened by its first request."""
    parts = urlsplit(address)
    assert parts.hostname is not None
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_seconds)


def send_request(
    connection: http.client.HTTPConnection, method: str, path: str, body: object = None
) -> tuple[int, bytes]:
    """Status and body of one request. Reopens a kept connection that the server has closed."""
    data = None if body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
    except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
        connection.close()
        connection.request(method, path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
    return answer.status, answer.read()
