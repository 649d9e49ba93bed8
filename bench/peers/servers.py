"""The compared servers, each in processes of its own: how to start, ask, pause and end them.

A server that is not being loaded is paused (SIGSTOP), because an idle one is not free: LitServe's
worker asks for requests a thousand times a second. psutil finds a server's processes; BentoML and
LitServe have several, and BentoML's are not in one process group.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from bench.errors import BenchError
from bench.peers import environments
from bench.peers.drawing import PeerSettings
from bench.service.processes import SETTINGS, Server, connect, free_port, running
from kernels_warmup.cpu_threads import INHERITED

OURS, DOCUMENTED, BENTOML, LITSERVE = "ours", "documented", "bentoml", "litserve"
UNBATCHED = "unbatched"
"""Our server with one image a run: what batching is worth, and what it costs a single client."""
PEERS = (DOCUMENTED, BENTOML, LITSERVE, UNBATCHED)

READY_SECONDS = 1800
ENDING_SECONDS = 30
_POLL_SECONDS = 0.1
_READY_ANSWER_SECONDS = 1.0
"""BentoML takes connections before there is a worker that answers them."""
_EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception): .*", re.MULTILINE)
_FAILED = "Application startup failed"
"""What uvicorn prints. BentoML starts such a worker again and again."""


@dataclass(frozen=True)
class _Command:
    """How a server is started and asked.

    Attributes:
        module: the arguments of `python -m`.
        address: where it listens, if it does not print `ready at URL`.
        ready_path: answers 200 once it is ready, if it does not print that.
        path: of the endpoint.
        body: makes the endpoint's body from the documented example's.
    """

    module: tuple[str, ...]
    environment: Mapping[str, str]
    path: str = "/"
    body: Callable[[dict[str, object]], object] = lambda drawing: drawing
    address: str = ""
    ready_path: str = ""


def _command(name: str, settings: PeerSettings, most_clients: int, folder: str) -> _Command:
    """Raises BenchError if the server's environment is missing."""
    if name in (OURS, UNBATCHED):
        return _Command(
            ("serve", "--port", "0"),
            _our_environment(settings, most_clients, settings.max_batch if name == OURS else 1),
            body=lambda drawing: {**drawing, "format": "png"},
        )
    environment = settings.to_environment()
    if name == DOCUMENTED:
        return _Command(("bench.peers.documented_server",), environment)
    port = str(free_port())
    address = f"http://127.0.0.1:{port}"
    environment["PYTHONPATH"] = environments.pythonpath(name)
    if name == LITSERVE:
        return _Command(
            ("bench.peers.litserve_server", port),
            environment,
            path="/predict",
            address=address,
            ready_path="/health",
        )
    assert name == BENTOML, name
    environment |= {"BENTOML_HOME": folder, "BENTOML_DO_NOT_TRACK": "True"}
    service = "bench.peers.bentoml_server:TextToImage"
    return _Command(
        ("bentoml", "serve", service, "--host", "127.0.0.1", "--port", port),
        environment,
        path="/generate",
        body=lambda drawing: {"requests": [drawing]},
        address=address,
        ready_path="/readyz",
    )


def _our_environment(settings: PeerSettings, most_clients: int, max_batch: int) -> dict[str, str]:
    environment = {
        "SDXL_MODEL": settings.model,
        "SDXL_DTYPE": settings.dtype,
        "SDXL_DEADLINE_SECONDS": str(settings.longest_wait_seconds),
        "SDXL_MAX_WAITING": str(max(32, most_clients)),
    }
    if settings.shape:
        environment["SDXL_SHAPES"] = settings.shape
    environment["SDXL_MAX_BATCH"] = str(max_batch)
    return environment


class ComparedServer:
    """A ready server of the comparison."""

    def __init__(self, server: Server, command: _Command, longest_wait_seconds: float) -> None:
        self.name = server.name
        self._server, self._command = server, command
        self._longest_wait_seconds = longest_wait_seconds
        self._seen: dict[int, psutil.Process] = {}
        """Its processes so far, by process id, the first one first."""

    def connect(self) -> http.client.HTTPConnection:
        """A connection that waits as long as the server may."""
        return connect(self._server.address, self._longest_wait_seconds)

    def draw(
        self, connection: http.client.HTTPConnection, drawing: dict[str, object]
    ) -> dict[str, Any]:
        """Request one image; `drawing` as the documented example takes it.

        Returns:
            The answer, which has the image at ["image"]["url"].

        Raises:
            BenchError: the status is not 200, or the image is not a PNG.
            OSError, http.client.HTTPException: the server cannot be reached.
        """
        body = json.dumps(self._command.body(drawing)).encode()
        connection.request("POST", self._command.path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise BenchError(f"{self.name} answered {response.status}: {content[:200]!r}")
        answer = json.loads(content)
        if isinstance(answer, list):
            (answer,) = answer
        if not str(answer["image"]["url"]).startswith("data:image/png;base64,"):
            raise BenchError(f"{self.name} answered with another format than PNG")
        found: dict[str, Any] = answer
        return found

    def pause(self) -> None:
        """Stop all its processes until `resume`."""
        for process in self._processes():
            process.suspend()

    def resume(self) -> None:
        for process in self._processes():
            process.resume()

    def end(self) -> None:
        """End all its processes: first as it does that itself, then what is left."""
        self._look()
        for process in self._seen.values():
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self._server.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._server.process.wait(ENDING_SECONDS)
        for process in self._seen.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._server.process.wait()
        psutil.wait_procs(list(self._seen.values()), ENDING_SECONDS)

    def _processes(self) -> list[psutil.Process]:
        """Its processes, the first one first. Raises BenchError if that has ended."""
        if self._server.process.poll() is not None:
            raise BenchError(f"{self.name} has ended")
        self._look()
        return [process for process in self._seen.values() if process.is_running()]

    def _look(self) -> None:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._server.process.pid)
            for process in (first, *first.children(recursive=True)):
                self._seen[process.pid] = process


@contextmanager
def serving(
    name: str, settings: PeerSettings, most_clients: int, threads: int | None
) -> Iterator[ComparedServer]:
    """Run one of the servers until the block ends; it is ready, and not paused.

    Args:
        name: OURS, or one of PEERS.
        most_clients: how many will ask at once.
        threads: OMP_NUM_THREADS; None: it is not set, and the server chooses.

    Raises:
        BenchError: its environment is missing, or it did not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="stepspan-peer-") as folder:
        command = _command(name, settings, most_clients, folder)
        environment = dict(command.environment)
        left_out: tuple[str, ...] = SETTINGS
        if threads is None:
            # This process has chosen a number of threads, which a server would take for its user's.
            left_out = (*SETTINGS, "OMP_NUM_THREADS", INHERITED)
        else:
            environment["OMP_NUM_THREADS"] = str(threads)
        prints_address = not command.address
        with running(
            name,
            command.module,
            environment,
            READY_SECONDS,
            wait_for_line=prints_address,
            left_out=left_out,
        ) as server:
            compared = ComparedServer(server, command, settings.longest_wait_seconds)
            try:
                if not prints_address:
                    server.address = command.address
                    _wait_until_ready(server, command.ready_path)
                yield compared
            finally:
                compared.end()


def _wait_until_ready(server: Server, path: str) -> None:
    while time.monotonic() - server.started < READY_SECONDS:
        ended = server.process.poll() is not None
        text = server.output.read_text(errors="replace")
        if ended or _FAILED in text:
            found = _EXCEPTION.search(text)
            reason = found[0] if found else (text.strip().splitlines() or ["no output"])[-1]
            raise BenchError(f"{server.name} could not start: {reason[:300]}")
        connection = connect(server.address, _READY_ANSWER_SECONDS)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(_POLL_SECONDS)
    raise BenchError(f"{server.name} was not ready after {READY_SECONDS} s")
