"""What is around the process and fails or is unusual: disks, the log's file, OpenTelemetry's
auto-instrumentation, several processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serve.demo_model import checkpoint_path
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment
from tests.support import processes
from tests.support.hub_endpoint import hub_endpoint
from tests.support.mounts import UNSHARED, needs_mounts
from tests.support.otlp_endpoint import otlp_endpoint, tree
from tests.support.processes import (
    ROOT,
    ServerProcess,
    clean_environment,
    free_port,
    read,
    wait_until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = {"SDXL_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "SDXL_SHAPES": "64x64"}


def test_a_log_on_a_full_disk() -> None:
    """Every line is lost, and nothing else."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = f"exec {sys.executable} -m serve --port {port} > /dev/full 2>&1"
    with processes.running(["sh", "-c", command], url, SMALL, ROOT) as process:
        process.wait_until_ready(START_SECONDS)
        answer = httpx.post(url, json=body(), timeout=ANSWER_SECONDS)
        assert answer.status_code == 200
        process.terminate()
        assert process.process.returncode == 0


# Disks.


@contextmanager
def with_mounts(mounts: str, settings: dict[str, str], cwd: str = ".") -> Iterator[ServerProcess]:
    """A server that sees other file systems.

    Args:
        mounts: shell commands that mount them.
    """
    port = free_port()
    serve = f"cd {cwd} && exec {sys.executable} -m serve --port {port}"
    command = [*UNSHARED, "sh", "-ec", f"{mounts}\n{serve}"]
    settings = SMALL | {"PYTHONPATH": str(ROOT)} | settings
    with processes.running(command, f"http://127.0.0.1:{port}", settings, ROOT) as process:
        yield process


@needs_mounts
def test_a_full_disk_of_profiles(tmp_path: Path) -> None:
    """The request is served; the profile is not written, and nothing of it stays."""
    mount = f"mount -t tmpfs -o size=16k tmpfs {tmp_path}"
    with with_mounts(mount, {"SDXL_PROFILE_DIR": str(tmp_path)}) as process:
        process.wait_until_ready(START_SECONDS)
        armed = httpx.post(process.url + "/debug/profile", json={"requests": 1}, timeout=30)
        assert armed.status_code == 200
        for _ in range(2):
            assert httpx.post(process.url, json=body(), timeout=ANSWER_SECONDS).status_code == 200
        deadline = time.monotonic() + 60
        while "could not be written" not in process.output():
            assert time.monotonic() < deadline, process.output()
            time.sleep(0.1)
        seen = Path(f"/proc/{process.process.pid}/root{tmp_path}")
        assert list(seen.iterdir()) == []
        assert httpx.get(process.url + "/health", timeout=30).status_code == 200


@needs_mounts
@pytest.mark.parametrize("options", ["ro", "size=4k,nr_inodes=1"])
def test_no_folder_for_temporary_files(tmp_path: Path, options: str) -> None:
    """A start that cannot make a private folder ends with one sentence."""
    mounts = "\n".join(
        f"mount -t tmpfs -o {options} tmpfs {folder}"
        for folder in (tmp_path, "/tmp", "/var/tmp", "/mnt")
    )
    with with_mounts(mounts, {"TMPDIR": str(tmp_path)}, cwd="/mnt") as process:
        process.process.wait(60)
        output = process.output()
        assert process.process.returncode == 2, output
        (sentence,) = output.strip().splitlines()
        assert "TMPDIR" in sentence


@needs_mounts
@pytest.mark.parametrize("options", ["ro", "size=4k,nr_inodes=1"])
def test_a_temporary_folder_that_cannot_be_written(tmp_path: Path, options: str) -> None:
    """Python falls back to the next folder for temporary files, and so does the service."""
    mounts = f"mount -t tmpfs -o {options} tmpfs {tmp_path}"
    with with_mounts(mounts, {"TMPDIR": str(tmp_path)}) as process:
        process.wait_until_ready(START_SECONDS)
        assert httpx.post(process.url, json=body(), timeout=ANSWER_SECONDS).status_code == 200


COMPILING_NOTHING = """
import sys
from pathlib import Path
if "serve" in " ".join(sys.orig_argv):
    from tests.support.faults import Faults, install
    install(Faults(Path(__file__).parent, eager=True))
"""
"""A `sitecustomize` for servers that only pretend to compile, which takes minutes."""


@needs_mounts
def test_a_cache_folder_on_a_read_only_disk(tmp_path: Path) -> None:
    """Nothing is kept, the log says so once, and the service is ready all the same."""
    kept, code = tmp_path / "kept", tmp_path / "code"
    kept.mkdir()
    code.mkdir()
    (code / "sitecustomize.py").write_text(COMPILING_NOTHING)
    settings = {
        "SDXL_CACHE_DIR": str(kept),
        "SDXL_COMPILE": "default",
        "PYTHONPATH": os.pathsep.join([str(code), str(ROOT)]),
    }
    with with_mounts(f"mount -t tmpfs -o ro,mode=0700 tmpfs {kept}", settings) as process:
        process.wait_until_ready(START_SECONDS)
        skipped = 'sdxl_compile_cache_total{result="skipped"} '
        wait_until(lambda: "compile cache skipped" in process.output())
        assert float(read(process.metrics_url).split(f"\n{skipped}")[1].split("\n")[0]) >= 1
        assert process.output().count("compile cache skipped") == 1
        assert httpx.post(process.url, json=body(), timeout=ANSWER_SECONDS).status_code == 200


# The hub's cache.

REPOSITORY = "someone/tiny-sdxl"


@contextmanager
def hub_of_the_demo(cache: Path) -> Iterator[dict[str, str]]:
    """The settings of a server whose model is on a hub and not yet in its cache."""
    with hub_endpoint(REPOSITORY, {"main": checkpoint_path()}) as hub:
        yield {
            "SDXL_MODEL": REPOSITORY,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
        }


@needs_mounts
@pytest.mark.parametrize("options", ["ro", "size=256k"])
def test_a_cache_of_the_hub_that_cannot_be_written(tmp_path: Path, options: str) -> None:
    """The start ends with a sentence that names the folder's variable, not the hub."""
    mount = f"mount -t tmpfs -o {options} tmpfs {tmp_path}"
    with hub_of_the_demo(tmp_path) as settings, with_mounts(mount, settings) as process:
        process.process.wait(START_SECONDS)
        output = process.output()
        assert process.process.returncode == 1, output
        assert "Traceback" not in output
        assert REPOSITORY in output
        assert "HF_HOME" in output
        assert "cannot be reached" not in output


@needs_mounts
def test_a_read_only_cache_of_the_hub_with_the_model_in_it(tmp_path: Path) -> None:
    """As in a container image that has the model: it is served, also without the hub."""
    read_only = f"mount --bind {tmp_path} {tmp_path}\nmount -o remount,bind,ro {tmp_path}"
    with hub_of_the_demo(tmp_path) as settings:
        with with_mounts(":", settings) as process:
            process.wait_until_ready(START_SECONDS)
        with with_mounts(read_only, settings) as process:
            process.wait_until_ready(START_SECONDS)
            assert httpx.post(process.url, json=body(), timeout=ANSWER_SECONDS).status_code == 200
    with with_mounts(read_only, settings) as process:
        process.wait_until_ready(START_SECONDS)
        assert httpx.post(process.url, json=body(), timeout=ANSWER_SECONDS).status_code == 200


# More than one process.


def test_the_variable_of_uvicorns_workers_has_no_effect() -> None:
    for value in ("4", "many"):
        with processes.self_hosted(SMALL | {"WEB_CONCURRENCY": value}) as process:
            process.wait_until_ready(START_SECONDS)
            children = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children")
            assert children.read_text() == ""
            answer = httpx.post(process.url, json=body(), timeout=ANSWER_SECONDS)
            assert answer.status_code == 200


@pytest.mark.parametrize("app", ["serve.server:app", "--factory serve.server:create_app"])
def test_uvicorn_with_workers_starts_nothing(app: str) -> None:
    """There is no app to import, because importing one would not load a model. uvicorn says so."""
    command = [sys.executable, "-m", "uvicorn", "--workers", "2", "--port", str(free_port())]
    done = subprocess.run(
        [*command, *app.split()],
        env=clean_environment(SMALL),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert re.search(r"ERROR: +Error loading ASGI app", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


INSTRUMENTED = '''
"""As opentelemetry-instrument does: a global provider, and FastAPI replaced by a subclass."""
import os, sys
if "serve" in " ".join(sys.orig_argv):
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    os.environ.setdefault("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")  # as its distribution does
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    import fastapi

    class Traced:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            with trace.get_tracer("auto").start_as_current_span("auto " + scope["type"]):
                await self.app(scope, receive, send)

    class InstrumentedFastAPI(fastapi.FastAPI):
        def build_middleware_stack(self):
            return Traced(super().build_middleware_stack())

    fastapi.FastAPI = InstrumentedFastAPI
'''


def instrumented(folder: Path, **more: str) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(INSTRUMENTED)
    return more | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def test_auto_instrumentation_for_grpc_is_refused(tmp_path: Path) -> None:
    """Its default protocol is gRPC, which this service's exporter does not speak."""
    with processes.self_hosted(SMALL | instrumented(tmp_path)) as process:
        process.process.wait(60)
        assert process.process.returncode == 2
        last = process.output().strip().splitlines()[-1]
        assert last.startswith("stepspan: OTEL_EXPORTER_OTLP_PROTOCOL='grpc' is not allowed")


def test_beside_auto_instrumentation_the_service_keeps_its_own_traces(tmp_path: Path) -> None:
    protocol = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    with otlp_endpoint() as otlp:
        settings = environment(otlp, SDXL_SHAPES="64x64", **instrumented(tmp_path, **protocol))
        with processes.self_hosted(settings) as process:
            process.wait_until_ready(START_SECONDS)
            answer = httpx.post(process.url, json=body(), timeout=ANSWER_SECONDS)
            assert answer.status_code == 200
            spans = otlp.wait_for_trace(answer.json()["trace_id"])
            assert tree(spans).startswith("text-to-image\n  receive\n")
            assert tree(spans).count("denoise_step") == body()["num_inference_steps"]
            assert not any(span.name.startswith("auto") for span in spans)
            assert process.terminate() < 15
            assert process.process.returncode == 0
        theirs = otlp.wait_for(lambda spans: any(s.name == "auto http" for s in spans))
        assert {s.trace_id for s in theirs if s.name == "auto http"}.isdisjoint(
            {answer.json()["trace_id"]}
        )
