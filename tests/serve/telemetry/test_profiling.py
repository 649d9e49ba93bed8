"""Profiles of real runs of the demo pipeline: their content, and who may request them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest

from kernels_warmup.shapes import CompiledShape
from serve.engine.build import build_runtime
from serve.engine.call import Call
from serve.engine.planning import plan_request
from serve.engine.runtime import Runtime
from serve.errors import ConfigurationError
from serve.schema import TextToImageRequest
from serve.server import create_app
from serve.settings import ServeSettings, load_settings
from serve.telemetry.profiling import MAX_PROFILES, Profiling, Ranges
from tests.metrics.timings import START_NS, run_timing
from tests.support.otlp_endpoint import OtlpEndpoint, ReceivedSpan, otlp_endpoint

TOKEN = "correct-horse-battery-staple"
PROMPT = "a xylograph that no profile may mention"
STEPS = 2


@pytest.fixture(scope="module")
def otlp() -> Iterator[OtlpEndpoint]:
    with otlp_endpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "profiles"


@pytest.fixture(scope="module")
def profiled_runtime(otlp: OtlpEndpoint, folder: Path) -> Iterator[Runtime]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.url)
        patch.setenv("SDXL_MODEL", "demo")
        patch.setenv("SDXL_DEVICE", "cpu")
        patch.setenv("SDXL_SHAPES", "128x128")
        patch.setenv("SDXL_PROFILE_DIR", str(folder))
        patch.setenv("SDXL_ADMIN_TOKEN", TOKEN)
        # NVTX exists with CUDA only; on a CPU it must change nothing.
        patch.setenv("SDXL_NVTX", "true")
        runtime = build_runtime(load_settings(), CollectorRegistry())
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


def ask(
    app: FastAPI, path: str, body: Any, client: str = "127.0.0.1", **headers: str
) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(client, 50000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await http.post(path, json=body, headers=named)

    return asyncio.run(once())


def generate(app: FastAPI, otlp: OtlpEndpoint) -> dict[str, ReceivedSpan]:
    """The spans of one request, by name."""
    answer = ask(app, "/", {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 1})
    assert answer.status_code == 200
    return {span.name: span for span in otlp.wait_for_trace(answer.json()["trace_id"])}


def written(runtime: Runtime) -> list[str]:
    assert runtime.profiling.close(60)
    return runtime.profiling.profiles()


def observed(runtime: Runtime, name: str) -> float:
    """A sample of the metrics, summed over its labels."""
    lines = generate_latest(runtime.metrics.registry).decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


HISTOGRAMS = (
    "sdxl_request_duration_seconds_count",
    "sdxl_queue_duration_seconds_count",
    "sdxl_stage_duration_seconds_count",
    "sdxl_denoise_step_duration_seconds_count",
)


def test_armed_requests_are_profiled_and_the_next_is_not(
    profiled_runtime: Runtime, otlp: OtlpEndpoint, folder: Path
) -> None:
    app = create_app(profiled_runtime)
    before = {name: observed(profiled_runtime, name) for name in HISTOGRAMS}
    images = observed(profiled_runtime, "sdxl_images_total")
    assert ask(app, "/debug/profile", {"requests": 2}).json() == {"armed": 2, "profiles": []}

    spans = [generate(app, otlp) for _ in range(2)]
    names = written(profiled_runtime)
    assert [trace["inference"].attributes["inference.profile"] for trace in spans] == names
    assert all(trace["inference"].attributes["inference.profiled"] is True for trace in spans)
    profiled_runtime.recorder._executor.submit(lambda: None).result()
    assert {name: observed(profiled_runtime, name) for name in HISTOGRAMS} == before
    assert observed(profiled_runtime, "sdxl_images_total") == images + 2

    ordinary = generate(app, otlp)["inference"].attributes
    assert "inference.profile" not in ordinary
    assert "inference.profiled" not in ordinary
    assert written(profiled_runtime) == names
    profiled_runtime.recorder._executor.submit(lambda: None).result()
    assert observed(profiled_runtime, HISTOGRAMS[0]) == before[HISTOGRAMS[0]] + 1
    assert sorted(path.name for path in folder.iterdir()) == names  # nothing unfinished

    text = gzip.decompress((folder / names[0]).read_bytes()).decode()
    assert "xylograph" not in text
    events = json.loads(text)["traceEvents"]
    operators = {event["name"] for event in events if event.get("cat") == "cpu_op"}
    assert {"aten::conv2d", "aten::linear", "aten::scaled_dot_product_attention"} <= operators
    assert not any("Input Dims" in event.get("args", {}) for event in events)

    # Stages and steps contain their operators by time and thread, as Perfetto nests them.
    ranges = {e["name"]: e for e in events if e.get("cat") == "user_annotation" and e["ph"] == "X"}
    stages = ["text_encode", "denoise", "vae_decode"]
    steps = [f"denoise_step {index}" for index in range(STEPS)]
    assert sorted(ranges) == sorted(stages + steps)
    ends = {name: event["ts"] + event["dur"] for name, event in ranges.items()}
    for outer, inner in [("denoise", step) for step in steps]:
        assert ranges[outer]["ts"] <= ranges[inner]["ts"]
        assert ends[inner] <= ends[outer]
    for first, second in [stages[:2], stages[1:], steps]:
        assert ends[first] <= ranges[second]["ts"]
    convolutions = [e for e in events if e["name"] == "aten::conv2d"]
    step = ranges[steps[1]]
    assert any(
        e["tid"] == step["tid"] and step["ts"] <= e["ts"] < ends[steps[1]] for e in convolutions
    )


def test_the_estimates_learn_nothing_from_a_profiled_run(
    profiled_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(profiled_runtime)
    body = {"prompt": PROMPT, "num_inference_steps": STEPS}
    wanted = TextToImageRequest.model_validate(body)
    planned = plan_request(wanted, profiled_runtime.settings, [CompiledShape(128, 128)], [])
    estimate = partial(profiled_runtime.estimates.run_estimate, planned, 1)
    assert ask(app, "/", body).status_code == 200
    before = estimate()
    assert before is not None
    ask(app, "/debug/profile", {"requests": 1})
    assert ask(app, "/", body).status_code == 200
    assert profiled_runtime.profiling.armed == 0
    assert estimate() == before
    assert ask(app, "/", body).status_code == 200
    assert estimate() != before


def test_a_profiled_run_that_fails_has_its_profile(
    profiled_runtime: Runtime, otlp: OtlpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(profiled_runtime)
    before = len(written(profiled_runtime))
    monkeypatch.setattr(
        profiled_runtime.loaded.model, "decode", lambda _: (_ for _ in ()).throw(OSError(PROMPT))
    )
    ask(app, "/debug/profile", {"requests": 1})
    answer = ask(app, "/", {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 1})
    assert answer.status_code == 500
    names = written(profiled_runtime)
    assert len(names) == before + 1
    trace = otlp.wait_for_trace(answer.json()["trace_id"])
    [inference] = [span for span in trace if span.name == "inference"]
    assert inference.attributes["inference.profile"] == names[-1]


def test_a_profiler_that_cannot_start_fails_no_request(
    profiled_runtime: Runtime, otlp: OtlpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def busy(_: Any) -> None:
        raise RuntimeError("Kineto is in use")

    app = create_app(profiled_runtime)
    monkeypatch.setattr(torch.profiler.profile, "start", busy)
    ask(app, "/debug/profile", {"requests": 1})
    assert "inference.profile" not in generate(app, otlp)["inference"].attributes
    assert profiled_runtime.profiling.armed == 0


def test_a_removed_folder_fails_no_request(
    profiled_runtime: Runtime, otlp: OtlpEndpoint, caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    app = create_app(profiled_runtime)
    ask(app, "/debug/profile", {"requests": 1})
    aside = folder.rename(folder.with_name("aside"))
    try:
        assert generate(app, otlp)["inference"].attributes["inference.profiled"] is True
        assert profiled_runtime.profiling.close(60)
    finally:
        aside.rename(folder)
    assert "could not be written: FileNotFoundError" in caplog.text


# Who may request a profile

BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("127.9.9.9", {}, 200),
        ("::1", {}, 200),
        ("192.0.2.7", {}, 403),
        ("testclient", {}, 403),
        ("192.0.2.7", BEARER, 200),
        ("192.0.2.7", {"authorization": f"bearer  {TOKEN}"}, 200),
        ("192.0.2.7", {"authorization": TOKEN}, 403),
        ("192.0.2.7", {"authorization": f"Basic {TOKEN}"}, 403),
        ("192.0.2.7", {"authorization": f"Bearer {TOKEN}x"}, 403),
        ("192.0.2.7", {"authorization": f"Bearer {TOKEN[:-1]}"}, 403),
        ("192.0.2.7", {"authorization": "Bearer "}, 403),
        ("192.0.2.7", {"authorization": b"Bearer \xff\xe9".decode("latin-1")}, 403),
        # A proxy on this machine forwards for others, and a page in a browser acts for its author.
        ("127.0.0.1", {"x_forwarded_for": "192.0.2.7"}, 403),
        ("127.0.0.1", {"forwarded": "for=192.0.2.7"}, 403),
        ("127.0.0.1", {"x_real_ip": "127.0.0.1"}, 403),
        ("127.0.0.1", {"via": "1.1 proxy"}, 403),
        ("127.0.0.1", {"origin": "https://elsewhere.test"}, 403),
        ("127.0.0.1", {"origin": "https://elsewhere.test", **BEARER}, 200),
    ],
)
def test_only_this_machine_and_the_token_may_request_profiles(
    profiled_runtime: Runtime,
    caplog: pytest.LogCaptureFixture,
    client: str,
    headers: dict[str, str],
    status: int,
) -> None:
    caplog.set_level("DEBUG")
    profiled_runtime.profiling.arm(0)
    app = create_app(profiled_runtime)
    named = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = ask(app, "/debug/profile", {"requests": 3}, client, **named)  # type: ignore[arg-type]
    assert answer.status_code == status
    assert profiled_runtime.profiling.armed == (3 if status == 200 else 0)
    profiled_runtime.profiling.arm(0)
    assert TOKEN not in answer.text + caplog.text


@pytest.mark.parametrize("requests", [-1, MAX_PROFILES + 1, "2", 1.5, None])
def test_a_wrong_number_is_refused(profiled_runtime: Runtime, requests: Any) -> None:
    app = create_app(profiled_runtime)
    assert ask(app, "/debug/profile", {"requests": requests}).status_code == 422
    assert profiled_runtime.profiling.armed == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"x" * 2000, 413), (b"{", 422), (b"", 422), (b'{"requests": 1, "else": 2}', 422)],
)
def test_a_malformed_body_is_refused(profiled_runtime: Runtime, body: bytes, status: int) -> None:
    app = create_app(profiled_runtime)

    async def once(client: str) -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(client, 50000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.post(
                "/debug/profile", content=body, headers={"content-type": "application/json"}
            )

    assert asyncio.run(once("127.0.0.1")).status_code == status
    assert asyncio.run(once("192.0.2.7")).status_code == 403  # unread
    assert profiled_runtime.profiling.armed == 0


def test_without_a_configured_token_every_token_is_refused(
    profiled_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = profiled_runtime.settings.model_copy(update={"admin_token": None})
    monkeypatch.setattr(profiled_runtime, "settings", settings)
    app = create_app(profiled_runtime)
    assert ask(app, "/debug/profile", {"requests": 0}, "192.0.2.7", **BEARER).status_code == 403
    assert ask(app, "/debug/profile", {"requests": 0}, **BEARER).status_code == 200


def test_without_profiling_the_path_does_not_exist(runtime: Runtime) -> None:
    assert not runtime.profiling.enabled
    app = create_app(runtime)
    assert ask(app, "/debug/profile", {"requests": 1}, **BEARER).status_code == 404


# The settings


@pytest.mark.parametrize("token", ["short", "with a space in it it is", "ümlaut-ümlaut-ümlaut"])
def test_a_weak_token_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("SDXL_ADMIN_TOKEN", token)
    with pytest.raises(ConfigurationError, match="SDXL_ADMIN_TOKEN is not allowed") as caught:
        load_settings()
    assert token not in str(caught.value)


def test_the_token_is_in_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_ADMIN_TOKEN", TOKEN)
    settings = load_settings()
    assert TOKEN not in repr(settings) + str(settings) + settings.model_dump_json()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="SDXL_PROFILE_DIR="):
        Profiling(tmp_path / "in")


def test_a_folder_that_is_a_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"SDXL_PROFILE_DIR=.* be written"):
        Profiling(tmp_path / "file")


# The folder's bounds


class Profiler:
    """A profiler that writes as many bytes as a test chooses."""

    def __init__(self, size: int) -> None:
        self._size = size

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_bytes(b"x" * self._size)


def name(second: int) -> str:
    return f"20260101T0000{second:02d}.000Z-0123abcd.json.gz"


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ([10, 10, 10, 10], [1, 2, 3]),
        ([60, 60, 10], [1, 2]),
        ([10, 10, 101], []),  # larger than all that may be kept
        ([10, 101, 10], [2]),
    ],
)
def test_the_oldest_profiles_are_removed_first_and_no_other_file(
    tmp_path: Path, sizes: list[int], kept: list[int]
) -> None:
    others = ("notes.json.gz", "20260101T000000.000Z-0123abcd.json", "a.txt")
    for other in others:
        (tmp_path / other).touch()
    profiling = Profiling(tmp_path, max_profiles=3, max_bytes=100)
    for second, size in enumerate(sizes):
        profiling._write(Profiler(size), name(second))
    assert profiling.profiles() == [name(second) for second in kept]
    assert {path.name for path in tmp_path.iterdir()} == {*others, *profiling.profiles()}


def test_an_unfinished_profile_is_removed_by_the_next_process(tmp_path: Path) -> None:
    for left in (f".{name(1)}", name(2), ".gitkeep"):
        (tmp_path / left).touch()
    Profiling(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name(2), ".gitkeep"}


def test_neither_the_next_run_nor_the_shutdown_waits_for_a_write(tmp_path: Path) -> None:
    release = threading.Event()

    class Slow(Profiler):
        def export_chrome_trace(self, path: str) -> None:
            release.wait(10)
            super().export_chrome_trace(path)

        def stop(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.telemetry.profiling._started_profiler", lambda: Slow(1))
        profiling = Profiling(tmp_path)
        profiling.arm(1)
        call = _call_with_a_run()
        profile = profiling.run(lambda: profiling.recording, "0123abcd", [call])
        assert profile is not None
        assert not profiling.close(0.01)
        assert profiling.run(lambda: profiling.recording, "0123abcd", [call]) is None
        release.set()
        assert profiling.close(10)
    assert profiling.profiles() == [profile]


def test_a_run_cancelled_before_it_began_leaves_no_profile(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.telemetry.profiling._started_profiler", lambda: _Stopping(1))
        profiling = Profiling(tmp_path)
        profiling.arm(1)
        call = _call_with_a_run()
        call.runs = []
        profiling.run(lambda: None, "0123abcd", [call])
        assert profiling.close(10)
    assert profiling.profiles() == []


class _Stopping(Profiler):
    def stop(self) -> None:
        pass


def _call_with_a_run() -> Call:
    runtime = build_runtime(ServeSettings(), CollectorRegistry())
    call = Call("/", "POST", runtime.tracing.identify())
    runtime.close(0.1)
    call.runs = [dataclasses.replace(run_timing(START_NS), run_id="0123abcd")]
    return call


# Ranges


def recording_ranges(steps: int) -> tuple[Ranges, list[str]]:
    seen: list[str] = []

    @contextlib.contextmanager
    def annotation(name: str) -> Iterator[None]:
        seen.append(f"+{name}")
        try:
            yield
        finally:
            seen.append(f"-{name}")

    return Ranges([annotation], steps), seen


def test_ranges_nest_and_no_step_follows_the_last() -> None:
    ranges, seen = recording_ranges(2)
    with ranges.stage("denoise"):
        for index in range(3):
            ranges.step_begins(index)
    with ranges.stage("vae_decode"):
        pass
    assert seen == [
        "+denoise",
        *("+denoise_step 0", "-denoise_step 0", "+denoise_step 1", "-denoise_step 1"),
        *("-denoise", "+vae_decode", "-vae_decode"),
    ]


def test_a_loop_left_midway_leaves_no_range_open() -> None:
    ranges, seen = recording_ranges(5)
    with contextlib.suppress(OSError), ranges.stage("denoise"):
        ranges.step_begins(0)
        raise OSError
    assert seen == ["+denoise", "+denoise_step 0", "-denoise_step 0", "-denoise"]


def test_nvtx_ranges_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: seen.append(f"+{name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("-"))
    ranges = Profiling(None, nvtx=True).ranges(1)
    assert ranges is not None
    with ranges.stage("denoise"):
        ranges.step_begins(0)
        ranges.step_begins(1)
    assert seen == ["+denoise", "+denoise_step 0", "-", "-"]


def test_nvtx_marks_nothing_without_a_cuda_device(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("here it would mark")
    assert Profiling(None, nvtx=True).ranges(3) is None
    assert Profiling(tmp_path).ranges(3) is None
