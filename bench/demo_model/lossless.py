"""Does an optimisation change what is drawn? The same prompts and seeds, with it and without.

`python -m bench.demo_model.lossless` draws the evaluation's prompts through the service's own
model, first as loaded and then prepared in each way that claims to be lossless, and says how far
the pictures moved and whether what is read from them did. How fast any of it is, is not its
business.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.demo_model.evaluate import (
    Question,
    Sampling,
    Scores,
    circumstances,
    questions,
    score,
)
from bench.demo_model.scenes import Pixels
from kernels_warmup.compile import compile_model
from kernels_warmup.recipes import Recipe
from kernels_warmup.shapes import CompiledShape
from serve.demo_model import DEMO_SIZES
from serve.model.sdxl import SdxlModel, load_model
from serve.settings import DEMO_MODEL

# Nothing is compiled, so the rewrites that every compile mode rests on are judged in seconds.
REWRITES = Recipe(scope="none")

PREPARATIONS: dict[str, Callable[[SdxlModel], object]] = {
    "rewrites": lambda model: compile_model(model.pipeline, recipe=REWRITES),
    "rewritten": lambda model: compile_model(model.pipeline, mode="rewritten"),
    "regional": lambda model: compile_model(model.pipeline, mode="regional"),
    "default": lambda model: compile_model(model.pipeline, mode="default"),
}
"""By name, what is done to a loaded model; all but the first are modes of `compile_model`."""


@dataclass(frozen=True)
class Distance:
    """Between two sets of pictures, in levels of 0 to 255 over all pixels and channels."""

    mean: float
    maximum: int
    differing: float
    """Share of the values that are not the same."""


@dataclass(frozen=True)
class Verdict:
    """What became of the pictures of one size and number of objects."""

    plain: Scores
    prepared: Scores
    distance: Distance


def draw(model: SdxlModel, asked: Sequence[Question], sampling: Sampling) -> list[Pixels]:
    """The questions' pictures, each drawn alone as a request is, (height, width, 3) bytes."""
    return [_draw_one(model, question, sampling) for question in asked]


def _draw_one(model: SdxlModel, question: Question, sampling: Sampling) -> Pixels:
    latents = model.denoise(
        model.encode_prompts([question.prompt], [""], guided=sampling.guidance > 1),
        shape=CompiledShape(question.scene.width, question.scene.height),
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        seeds=[question.seed],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda *_: None,
    )
    pixels: Pixels = model.decode(latents).pixels[0].numpy()
    return pixels


def distance(some: Sequence[Pixels], others: Sequence[Pixels]) -> Distance:
    """How far pictures of one size are from others, each from its counterpart."""
    apart = np.abs(np.stack(some).astype(np.int16) - np.stack(others).astype(np.int16))
    return Distance(float(apart.mean()), int(apart.max()), float((apart > 0).mean()))


def asked_for(prompts: int) -> dict[str, list[Question]]:
    """The evaluation's first `prompts` questions for each size and number of objects."""
    return {
        f"{width}x{height} {name}": questions(prompts, objects, width, height)
        for width, height in DEMO_SIZES
        for objects, name in ((1, "one object"), (2, "two objects"))
    }


def draw_all(
    model: SdxlModel, asked: dict[str, list[Question]], sampling: Sampling
) -> dict[str, list[Pixels]]:
    """All pictures, by the rows of `asked`."""
    return {row: draw(model, some, sampling) for row, some in asked.items()}


def compare(
    asked: dict[str, list[Question]],
    plain: dict[str, list[Pixels]],
    prepared: dict[str, list[Pixels]],
) -> dict[str, Verdict]:
    """A verdict for each row of `asked`, from its pictures without and with a preparation."""
    return {
        row: Verdict(
            score(some, plain[row]),
            score(some, prepared[row]),
            distance(plain[row], prepared[row]),
        )
        for row, some in asked.items()
    }


def as_text(name: str, verdicts: dict[str, Verdict]) -> str:
    """One line a row: distances in levels, and everything right before and after."""
    return "\n".join(
        f"{name:10s} {row:22s} mean {verdict.distance.mean:.5f}, "
        f"maximum {verdict.distance.maximum}, differing {verdict.distance.differing:.3%}, "
        f"everything right {verdict.plain.everything:.1%} -> {verdict.prepared.everything:.1%}, "
        f"score {'the same' if verdict.plain == verdict.prepared else 'CHANGED'}"
        for row, verdict in verdicts.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw with and without each lossless optimisation, and compare."
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=50, help="per size and number of objects")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=PREPARATIONS, help="one of them instead of all")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    sampling = Sampling(arguments.steps, batch=1)
    start = time.perf_counter()
    asked = asked_for(arguments.prompts)
    plain = load_model(DEMO_MODEL, device_name=arguments.device, dtype_name=arguments.dtype)
    before = draw_all(plain, asked, sampling)
    results = {}
    for name in [arguments.only] if arguments.only else PREPARATIONS:
        model = load_model(DEMO_MODEL, device_name=arguments.device, dtype_name=arguments.dtype)
        PREPARATIONS[name](model)
        verdicts = compare(asked, before, draw_all(model, asked, sampling))
        results[name] = {row: asdict(verdict) for row, verdict in verdicts.items()}
        sys.stdout.write(f"{as_text(name, verdicts)}\n")
        sys.stdout.flush()
    if arguments.json:
        record = {
            "command": "python -m bench.demo_model.lossless",
            **circumstances(plain.device),
            "dtype": arguments.dtype,
            "sampling": asdict(sampling),
            "prompts": arguments.prompts,
            "seconds": round(time.perf_counter() - start),
            "preparations": results,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
