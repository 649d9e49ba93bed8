"""`python -m bench.report.figures`: measure the service's own figures in the README.

Start-up time, memory, import time, unattributed time, and the stages of a request, of the model
that the settings name. It compares and judges nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from importlib.metadata import version

from bench.harness.environment import cpu_name
from bench.outputs import output_file, write_json
from metrics.recorder import Recorder
from metrics.records import RequestTiming
from metrics.sampling import TraceIdentity
from serve.settings import load_settings

FIRST_REQUESTS = 5
"""Left out of the figures, because caches fill and clocks rise."""

_CLIENT = """
import json, sys, urllib.request
url, count, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for seed in range(count):
    body = json.dumps({"prompt": "a red circle", "seed": seed, "num_inference_steps": steps})
    request = urllib.request.Request(url, body.encode(), {"content-type": "application/json"})
    urllib.request.urlopen(request).read()
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures; each name ends in its unit."""

    machine: str
    gpu: str
    cores: int
    python: str
    torch: str
    model: str
    compile: str
    shape: str
    steps: int
    ready_seconds: float
    import_app_seconds: float
    resident_mb: float
    requests: int
    request_median_ms: float
    stage_median_ms: dict[str, float]
    step_median_ms: float
    gpu_queue_median_ms: float
    unattributed_median_ms: float
    unattributed_p95_ms: float
    unattributed_max_ms: float


class _KeepingRecorder(Recorder):
    """A recorder that keeps the timings of every request."""

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        self.kept = [*getattr(self, "kept", []), request]
        super().record(request, identity)


def measure(requests: int, steps: int) -> Figures:
    """Measure all figures with the settings of the environment.

    It takes about a minute for the demo model on two cores.

    Args:
        requests: how many are timed, after FIRST_REQUESTS that are not.
        steps: denoising steps of each.
    """
    ready_seconds, resident_mb = _start_a_server(steps)
    timings = asyncio.run(_serve_requests(requests, steps))
    unattributed = sorted(timing.unattributed_ns / 1e6 for timing in timings)
    runs = [timing.run for timing in timings if timing.run is not None]
    stages: dict[str, list[float]] = {}
    for timing, run in zip(timings, runs, strict=True):
        for stage in (*timing.stages, *run.stages):
            stages.setdefault(stage.name, []).append(stage.duration_ns / 1e6)
    facts = timings[0].facts
    assert facts is not None
    return Figures(
        machine=cpu_name(),
        gpu=_gpu(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        torch=version("torch"),
        model=facts.model_name,
        compile=load_settings().compile,
        shape=f"{facts.width}x{facts.height}",
        steps=steps,
        ready_seconds=ready_seconds,
        import_app_seconds=min(_import_app() for _ in range(5)),
        resident_mb=resident_mb,
        requests=len(timings),
        request_median_ms=statistics.median(timing.duration_ns / 1e6 for timing in timings),
        stage_median_ms={name: statistics.median(values) for name, values in stages.items()},
        # The median of each request's own median, because the steps of one request are not
        # independent.
        step_median_ms=statistics.median(
            statistics.median(step.duration_ns / 1e6 for step in run.steps[1:] or run.steps)
            for run in runs
        ),
        gpu_queue_median_ms=statistics.median(
            statistics.median(step.gpu_queue_ns / 1e6 for step in run.steps) for run in runs
        ),
        unattributed_median_ms=statistics.median(unattributed),
        unattributed_p95_ms=unattributed[int(len(unattributed) * 0.95)],
        unattributed_max_ms=unattributed[-1],
    )


def _start_a_server(steps: int) -> tuple[float, float]:
    """Seconds until `python -m serve` is ready, and its resident megabytes after ten requests."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            if match := re.search(r"ready at (http://\S+)", line):
                url = match[1]
                break
        seconds = time.monotonic() - start
        if not url:
            raise SystemExit("the server ended before it was ready; run `make serve` to see why")
        subprocess.run([sys.executable, "-c", _CLIENT, url, "10", str(steps)], check=True)
        with urllib.request.urlopen(f"{url}/metrics") as answer:  # noqa: S310 - our own server's
            text = answer.read().decode()
        match = re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)
        assert match is not None
        return seconds, float(match[1]) / 1e6
    finally:
        process.terminate()
        process.wait(30)


async def _serve_requests(requests: int, steps: int) -> list[RequestTiming]:
    """Serve in this process; the client is another one, so that they share no interpreter lock."""
    import uvicorn
    from prometheus_client import CollectorRegistry

    from serve.engine.build import build_runtime
    from serve.server import bind, create_app

    runtime = build_runtime(load_settings(), CollectorRegistry())
    recorder = _KeepingRecorder(runtime.tracing, runtime.metrics)
    runtime.recorder = recorder
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(create_app(runtime), log_level="error"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await runtime.ready.wait()
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _CLIENT, url, str(requests + FIRST_REQUESTS), str(steps)
    )
    await client.wait()
    server.should_exit = True
    await serving
    return [t for t in recorder.kept if t.outcome == "ok"][FIRST_REQUESTS:]


def _import_app() -> float:
    code = "import time; s = time.perf_counter(); import serve.app; print(time.perf_counter() - s)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(result.stdout)


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report.figures", description=__doc__)
    parser.add_argument("--out", type=output_file, help="also write the figures here, as JSON")
    parser.add_argument("--model", help="as SDXL_MODEL; the other settings are read as always")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.model:
        os.environ["SDXL_MODEL"] = options.model
    figures = measure(options.requests, options.steps)
    for name, value in asdict(figures).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:.2f}" for key, number in value.items())
        print(f"{name:24} {value:.2f}" if isinstance(value, float) else f"{name:24} {value}")
    if options.out:
        write_json(options.out, asdict(figures))


if __name__ == "__main__":
    main()
