"""SIGTERM and kill -9 in every stage of a request, in the warm-up, under load with a full queue,
and while compiled code is archived."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kernels_warmup.cache.key import SUFFIX
from kernels_warmup.cache.working_directory import WORKING_PREFIX
from serve.server import FLUSH_SECONDS, GRACE_SECONDS
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment, picture_body
from tests.e2e.test_lifecycle import wait_for_output
from tests.support import forked, tiny_checker
from tests.support.faults import Faults
from tests.support.otlp_endpoint import OtlpEndpoint, otlp_endpoint, tree
from tests.support.processes import ServerProcess, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

STAGES = (
    "receive",
    "image_decode",
    "text_encode",
    "vae_encode",
    "step",
    "vae_decode",
    "safety_check",
    "image_encode",
    "upload",
    "respond",
)
"""Where one request is held. `queue` is the stage of a second one behind it."""

OF_A_PICTURE = ("image_decode", "vae_encode")
"""The stages that only image to image has."""

ON_THE_GPU_THREAD = ("text_encode", "vae_encode", "step", "vae_decode", "safety_check")
REFUSED = ("receive", "image_decode")
"""The stages in which SIGTERM ends a request: it has not joined the queue yet."""

CLOSED = {"RemoteProtocolError", "ReadError"}
"""What a client raises whose connection was closed before its answer."""

DEADLINE_SECONDS = 4.0


class Client(threading.Thread):
    """A request on a thread of its own, and what came of it."""

    def __init__(self, url: str, stage: str = "", **fields: Any) -> None:
        """Args:
        stage: one that the request must have; empty: any of text to image.
        """
        super().__init__()
        has_picture = stage in OF_A_PICTURE
        self.url = url + "/image-to-image" if has_picture else url
        self.body = picture_body(**fields) if has_picture else body(**fields)
        self.answer: httpx.Response | None = None
        self.error: httpx.TransportError | None = None
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        try:
            self.answer = httpx.post(self.url, json=self.body, timeout=ANSWER_SECONDS)
        except httpx.TransportError as error:
            self.error = error
        self.ended_at = time.monotonic()

    def outcome(self) -> str:
        """`ok`, the type of an error, or the name of a transport's exception."""
        self.join()
        if self.answer is None:
            return type(self.error).__name__
        return "ok" if self.answer.status_code == 200 else str(self.answer.json()["error_type"])


class Ground:
    """The folders that one server leaves to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / "scratch"
        self.kept = folder / "kept"
        self.faults = Faults(folder / "faults", eager=True)
        for path in (self.scratch, self.kept, self.faults.folder):
            path.mkdir(mode=0o700)
        self.checker = tiny_checker.save(tiny_checker.tiny_checker(), folder / "checker")
        self.port = free_port()

    @contextmanager
    def server(self, otlp: OtlpEndpoint, **more: str) -> Iterator[ServerProcess]:
        settings = environment(
            otlp,
            SDXL_SHAPES="64x64",
            SDXL_SAFETY_CHECKER=str(self.checker),
            TMPDIR=str(self.scratch),
            **{"SDXL_CACHE_DIR": str(self.kept), **more},
        )
        with forked.self_hosted(settings, port=self.port, faults=self.faults) as process:
            yield process

    def leftovers(self) -> list[Path]:
        """The private folders of compiled code that processes have made and not removed."""
        return list(self.scratch.glob(f"{WORKING_PREFIX}*"))


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


def wait_for_metric(process: ServerProcess, line: str) -> None:
    deadline = time.monotonic() + 60
    while f"\n{line}\n" not in httpx.get(process.metrics_url, timeout=30).text:
        assert time.monotonic() < deadline, line
        time.sleep(0.02)


def errors_in(process: ServerProcess) -> list[str]:
    lines = [json.loads(line) for line in process.output().splitlines() if line.startswith("{")]
    return [line["event"] for line in lines if line["level"] in ("error", "critical")]


def test_sigterm_in_every_stage(ground: Ground) -> None:
    """What runs is answered, what waits is refused, both are exported, and nothing is left."""
    for stage in STAGES:
        with otlp_endpoint() as otlp, ground.server(otlp) as process:
            process.wait_until_ready(START_SECONDS)
            ground.faults.on(stage, "hold")
            running = Client(process.url, stage, num_inference_steps=4)
            ground.faults.wait_until_held(stage)
            waiting = None
            if stage in ON_THE_GPU_THREAD:
                waiting = Client(process.url)
                wait_for_metric(process, "sdxl_requests_waiting 1.0")
            signalled = time.monotonic()
            process.process.terminate()
            time.sleep(0.3)
            ground.faults.off(stage)
            process.process.wait(60)
            seconds = time.monotonic() - signalled
            print(f"SIGTERM in {stage}: {running.outcome()}, gone after {seconds:.2f} s")
            assert process.process.returncode == 0, process.output()
            assert seconds < 8
            assert running.outcome() == ("draining" if stage in REFUSED else "ok")
            if stage == "image_decode":  # answered at once, though its thread still decodes
                assert running.ended_at - signalled < 0.3
            assert running.answer is not None
            spans = otlp.wait_for_trace(running.answer.headers["x-trace-id"])
            assert ("denoise" in tree(spans)) == (stage not in REFUSED)
            if waiting is not None:
                assert waiting.outcome() == "draining"
                assert waiting.answer is not None
                assert "inference" not in tree(
                    otlp.wait_for_trace(waiting.answer.headers["x-trace-id"])
                )
            assert errors_in(process) == []
        assert ground.leftovers() == []


def test_sigterm_in_a_run_that_never_ends(ground: Ground) -> None:
    """Its request is answered at its deadline, and the process ends soon after."""
    for stage in ("text_encode", "vae_encode", "step", "vae_decode"):
        with (
            otlp_endpoint() as otlp,
            ground.server(otlp, SDXL_DEADLINE_SECONDS=str(DEADLINE_SECONDS)) as process,
        ):
            process.wait_until_ready(START_SECONDS)
            ground.faults.on(stage, "hold")
            running = Client(process.url, stage, num_inference_steps=4)
            ground.faults.wait_until_held(stage)
            signalled = time.monotonic()
            process.process.terminate()
            process.process.wait(60)
            seconds = time.monotonic() - signalled
            outcome = running.outcome()
            print(f"SIGTERM, held for ever in {stage}: {outcome}, gone after {seconds:.2f} s")
            assert process.process.returncode == 0, process.output()
            assert seconds < DEADLINE_SECONDS + GRACE_SECONDS + FLUSH_SECONDS + 5
            assert outcome == "deadline_exceeded"
            assert running.answer is not None
            spans = otlp.wait_for_trace(running.answer.headers["x-trace-id"])
            assert any(span.attributes.get("error.type") == outcome for span in spans)
            ground.faults.off(stage)
        assert ground.leftovers() == []


def test_sigterm_while_a_picture_is_decoded_for_ever(ground: Ground) -> None:
    """Its request is refused at once, and its thread is left."""
    with otlp_endpoint() as otlp, ground.server(otlp) as process:
        process.wait_until_ready(START_SECONDS)
        ground.faults.on("image_decode", "hold")
        running = Client(process.url, "image_decode")
        ground.faults.wait_until_held("image_decode")
        seconds = process.terminate()
        print(f"SIGTERM, held for ever in image_decode: gone after {seconds:.2f} s")
        assert running.outcome() == "draining"
        assert process.process.returncode == 0, process.output()
        assert seconds < FLUSH_SECONDS + 5
        assert running.answer is not None
        otlp.wait_for_trace(running.answer.headers["x-trace-id"])
        ground.faults.off("image_decode")
    assert ground.leftovers() == []


def test_kill_in_every_stage(ground: Ground) -> None:
    """The client's connection is closed. The next start removes what the killed process left, and
    serves."""
    killed_in = "nothing"
    with otlp_endpoint() as otlp:
        for stage in ("load_model", "warm_up", *STAGES, ""):
            with ground.server(otlp) as process:
                if stage in ("load_model", "warm_up"):
                    ground.faults.on(stage, "hold")
                    ground.faults.wait_until_held(stage, START_SECONDS)
                else:
                    seconds = process.wait_until_ready(START_SECONDS)
                    print(f"kill -9 in {killed_in}: the next is ready after {seconds:.1f} s")
                    assert httpx.post(process.url, json=body(), timeout=60).status_code == 200
                    assert errors_in(process) == []
                assert len(ground.leftovers()) == 1  # its own
                if not stage:
                    break
                if stage in STAGES:
                    ground.faults.on(stage, "hold")
                    client = Client(process.url, stage, num_inference_steps=4)
                    ground.faults.wait_until_held(stage)
                process.process.send_signal(signal.SIGKILL)
                process.process.wait(20)
                ground.faults.off(stage)
                if stage in STAGES:
                    assert client.outcome() in CLOSED, stage
            killed_in = stage
    assert ground.leftovers() == []


def test_kill_while_compiled_code_is_archived(ground: Ground) -> None:
    """The archive is whole or not there, and the start after the next finds it."""

    def start(cache: str) -> None:
        with ground.server(otlp, SDXL_COMPILE="default") as process:
            process.wait_until_ready(START_SECONDS)
            wait_for_output(process, f"compile cache {'unchanged' if cache == 'hit' else 'stored'}")
            ready = httpx.get(process.url + "/ready", timeout=60).json()
            assert ready["compile"]["cache"] == cache
            assert httpx.post(process.url, json=body(), timeout=60).status_code == 200
            assert errors_in(process) == []
            process.terminate()

    with otlp_endpoint() as otlp:
        with ground.server(otlp, SDXL_COMPILE="default") as process:
            ground.faults.on("archive", "hold")  # all is written but the checksum
            ground.faults.wait_until_held("archive", START_SECONDS)
            process.process.send_signal(signal.SIGKILL)
            process.process.wait(20)
            ground.faults.off("archive")
        (unfinished,) = ground.kept.iterdir()
        assert unfinished.name.endswith(".tmp")
        start("miss")
        assert len(list(ground.kept.glob(f"*{SUFFIX}"))) == 1
        start("hit")


@pytest.mark.parametrize("kind", ["a full disk", "no folder"])
def test_a_cache_folder_that_cannot_be_written(ground: Ground, kind: str) -> None:
    """Nothing is kept, the log says so once, and the service is ready all the same."""
    if kind == "a full disk":
        ground.faults.on("archive", "disk full")
        more = {}
    else:
        more = {"SDXL_CACHE_DIR": "/proc/nowhere"}
    with otlp_endpoint() as otlp, ground.server(otlp, SDXL_COMPILE="default", **more) as process:
        process.wait_until_ready(START_SECONDS)
        wait_for_output(process, "compile cache skipped")
        metric = 'sdxl_compile_cache_total{result="skipped"}'
        text = httpx.get(process.metrics_url, timeout=60).text
        assert float(text.split(f"\n{metric} ")[1].split("\n")[0]) >= 1
        assert process.output().count("compile cache skipped") == 1
        assert httpx.post(process.url, json=body(), timeout=60).status_code == 200
        assert errors_in(process) == []
    assert list(ground.kept.iterdir()) == []


def test_sigterm_while_an_image_is_stored_for_ever(ground: Ground) -> None:
    """The request fails as `draining` at the end of the grace period, and its thread is left."""
    for stage in ("image_encode", "upload"):
        with (
            otlp_endpoint() as otlp,
            ground.server(otlp, SDXL_DEADLINE_SECONDS=str(DEADLINE_SECONDS)) as process,
        ):
            process.wait_until_ready(START_SECONDS)
            ground.faults.on(stage, "hold")
            running = Client(process.url)
            ground.faults.wait_until_held(stage)
            seconds = process.terminate()
            print(f"SIGTERM, held for ever in {stage}: gone after {seconds:.2f} s")
            assert running.outcome() == "draining"
            assert process.process.returncode == 0, process.output()
            assert seconds < DEADLINE_SECONDS + GRACE_SECONDS + FLUSH_SECONDS + 5
            assert running.answer is not None
            otlp.wait_for_trace(running.answer.headers["x-trace-id"])
            ground.faults.off(stage)
        assert ground.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_under_load_with_a_full_queue(ground: Ground, number: signal.Signals) -> None:
    waiting = 6
    with otlp_endpoint() as otlp:
        with ground.server(otlp, SDXL_MAX_WAITING=str(waiting), SDXL_MAX_BATCH="1") as process:
            process.wait_until_ready(START_SECONDS)
            ground.faults.on("step", "hold")
            clients = [Client(process.url, num_inference_steps=4)]
            ground.faults.wait_until_held("step")
            clients += [Client(process.url, num_inference_steps=4) for _ in range(waiting + 3)]
            wait_for_metric(process, f"sdxl_requests_waiting {waiting}.0")
            wait_for_metric(process, 'sdxl_errors_total{error_type="queue_full"} 3.0')
            signalled = time.monotonic()
            process.process.send_signal(number)
            if number == signal.SIGTERM:
                time.sleep(0.3)
            ground.faults.off("step")
            process.process.wait(60)
            seconds = time.monotonic() - signalled
            outcomes = Counter(client.outcome() for client in clients)
            print(f"{number.name} with a full queue: {dict(outcomes)}, gone after {seconds:.2f} s")
            if number == signal.SIGTERM:
                assert outcomes == {"ok": 1, "draining": waiting, "queue_full": 3}
                assert process.process.returncode == 0
                assert seconds < 8
                for client in clients:
                    assert client.answer is not None
                    otlp.wait_for_trace(client.answer.headers["x-trace-id"])
            else:
                assert outcomes.pop("queue_full") == 3
                # Every other client's connection was closed: the running one's, and those waiting.
                assert set(outcomes) <= CLOSED, outcomes
                assert outcomes.total() == 1 + waiting
                assert all(client.ended_at - signalled < 5 for client in clients)
                assert process.process.returncode == -signal.SIGKILL
        with ground.server(otlp) as process:  # on the same port
            process.wait_until_ready(START_SECONDS)
            assert httpx.post(process.url, json=body(), timeout=60).status_code == 200


@pytest.mark.parametrize("place", ["load_model", "warm_up"])
def test_sigterm_in_a_start_that_hangs(ground: Ground, place: str) -> None:
    with otlp_endpoint() as otlp, ground.server(otlp) as process:
        ground.faults.on(place, "hold")
        ground.faults.wait_until_held(place, START_SECONDS)
        assert httpx.get(process.url + "/health", timeout=30).status_code == 200
        answer = httpx.post(process.url, json=body(), timeout=30)
        assert (answer.status_code, answer.json()["error_type"]) == (503, "not_ready")
        assert answer.headers["retry-after"] == "5"
        seconds = process.terminate()
        print(f"SIGTERM in {place}: gone after {seconds:.2f} s")
        assert seconds < 8
        assert process.process.returncode == 0
        spans = otlp.wait_for(lambda spans: any(s.name == "warmup" for s in spans))
        (warmup,) = (span for span in spans if span.name == "warmup")
        assert warmup.attributes["error.type"] == "draining"
    assert ground.leftovers() == []
