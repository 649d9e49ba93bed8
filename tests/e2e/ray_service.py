"""`python -m serve ray` as a real process with a real Ray cluster, and clients that load it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment
from tests.support.otlp_endpoint import OtlpEndpoint, otlp_endpoint
from tests.support.processes import ROOT, ServerProcess, clean_environment, free_port, running

FOLDER = ROOT / ".ray"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def require_ray() -> None:
    """Skip the calling module without Ray; in CI, fail."""
    if (FOLDER / ".installed").exists():
        return
    if os.environ.get("CI") == "true":
        raise RuntimeError("CI must have Ray; .ci/run installs it by `make ray-env`")
    pytest.skip("Ray is not installed (make ray-env)", allow_module_level=True)


@dataclass(frozen=True)
class Replica:
    """A replica, as its file for Prometheus describes it."""

    name: str
    pid: int
    metrics_url: str

    def metrics(self) -> str:
        headers = {"accept": OPENMETRICS}
        return httpx.get(self.metrics_url, headers=headers, timeout=ANSWER_SECONDS).text

    def value(self, series: str) -> float:
        """The value of a series, written as in a scrape."""
        (line,) = (one for one in self.metrics().splitlines() if one.startswith(series + " "))
        return float(line.removeprefix(series + " ").split(" ")[0])


@dataclass
class RayService:
    """A running service, where its spans arrive, and the folder of its replicas' files."""

    process: ServerProcess
    otlp: OtlpEndpoint
    targets: Path
    environment: Mapping[str, str]

    @property
    def url(self) -> str:
        return self.process.url

    @property
    def temporary(self) -> str:
        """Ray's folder; the environment of each of its processes names it."""
        return self.environment["RAY_TMPDIR"]

    def replicas(self) -> list[Replica]:
        found = []
        for file in sorted(self.targets.glob("*.json")):
            with suppress(FileNotFoundError):  # it ends just now
                (target,) = json.loads(file.read_text())
                url = f"http://{target['targets'][0]}/metrics"
                pid = int(file.stem.rpartition("-")[2])
                if psutil.pid_exists(pid):
                    found.append(Replica(target["labels"]["replica"], pid, url))
        return found

    def post(self, headers: Mapping[str, str] | None = None, **fields: Any) -> httpx.Response:
        return httpx.post(
            self.url, json=body(**fields), headers=dict(headers or {}), timeout=ANSWER_SECONDS
        )

    def run_driver(self, code: str) -> str:
        """Run Python that is connected to the cluster, as an operator's command is."""
        script = f"import ray\nray.init(address='auto', log_to_driver=False)\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=clean_environment(self.environment),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def logs(self) -> list[Path]:
        """Every file that Ray has written the output of a process to."""
        return [f for f in Path(self.temporary).glob("ray/session_2*/logs/**/*") if f.is_file()]


def processes_of(temporary: str) -> list[psutil.Process]:
    """The processes that have inherited this folder from `python -m serve ray`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == temporary:
                found.append(process)
    return found


@contextmanager
def ray_service(
    *arguments: str, start_seconds: float = START_SECONDS, **settings: str
) -> Iterator[RayService]:
    """Run one until the block ends, ready. Nothing of it is left then."""
    with ExitStack() as stack:
        otlp = stack.enter_context(otlp_endpoint())
        # Ray puts sockets there, whose paths may have 107 bytes only.
        temporary = tempfile.mkdtemp(prefix="ray-")
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        stack.callback(end_all, temporary)
        targets = Path(temporary) / "targets"
        port = free_port()
        variables = ray_environment(temporary) | environment(otlp, **settings)
        command = [sys.executable, "-m", "serve", "ray", "--port", str(port)]
        process = stack.enter_context(
            running(
                [*command, "--metrics-targets", str(targets), *arguments],
                f"http://127.0.0.1:{port}",
                variables,
                ROOT,
            )
        )
        wait_for_text(process, "stepspan is ready", start_seconds)
        yield RayService(process, otlp, targets, variables)


def ray_environment(temporary: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    return {
        "PYTHONPATH": path,
        "RAY_TMPDIR": temporary,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Known to the operator's commands too, and in no file of the user's.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def wait_for_text(process: ServerProcess, text: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while text not in process.output():
        assert process.process.poll() is None, process.output()
        assert time.monotonic() < deadline, process.output()
        time.sleep(0.1)


def end_all(temporary: str) -> None:
    for process in processes_of(temporary):
        with suppress(psutil.Error):
            process.kill()


@dataclass
class Load:
    """What clients got that sent one request after the other."""

    answers: list[tuple[float, float, int, str]] = field(default_factory=list)
    """When each ended, its seconds, its status (0: no answer) and its error type."""
    _ending: threading.Event = field(default_factory=threading.Event)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(status for _, _, status, _ in self.answers)

    def rate(self, since: float, until: float) -> float:
        """Good answers a second between two times of `time.monotonic`."""
        good = [end for end, _, status, _ in self.answers if status == 200 and since < end <= until]
        return len(good) / (until - since)

    def _client(self, url: str, fields: Mapping[str, Any]) -> None:
        with httpx.Client(timeout=ANSWER_SECONDS) as client:
            while not self._ending.is_set():
                start = time.monotonic()
                status, error = 0, ""
                try:
                    answer = client.post(url, json=body(**fields))
                    status = answer.status_code
                    if status != 200:
                        error = answer.text[:200]
                except httpx.TransportError as failure:
                    error = type(failure).__name__
                now = time.monotonic()
                self.answers.append((now, now - start, status, error))
                if status != 200:
                    time.sleep(0.2)


@contextmanager
def load(url: str, clients: int, **fields: Any) -> Iterator[Load]:
    """Load a service with closed-loop clients until the block ends, and wait for their answers."""
    under = Load()
    threads = [threading.Thread(target=under._client, args=(url, fields)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield under
    finally:
        under._ending.set()
        for thread in threads:
            thread.join()
