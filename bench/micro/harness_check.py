"""Whether the bench's own measurement is right: what it reports, against a minimal timing loop.

    python -m bench bare --scenario diffusers default --pairs 60

The minimal loop runs without the runtime, the marks and the pacing: it calls the model's methods on
the thread that owns it, or diffusers' pipeline, and reads `perf_counter` before and after. Reported
and minimal requests alternate in one process on one loaded model. Prints their ratio with its
interval: of the denoising loop, or of the whole request for a plain call.

Exit status: 0, or 1 if a ratio certainly differs from 1 by more than is allowed.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from bench.errors import BenchError
from bench.harness.scenarios import Scenario, chosen
from bench.outputs import output_file, write_json

if TYPE_CHECKING:
    from bench.harness.drive import LoadedScenario
    from bench.harness.work import Work

ALLOWED = 0.005
"""By how much the ratio may differ from 1."""


@dataclass(frozen=True)
class ReportedRatio:
    """A scenario's reported time over the minimal loop's; `of` says which part was timed."""

    scenario: str
    of: str
    ratio: float
    low: float
    high: float
    pairs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenario", nargs="+", default=["diffusers", "default"], metavar="NAME")
    parser.add_argument("--model", help="as SDXL_MODEL (default: demo without a CUDA device)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--pairs", type=int, default=60, help="of each scenario (default: 60)")
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if options.pairs < 1:
        raise BenchError("--pairs: 1 and more are allowed")
    from bench.harness.device_lock import only_bench_on
    from bench.harness.work import CannotRun, choose_work

    scenarios = chosen(options.scenario)
    if any(scenario.images != 1 for scenario in scenarios):
        raise BenchError("the minimal loop draws one image a request: no batch is allowed")
    work = choose_work(options.model, options.device, options.shape, options.steps)
    found: list[ReportedRatio] = []
    with only_bench_on(work.device), asyncio.Runner() as runner:
        for scenario in scenarios:
            try:
                found += compare(scenario, work, runner, options.pairs)
            except CannotRun as reason:
                raise BenchError(f"{scenario.name} cannot run here: {reason}") from None
    for row in found:
        print(
            f"{row.scenario}, {row.of}: reported over minimal {row.ratio:.4f} "
            f"({row.low:.4f} to {row.high:.4f}) over {row.pairs} pairs"
        )
    if options.out:
        write_json(options.out, [asdict(row) for row in found])
    certain = [t for t in found if t.low > 1 + ALLOWED or t.high < 1 - ALLOWED]
    return 1 if certain else 0


def compare(
    scenario: Scenario, work: Work, runner: asyncio.Runner, pairs: int
) -> list[ReportedRatio]:
    """Alternate reported and minimal requests of one loaded scenario. Raises CannotRun."""
    from bench.harness.drive import PlainCall, load_scenario

    driven = load_scenario(scenario, work, runner)
    plain = isinstance(driven, PlainCall)
    minimal = minimal_call(cast(Any, driven)) if plain else minimal_loop(cast(Any, driven), work)
    try:
        driven.request(0, 0)
        minimal(0)
        ratios = [_pair(driven, minimal, index, plain) for index in range(pairs)]
    finally:
        driven.close()
    from bench.stats.intervals import interval

    found = interval(ratios)
    of = "the whole request" if plain else "the denoising steps"
    return [ReportedRatio(scenario.name, of, found.point, found.low, found.high, pairs)]


def _pair(
    driven: LoadedScenario, minimal: Callable[[int], float], index: int, whole: bool
) -> float:
    """Reported over minimal milliseconds; which one is first alternates."""
    minimal_ms = minimal(index) if index % 2 else 0.0
    sample = driven.request(index, 0)
    minimal_ms = minimal_ms or minimal(index)
    reported_ms = sample.total_ms if whole else sample.first_step_ms + sum(sample.steps_ms)
    return reported_ms / minimal_ms


def minimal_call(driven: Any) -> Callable[[int], float]:
    """Milliseconds of diffusers' call up to a PIL image, and of the upload if there is one."""
    from bench.harness.drive import png_data_uri

    def once(seed: int) -> float:
        start = time.perf_counter()
        image = driven.call(seed)
        if driven.uploads:
            png_data_uri(image)
        return (time.perf_counter() - start) * 1000

    return once


def minimal_loop(driven: Any, work: Work) -> Callable[[int], float]:
    """Milliseconds from the start of the scheduler's loop to the end of its last step."""
    from bench.harness.work import GUIDANCE, PROMPT

    def on_thread(model: Any, seed: int) -> float:
        import torch

        begun = 0.0
        ended = 0.0

        def wait() -> float:
            if work.on_cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_begin() -> None:
            nonlocal begun
            begun = wait()

        def on_step(index: int, _: object) -> None:
            nonlocal ended
            if index == work.steps - 1:
                ended = wait()

        model.denoise(
            model.encode_prompts([PROMPT], [""], True),
            shape=work.shape,
            num_inference_steps=work.steps,
            guidance_scale=GUIDANCE,
            seeds=[seed],
            on_loop_begins=on_begin,
            on_step_enqueued=on_step,
        )
        return (ended - begun) * 1000

    return lambda seed: cast(
        float, driven.runtime.on_model(lambda model: on_thread(model, seed)).result()
    )
