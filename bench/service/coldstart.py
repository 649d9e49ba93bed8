"""Time from process start to the first image, by phase, with an empty and with a filled cache.

    python -m bench coldstart
    python -m bench coldstart --compile default --repeats 3
    python -m bench coldstart --set SDXL_CACHE_DIR=/data/cache

The cold case starts the server with an empty cache folder and waits until it has stored what it
compiled; the cached case starts it again with that folder. The phases are the server's own
(`warmup_ms` of /ready); the other times are measured by the client.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.outputs import output_file, write_json

if TYPE_CHECKING:
    from bench.service.processes import Server

CASES = ("cold", "from cache")
POLL_SECONDS = 0.02
KEEPING_SECONDS = 300
"""How long a server may take to store what it compiled, which it does while it serves."""


@dataclass(frozen=True)
class Start:
    """One start; times in seconds since the start of the process."""

    case: str
    answers_s: float
    """The server answers HTTP for the first time."""
    ready_s: float
    first_image_s: float
    phases_ms: dict[str, float]
    """Milliseconds of each phase of the start-up, from /ready."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="as SDXL_MODEL (default: demo)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", help="as SDXL_SHAPES (default: the model's)")
    parser.add_argument("--compile", default="auto", help="as SDXL_COMPILE (default: auto)")
    parser.add_argument(
        "--steps", type=int, default=20, help="denoising steps of the first image (default: 20)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="starts of each case (default: 1)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further environment variables of the server",
    )
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if options.repeats < 1 or options.steps < 1:
        raise BenchError("--repeats and --steps: 1 and more are allowed")
    environment = {
        "SDXL_MODEL": options.model,
        "SDXL_COMPILE": options.compile,
        "SDXL_DEVICE": options.device,
    }
    if options.shape:
        environment["SDXL_SHAPES"] = options.shape
    for pair in options.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise BenchError(f"--set takes NAME=VALUE, not {pair!r}")
        environment[name] = value
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import where
    from bench.harness.work import choose_work

    device = choose_work(options.model, options.device, options.shape, 2).device
    starts: list[Start] = []
    with only_bench_on(device):
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory(prefix="stepspan-cache-") as folder:
                for case in CASES:
                    starts.append(
                        start(case, cache_settings(Path(folder)) | environment, options.steps)
                    )
                    print(report(starts[-1]))
    if options.out:
        written = where(device) | {
            "settings": environment,
            "steps": options.steps,
            "starts": [asdict(one) for one in starts],
        }
        write_json(options.out, written)
    return 0


def cache_settings(folder: Path) -> dict[str, str]:
    """The settings that make a server use this cache folder, also of older commits."""
    from serve.settings import ServeSettings

    if "cache_dir" in ServeSettings.model_fields:
        return {"SDXL_CACHE_DIR": str(folder)}
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def start(case: str, environment: Mapping[str, str], steps: int) -> Start:
    """Start a server and request one image. Raises BenchError if it fails to start or to answer."""
    from bench.service.processes import connect, free_port, running

    port = free_port()
    module = ["serve", "--port", str(port)]
    with running(f"the {case} server", module, environment, wait_for_line=False) as server:
        server.address = f"http://127.0.0.1:{port}"
        answers_s = ready_s = 0.0
        phases: dict[str, float] = {}
        while not ready_s:
            if server.process.poll() is not None:
                status = server.process.returncode
                raise BenchError(
                    f"the {case} server ended with status {status} before it was ready"
                )
            connection = connect(server.address)
            try:
                connection.request("GET", "/ready")
                answer = connection.getresponse()
                state = json.loads(answer.read())
            except OSError:
                time.sleep(POLL_SECONDS)
                continue
            finally:
                connection.close()
            since = time.monotonic() - server.started
            answers_s = answers_s or since
            if answer.status == 200:
                ready_s, phases = since, state["warmup_ms"]
            elif state.get("state") == "failed":
                raise BenchError(f"the {case} server could not start: {state.get('reason')}")
            else:
                time.sleep(POLL_SECONDS)
        server.generate(0, steps)
        first_image_s = time.monotonic() - server.started
        if case == CASES[0]:
            wait_until_kept(server)
        return Start(case, answers_s, ready_s, first_image_s, phases)


def wait_until_kept(server: Server) -> None:
    """Wait until the server has stored what it compiled, if it uses a cache.

    Raises:
        BenchError: it has not after KEEPING_SECONDS.
    """
    until = time.monotonic() + KEEPING_SECONDS
    while time.monotonic() < until:
        compiled = json.loads(server.request("GET", "/ready")[1]).get("compile", {})
        if "cache" not in compiled or "cache_store" in compiled:
            return
        time.sleep(POLL_SECONDS)
    raise BenchError(f"{server.name} stored nothing in its cache within {KEEPING_SECONDS} s")


def report(one: Start) -> str:
    """The start as a line for people."""
    phases = ", ".join(f"{name} {ms / 1000:.2f} s" for name, ms in one.phases_ms.items())
    return (
        f"{one.case}: first image after {one.first_image_s:.2f} s, ready after "
        f"{one.ready_s:.2f} s, first answer after {one.answers_s:.2f} s; {phases}"
    )
