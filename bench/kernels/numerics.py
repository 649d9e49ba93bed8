"""Whether each lossless scenario is as near to float32 as eager bfloat16 is, without timing.

    python -m bench numerics --model random:sdxl-base --shape 1024x1024 --out numerics.json
    python -m bench numerics --model random:sdxl-base --shape 256x256 --uncompiled

One UNet forward and one decode on seeded inputs, each against float32 arithmetic on the same
weights, beside eager bfloat16's error. The forward comes twice: with two prompts, and with an empty
negative prompt, whose embeddings are zero. One model is in memory at a time.

Exit status: 0 all that ran are as near; 1 one is further away; 2 wrong usage, or nothing ran.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.harness.scenarios import Scenario, chosen

if TYPE_CHECKING:
    import torch

    from bench.harness.work import Work
    from kernels_warmup.numerical_error import StepInputs

PARTS = ("step", "step, empty negative prompt", "decode")
NO_WORSE = 1.05
"""Times eager's error, at most: two bfloat16 computations of the same thing differ in where they
round, and the smaller the model, the less that averages out."""


@dataclass(frozen=True)
class Checked:
    """One scenario's relative errors by part; `again`: a second call gave the same bits."""

    name: str
    what: str
    settings: dict[str, str]
    errors: dict[str, float]
    again: bool
    seconds: float
    passed: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scenario", nargs="+", metavar="NAME", help="as of `run` (default: every lossless one)"
    )
    parser.add_argument("--model", help="as SDXL_MODEL (default: demo without a CUDA device)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument(
        "--uncompiled",
        action="store_true",
        help="a scenario's changes to the model only, without compiling what they make",
    )
    parser.add_argument(
        "--no-worse",
        type=float,
        default=NO_WORSE,
        metavar="X",
        help=f"as near is at most X times eager's error (default: {NO_WORSE})",
    )
    parser.add_argument("--out", type=Path, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import where
    from bench.harness.work import CannotRun, ScenarioFailed, choose_work
    from serve.errors import ModelError

    work = choose_work(options.model, options.device, options.shape, 2)
    scenarios = to_check(chosen(options.scenario), work.device, options.uncompiled)
    not_run: dict[str, str] = {}
    failed = False
    checked: list[Checked] = []
    with only_bench_on(work.device):
        try:
            inputs, exact, eager = references(work)
        except ModelError as error:
            raise BenchError(str(error)) from None
        told = " ".join(f"{part} {error:.4f};" for part, error in eager.items())
        print(f"{'eager bfloat16':24} {told}")
        for scenario in scenarios:
            try:
                checked.append(check(scenario, work, inputs, exact))
            except CannotRun as reason:
                not_run[scenario.name] = str(reason)
                failed |= isinstance(reason, ScenarioFailed)
                print(f"{scenario.name:24} not run: {reason}")
                continue
            near = {part: options.no_worse * error for part, error in eager.items()}
            passed = all(0 <= checked[-1].errors[part] <= near[part] for part in PARTS)
            checked[-1] = replace(checked[-1], passed=passed)
            print(tell(checked[-1]), flush=True)
    if options.out:
        written = where(work.device) | {"model": work.model, "shape": str(work.shape)}
        written |= {"no_worse": options.no_worse, "eager": eager, "uncompiled": options.uncompiled}
        written |= {"scenarios": [asdict(one) for one in checked], "not_run": not_run}
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    if not checked:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in not_run.items())
        raise BenchError(f"nothing could be checked ({reasons or 'no lossless way was named'})")
    return 1 if failed or not all(one.passed for one in checked) else 0


def to_check(scenarios: Sequence[Scenario], device: str, uncompiled: bool) -> list[Scenario]:
    """Those that change how the model computes and mean to change nothing else; of several that
    compute the same, the first."""
    import torch

    from bench.harness.drive import recipe_of
    from kernels_warmup.recipes import RECIPES, mode_for

    found: dict[str, Scenario] = {}
    for scenario in scenarios:
        if scenario.way != "served" or scenario.lossy or scenario.images > 1:
            continue
        if uncompiled:
            mode = mode_for(scenario.compile, torch.device(device))
            recipe = RECIPES[mode] if scenario.recipe is None else recipe_of(scenario.recipe)
            fields = asdict(recipe) | {"scope": "none", "replay": "none", "options": {}}
            # Without what it is compiled for, it needs no CUDA device either.
            cuda_only = scenario.cuda_only and scenario.attention != "auto"
            scenario = replace(
                scenario, compile="off", recipe=fields, decoder=None, cuda_only=cuda_only
            )
        elif scenario.compile == "off" and scenario.recipe is None:
            continue  # eager itself
        found.setdefault(repr(sorted(scenario.settings.items())), scenario)
    return list(found.values())


def references(
    work: Work,
) -> tuple[StepInputs, dict[str, torch.Tensor], dict[str, float]]:
    """Seeded inputs, float32's answers by part, and how far eager bfloat16's are from them."""
    import torch

    from bench.harness.torch_state import release_memory
    from kernels_warmup.numerical_error import StepInputs, relative_error
    from serve.model.sdxl import load_model

    device = torch.device(work.device)
    tf32 = torch.backends.cudnn.allow_tf32
    with torch.no_grad():
        pipeline = load_model(work.model, None, work.device, "bfloat16").pipeline
        pipeline.text_encoder = pipeline.text_encoder_2 = None
        inputs = StepInputs.draw(pipeline.unet, work.shape, 1, device, torch.bfloat16)
        eager = answers(pipeline, inputs)
        # The same weights, one after the other: two copies of the whole would not fit everywhere.
        pipeline.unet.float()
        pipeline.vae.float()
        torch.backends.cudnn.allow_tf32 = False
        try:
            exact = answers(pipeline, inputs)
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
    del pipeline
    release_memory()
    return inputs, exact, {part: relative_error(eager[part], exact[part]) for part in PARTS}


def answers(pipeline: Any, inputs: StepInputs) -> dict[str, torch.Tensor]:
    """What the UNet and the decoder give for these inputs, by part, on the host."""
    from kernels_warmup.numerical_error import forward_once

    inputs = inputs.cast(pipeline.unet.dtype)
    empty = replace(
        inputs,
        text=half_zero(inputs.text),
        added=inputs.added | {"text_embeds": half_zero(inputs.added["text_embeds"])},
    )
    latents = inputs.latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
    step, empty_step, decode = PARTS
    return {
        step: forward_once(pipeline.unet, inputs).cpu(),
        empty_step: forward_once(pipeline.unet, empty).cpu(),
        decode: pipeline.vae.decode(latents, return_dict=False)[0].cpu(),
    }


def half_zero(both: torch.Tensor) -> torch.Tensor:
    """The guidance's two halves, the negative prompt's first, as an empty one leaves it."""
    import torch

    negative, positive = both.chunk(2)
    return torch.cat([torch.zeros_like(negative), positive])


def check(
    scenario: Scenario,
    work: Work,
    inputs: StepInputs,
    exact: dict[str, torch.Tensor],
) -> Checked:
    """Load the model anew, change it in the scenario's way, and ask it the same twice.

    Raises:
        CannotRun: it means nothing here, or failed.
    """
    import torch

    from bench.harness.drive import prepare
    from bench.harness.torch_state import LibrarySettings, release_memory
    from bench.harness.work import ScenarioFailed, check_can_run, one_line
    from kernels_warmup.numerical_error import relative_error
    from serve.model.sdxl import load_model

    scenario = replace(scenario, dtype="bfloat16")
    check_can_run(scenario, work)
    defaults = LibrarySettings()
    began = time.perf_counter()
    model: Any = None
    try:
        with torch.no_grad():
            model = load_model(work.model, None, work.device, "bfloat16")
            prepare(scenario, model)
            first = answers(model.pipeline, inputs)
            second = answers(model.pipeline, inputs)
    except Exception as failure:
        # A compiler, a driver, memory: one scenario never ends the others.
        raise ScenarioFailed(one_line(failure)) from failure
    finally:
        del model
        defaults.apply()
        torch.compiler.reset()
        release_memory()
    errors = {part: relative_error(first[part], exact[part]) for part in PARTS}
    return Checked(
        name=scenario.name,
        what=scenario.what,
        settings=scenario.settings,
        errors={part: e if math.isfinite(e) else -1.0 for part, e in errors.items()},
        again=all(torch.equal(first[part], second[part]) for part in PARTS),
        seconds=round(time.perf_counter() - began, 1),
    )


def tell(one: Checked) -> str:
    """For people."""
    errors = " ".join(f"{part} {error:.4f};" for part, error in one.errors.items())
    verdict = "as near" if one.passed else "FURTHER AWAY than eager"
    return f"{one.name:24} {errors} {verdict}{'' if one.again else ', not twice the same'}"
