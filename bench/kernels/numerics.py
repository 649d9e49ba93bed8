"""Whether each lossless scenario is as close to float32 as eager bfloat16 is, without timing.

    python -m bench numerics --model random:sdxl-base --shape 1024x1024 --out numerics.json
    python -m bench numerics --model random:sdxl-base --shape 256x256 --uncompiled

Runs one UNet forward and one decode on seeded inputs. Compares each with float32 arithmetic on the
same weights, and its error with that of eager bfloat16. The forward runs twice: with two prompts,
and with an empty negative prompt, whose embeddings are zero. One model is in memory at a time.

Exit status: 0 all that ran are as close; 1 one is further away; 2 wrong usage, or nothing ran.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.harness.scenarios import Scenario, chosen
from bench.outputs import output_file, write_json

if TYPE_CHECKING:
    import torch

    from bench.harness.work import Work
    from kernels_warmup.numerical_error import StepInputs

PARTS = ("step", "step, empty negative prompt", "decode")
NO_WORSE = 1.05
"""The largest error allowed, in eager's errors. Two bfloat16 computations of one result round at
different places; in a small model that averages out less."""


@dataclass(frozen=True)
class CheckedScenario:
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
        help="apply a scenario's changes to the model without compiling it",
    )
    parser.add_argument(
        "--no-worse",
        type=float,
        default=NO_WORSE,
        metavar="X",
        help=f"allow at most X times eager's error (default: {NO_WORSE})",
    )
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


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
    checked: list[CheckedScenario] = []
    with only_bench_on(work.device):
        try:
            inputs, exact, eager = references(work)
        except ModelError as error:
            raise BenchError(str(error)) from None
        errors = " ".join(f"{part} {error:.4f};" for part, error in eager.items())
        print(f"{'eager bfloat16':24} {errors}")
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
            print(report(checked[-1]), flush=True)
    if options.out:
        written = where(work.device) | {"model": work.model, "shape": str(work.shape)}
        written |= {"no_worse": options.no_worse, "eager": eager, "uncompiled": options.uncompiled}
        written |= {"scenarios": [asdict(one) for one in checked], "not_run": not_run}
        write_json(options.out, written)
    if not checked:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in not_run.items())
        raise BenchError(f"nothing could be checked ({reasons or 'no scenario is lossless'})")
    return 1 if failed or not all(one.passed for one in checked) else 0


def to_check(scenarios: Sequence[Scenario], device: str, uncompiled: bool) -> list[Scenario]:
    """The scenarios that change how the model computes but not, up to rounding, what.

    Of several scenarios with the same computation, the first.
    """
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
            # Uncompiled, it needs a CUDA device only for its attention backend.
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
    """Seeded inputs, float32's outputs by part, and the relative errors of eager bfloat16."""
    import torch

    from bench.harness.torch_state import release_memory
    from kernels_warmup.numerical_error import StepInputs, relative_error
    from serve.model.loading import load_model

    device = torch.device(work.device)
    tf32 = torch.backends.cudnn.allow_tf32
    with torch.no_grad():
        pipeline = load_model(work.model, None, work.device, "bfloat16").pipeline
        pipeline.text_encoder = pipeline.text_encoder_2 = None
        inputs = StepInputs.draw(pipeline.unet, work.shape, 1, device, torch.bfloat16)
        eager = outputs_by_part(pipeline, inputs)
        # Converted in place: two copies of the model would not fit on every device.
        pipeline.unet.float()
        pipeline.vae.float()
        torch.backends.cudnn.allow_tf32 = False
        try:
            exact = outputs_by_part(pipeline, inputs)
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
    del pipeline
    release_memory()
    return inputs, exact, {part: relative_error(eager[part], exact[part]) for part in PARTS}


def outputs_by_part(pipeline: Any, inputs: StepInputs) -> dict[str, torch.Tensor]:
    """The outputs of the UNet and the decoder for these inputs, by part, on the host."""
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
    """Guidance's two halves with the first, the negative prompt's, set to zero."""
    import torch

    negative, positive = both.chunk(2)
    return torch.cat([torch.zeros_like(negative), positive])


def check(
    scenario: Scenario,
    work: Work,
    inputs: StepInputs,
    exact: dict[str, torch.Tensor],
) -> CheckedScenario:
    """Load the model, prepare it as the scenario says, and run it twice on the same inputs.

    Raises:
        CannotRun: the scenario cannot run here, or failed.
    """
    import torch

    from bench.harness.drive import prepare
    from bench.harness.torch_state import LibrarySettings, release_memory
    from bench.harness.work import ScenarioFailed, check_can_run, one_line
    from kernels_warmup.numerical_error import relative_error
    from serve.model.loading import load_model

    scenario = replace(scenario, dtype="bfloat16")
    check_can_run(scenario, work)
    defaults = LibrarySettings()
    began = time.perf_counter()
    model: Any = None
    try:
        with torch.no_grad():
            model = load_model(work.model, None, work.device, "bfloat16")
            prepare(scenario, model)
            first = outputs_by_part(model.pipeline, inputs)
            second = outputs_by_part(model.pipeline, inputs)
    except Exception as failure:
        # A compiler, a driver, memory: a failed scenario must not end the others.
        raise ScenarioFailed(one_line(failure)) from failure
    finally:
        del model
        defaults.apply()
        torch.compiler.reset()
        release_memory()
    errors = {part: relative_error(first[part], exact[part]) for part in PARTS}
    return CheckedScenario(
        name=scenario.name,
        what=scenario.what,
        settings=scenario.settings,
        errors={part: e if math.isfinite(e) else -1.0 for part, e in errors.items()},
        again=all(torch.equal(first[part], second[part]) for part in PARTS),
        seconds=round(time.perf_counter() - began, 1),
    )


def report(one: CheckedScenario) -> str:
    """The scenario as a line for people."""
    errors = " ".join(f"{part} {error:.4f};" for part, error in one.errors.items())
    judgement = "as close" if one.passed else "FURTHER AWAY than eager"
    return f"{one.name:24} {errors} {judgement}{'' if one.again else ', not repeatable'}"
