"""Whether an optimisation changes what is drawn: the same prompts and seeds, with and without it.

    python -m bench.demo_model.lossless

Draws the evaluation's prompts through the service's own model, as loaded and then prepared in each
way that claims to be lossless. Prints how far the pixels moved and whether the scores changed. It
does not measure speed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bench.demo_model.evaluate import (
    DrawSettings,
    HeldOutPrompt,
    Scores,
    circumstances,
    held_out_prompts,
    score,
)
from bench.demo_model.scenes import Pixels
from bench.harness.own_folder import code_kept
from bench.outputs import output_file, write_json
from kernels_warmup.compile import compile_model
from kernels_warmup.recipes import Recipe
from kernels_warmup.shapes import CompiledShape
from serve.demo_model import DEMO_SIZES
from serve.model.loading import load_model
from serve.model.sdxl import SdxlModel
from serve.settings import DEMO_MODEL

# The rewrites that every compile mode is based on, without compiling, which takes minutes.
REWRITES = Recipe(scope="none")

PREPARATIONS: dict[str, Callable[[SdxlModel], object]] = {
    "rewrites": lambda model: compile_model(model.pipeline, recipe=REWRITES),
    "rewritten": lambda model: compile_model(model.pipeline, mode="rewritten"),
    "regional": lambda model: compile_model(model.pipeline, mode="regional"),
    "default": lambda model: compile_model(model.pipeline, mode="default"),
}
"""How a loaded model is prepared, by name; all but the first are modes of `compile_model`."""


@dataclass(frozen=True)
class Distance:
    """Between two sets of pictures, in levels of 0 to 255 over all pixels and channels."""

    mean: float
    maximum: int
    differing: float
    """Share of the values that are not the same."""


@dataclass(frozen=True)
class PictureComparison:
    """The pictures of one size and number of objects, without and with a preparation."""

    plain: Scores
    prepared: Scores
    distance: Distance


def draw(
    model: SdxlModel, prompts: Sequence[HeldOutPrompt], settings: DrawSettings
) -> list[Pixels]:
    """A picture for each prompt, (height, width, 3) bytes, drawn one at a time like requests."""
    return [_draw_one(model, prompt, settings) for prompt in prompts]


def _draw_one(model: SdxlModel, prompt: HeldOutPrompt, settings: DrawSettings) -> Pixels:
    latents = model.denoise(
        model.encode_prompts([prompt.text], [""], guided=settings.guidance > 1),
        shape=CompiledShape(prompt.scene.width, prompt.scene.height),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        seeds=[prompt.seed],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda *_: None,
    )
    pixels: Pixels = model.decode(latents).pixels[0].numpy()
    return pixels


def distance(some: Sequence[Pixels], others: Sequence[Pixels]) -> Distance:
    """The distance between two sets of pictures of one size, compared in pairs."""
    apart = np.abs(np.stack(some).astype(np.int16) - np.stack(others).astype(np.int16))
    return Distance(float(apart.mean()), int(apart.max()), float((apart > 0).mean()))


def prompts_by_row(count: int) -> dict[str, list[HeldOutPrompt]]:
    """The evaluation's first `count` prompts for each size and number of objects."""
    return {
        f"{width}x{height} {name}": held_out_prompts(count, objects, width, height)
        for width, height in DEMO_SIZES
        for objects, name in ((1, "one object"), (2, "two objects"))
    }


def draw_all(
    model: SdxlModel, prompts: dict[str, list[HeldOutPrompt]], settings: DrawSettings
) -> dict[str, list[Pixels]]:
    """All pictures, by the keys of `prompts`."""
    return {row: draw(model, some, settings) for row, some in prompts.items()}


def compare(
    prompts: dict[str, list[HeldOutPrompt]],
    plain: dict[str, list[Pixels]],
    prepared: dict[str, list[Pixels]],
) -> dict[str, PictureComparison]:
    """A comparison for each key of `prompts`."""
    return {
        row: PictureComparison(
            score(some, plain[row]),
            score(some, prepared[row]),
            distance(plain[row], prepared[row]),
        )
        for row, some in prompts.items()
    }


def as_text(name: str, comparisons: dict[str, PictureComparison]) -> str:
    """One line a row: distances in levels, and everything right before and after."""
    lines = []
    for row, comparison in comparisons.items():
        plain, prepared, distance = comparison.plain, comparison.prepared, comparison.distance
        lines.append(
            f"{name:10s} {row:22s} mean {distance.mean:.5f}, maximum {distance.maximum}, "
            f"differing {distance.differing:.3%}, "
            f"everything right {plain.everything:.1%} -> {prepared.everything:.1%}, "
            f"score {'the same' if plain == prepared else 'CHANGED'}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw with and without each lossless optimisation, and compare."
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=50, help="per size and number of objects")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=PREPARATIONS, help="only this preparation (default: all)")
    parser.add_argument("--json", type=output_file, help="write the figures here")
    arguments = parser.parse_args()
    settings = DrawSettings(arguments.steps, batch=1)
    start = time.perf_counter()
    prompts = prompts_by_row(arguments.prompts)
    plain = load_model(DEMO_MODEL, device_name=arguments.device, dtype_name=arguments.dtype)
    before = draw_all(plain, prompts, settings)
    results = {}
    for name in [arguments.only] if arguments.only else PREPARATIONS:
        model = load_model(DEMO_MODEL, device_name=arguments.device, dtype_name=arguments.dtype)
        with code_kept():
            PREPARATIONS[name](model)
            comparisons = compare(prompts, before, draw_all(model, prompts, settings))
        results[name] = {row: asdict(comparison) for row, comparison in comparisons.items()}
        sys.stdout.write(f"{as_text(name, comparisons)}\n")
        sys.stdout.flush()
    if arguments.json:
        record = {
            "command": "python -m bench.demo_model.lossless",
            **circumstances(plain.device),
            "dtype": arguments.dtype,
            "sampling": asdict(settings),
            "prompts": arguments.prompts,
            "seconds": round(time.perf_counter() - start),
            "preparations": results,
        }
        write_json(arguments.json, record)


if __name__ == "__main__":
    main()
