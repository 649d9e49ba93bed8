"""What ending guidance early saves and costs: the time of a run against the score of its pictures.

    python -m bench.demo_model.guidance_end

Draws the evaluation's prompts through the service's own model, prepared as the service prepares it,
with guidance in all of the steps and in the first ones only. The ways take turns, so that what else
the machine does slows all of them.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from bench.demo_model.evaluate import HeldOutPrompt, Scores, circumstances, score
from bench.demo_model.lossless import prompts_by_row
from bench.demo_model.scenes import Pixels
from bench.harness.own_folder import code_kept
from bench.outputs import output_file, write_json
from bench.stats.intervals import Interval, interval, ratio_interval
from kernels_warmup.compile import compile_model
from kernels_warmup.recipes import mode_for
from kernels_warmup.shapes import CompiledShape
from serve.model.loading import load_model
from serve.model.sdxl import SdxlModel
from serve.settings import DEMO_MODEL

ENDS = (1.0, 0.8, 0.6, 0.5)
STEPS = 20
GUIDANCE = 5.0


@dataclass(frozen=True)
class Drawn:
    """The pictures of one end of guidance, and the seconds of each run, in the order of drawing."""

    pictures: list[Pixels]
    seconds: list[float]


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        seconds: the median time of a run, from the text to pixels.
        ratio: that over the median time with guidance in all steps, in pairs.
    """

    seconds: Interval
    ratio: Interval
    scores: Scores


def draw_all(
    model: SdxlModel,
    prompts: Sequence[HeldOutPrompt],
    ends: Sequence[float],
    steps: int = STEPS,
    images: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[float, Drawn]:
    """Draw every prompt with every end of guidance, in turns.

    Args:
        prompts: any number of the same size follow one another.
        images: pictures of one run; the last run of a size may have fewer.
    """
    drawn = {end: Drawn([], []) for end in ends}
    for turn, chunk in enumerate(_runs(prompts, images)):
        first = turn % len(ends)
        for end in (*ends[first:], *ends[:first]):
            began = clock()
            pictures = _draw(model, chunk, end, steps)
            drawn[end].seconds.append(clock() - began)
            drawn[end].pictures.extend(pictures)
    return drawn


def _runs(prompts: Sequence[HeldOutPrompt], images: int) -> list[list[HeldOutPrompt]]:
    runs: list[list[HeldOutPrompt]] = []
    for prompt in prompts:
        full = not runs or len(runs[-1]) == images
        if full or _size(runs[-1][0]) != _size(prompt):
            runs.append([])
        runs[-1].append(prompt)
    return runs


def _size(prompt: HeldOutPrompt) -> CompiledShape:
    return CompiledShape(prompt.scene.width, prompt.scene.height)


def _draw(
    model: SdxlModel, prompts: Sequence[HeldOutPrompt], end: float, steps: int
) -> list[Pixels]:
    """One run, as the service runs it."""
    guided_steps = int(end * steps + 0.5)
    shape = _size(prompts[0])
    conditioning = model.encode_prompts(
        [prompt.text for prompt in prompts],
        [""] * len(prompts),
        guided_steps > 0,
        shape,
        guidance_ends=guided_steps < steps,
    )
    latents = model.denoise(
        conditioning,
        shape=shape,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        guided_steps=guided_steps,
        seeds=[prompt.seed for prompt in prompts],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda *_: None,
    )
    pixels = model.decode(latents).pixels
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return [picture.numpy() for picture in pixels]


def outcomes(
    prompts: Sequence[HeldOutPrompt], drawn: Mapping[float, Drawn]
) -> dict[float, Outcome]:
    """A row for each end of guidance. The first is what the others are compared with."""
    base = next(iter(drawn.values())).seconds
    return {
        end: Outcome(
            interval(of.seconds), ratio_interval(base, of.seconds), score(prompts, of.pictures)
        )
        for end, of in drawn.items()
    }


def as_table(rows: Mapping[float, Outcome]) -> str:
    """The rows in Markdown."""
    columns = ("background", "colour", "shape", "size", "place", "everything")
    titles = ("`guidance_end`", "a run", "of the time at 1", *columns)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for end, row in rows.items():
        shares = [getattr(row.scores, column) for column in columns]
        ratio = f"{row.ratio.point:.2f} ({row.ratio.low:.2f} to {row.ratio.high:.2f})"
        cells = [f"{end:g}", f"{1e3 * row.seconds.point:.0f} ms", ratio]
        lines.append(f"| {' | '.join([*cells, *(f'{share:.1%}' for share in shares)])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time against score, for guidance that ends after a share of the steps."
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=50, help="per size and number of objects")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--images", type=int, default=1, help="pictures of one run")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="time on the CPU instead of the wall clock, for a machine that is busy",
    )
    parser.add_argument("--json", type=output_file, help="write the figures here")
    arguments = parser.parse_args()
    model = load_model(DEMO_MODEL, device_name=arguments.device, dtype_name=arguments.dtype)
    prompts = [prompt for row in prompts_by_row(arguments.prompts).values() for prompt in row]
    with code_kept():
        mode = mode_for("auto", model.device)
        model.text = compile_model(model.pipeline, mode=mode).text
        warm = [*prompts[: arguments.images], *prompts[-arguments.images :]]
        draw_all(model, warm, ENDS, arguments.steps, arguments.images)
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        drawn = draw_all(model, prompts, ENDS, arguments.steps, arguments.images, clock)
    rows = outcomes(prompts, drawn)
    sys.stdout.write(f"{as_table(rows)}\n{len(prompts)} pictures of each\n")
    if arguments.json:
        record = {
            "command": "python -m bench.demo_model.guidance_end",
            **circumstances(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "mode": mode,
            "steps": arguments.steps,
            "images": arguments.images,
            "guidance": GUIDANCE,
            "clock": "process CPU time" if arguments.cpu_time else "wall",
            "pictures": len(prompts),
            "seconds": {end: of.seconds for end, of in drawn.items()},
            "rows": {end: asdict(row) for end, row in rows.items()},
        }
        write_json(arguments.json, record)


if __name__ == "__main__":
    main()
