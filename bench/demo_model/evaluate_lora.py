"""Whether the demo LoRA draws night scenes, still follows the prompt, and leaves the base alone.

    python -m bench.demo_model.evaluate_lora

Draws the checkpoint's own held-out prompts and seeds at several scales, with the LoRA added to
the weights here and not by the service. At scale 0 no value may differ from the base model's.
"""

import argparse
import hashlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from bench.demo_model.evaluate import (
    DrawSettings,
    HeldOutPrompt,
    circumstances,
    draw,
    held_out_prompts,
    load,
    score,
)
from bench.demo_model.lossless import Distance, distance, prompts_by_row
from bench.demo_model.night import at_night, read_style, without_moon
from bench.demo_model.scenes import Pixels
from bench.outputs import output_file, write_json
from serve.demo_model import DEMO_SIZES, checkpoint_path, loras_path

_DOWN_KEY = re.compile(r"unet\.(?P<layer>.+)\.lora_A\.weight")
_GAP = 4


@dataclass(frozen=True)
class StyleScores:
    """In which share of the pictures each part is as the prompt, or the style, says."""

    pictures: int
    as_prompted: float
    """Everything is right as the checkpoint's own evaluation judges it: not at night."""
    black_background: float
    moon: float
    night: float
    """A black background and a moon, at least."""
    colour: float
    """This and what follows is judged against the prompt's scene at night, without the moon."""
    shape: float
    size: float
    place: float
    everything: float
    """Night, and everything else as the prompt says."""


@dataclass(frozen=True)
class ScaleFigures:
    """The pictures of one scale, size and number of objects."""

    scores: StyleScores
    from_base: Distance
    """From the same prompts and seeds drawn without the LoRA."""


def read_lora(file: Path) -> dict[str, Tensor]:
    """up @ down of each adapted layer, float32, by the layer's name in the UNet.

    The file has no alpha, so a scale of 1 adds exactly this.
    """
    products = {}
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            if found := _DOWN_KEY.fullmatch(key):
                up = tensors.get_tensor(key.replace(".lora_A.", ".lora_B."))
                products[found["layer"]] = up.float() @ tensors.get_tensor(key).float()
    return products


@contextmanager
def with_lora(
    unet: UNet2DConditionModel, products: dict[str, Tensor], scale: float
) -> Iterator[None]:
    """A block in which scale times the products are added to the UNet's weights."""
    weights = {name: unet.get_submodule(name).weight for name in products}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight += scale * products[name].to(weight)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


def score_style(prompts: Sequence[HeldOutPrompt], pictures: Sequence[Pixels]) -> StyleScores:
    """Compare each picture with its prompt, and with its prompt at night."""
    styles = [read_style(picture) for picture in pictures]
    nights = [style.black_background and style.moon for style in styles]
    # One at a time, because everything is right only in a picture that is right and at night.
    scores = [
        score([replace(prompt, scene=at_night(prompt.scene))], [without_moon(picture)])
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]
    complete = [night and one.everything == 1 for night, one in zip(nights, scores, strict=True)]
    return StyleScores(
        pictures=len(prompts),
        as_prompted=score(prompts, pictures).everything,
        black_background=_share(style.black_background for style in styles),
        moon=_share(style.moon for style in styles),
        night=_share(nights),
        colour=_share(one.colour == 1 for one in scores),
        shape=_share(one.shape == 1 for one in scores),
        size=_share(one.size == 1 for one in scores),
        place=_share(one.place == 1 for one in scores),
        everything=_share(complete),
    )


def _share(right: Iterable[bool]) -> float:
    return float(np.mean(list(right)))


def evaluate_lora(
    pipeline: StableDiffusionXLPipeline,
    products: dict[str, Tensor],
    scales: Sequence[float],
    settings: DrawSettings,
    count: int,
) -> dict[str, dict[str, ScaleFigures]]:
    """The figures by scale, then by size and number of objects.

    `count`: prompts for each size and number of objects.
    """
    rows = prompts_by_row(count)
    base = {row: draw(pipeline, prompts, settings) for row, prompts in rows.items()}
    figures: dict[str, dict[str, ScaleFigures]] = {}
    for scale in scales:
        with with_lora(pipeline.unet, products, scale):
            figures[f"{scale:g}"] = {
                row: _compare(prompts, base[row], draw(pipeline, prompts, settings))
                for row, prompts in rows.items()
            }
    return figures


def _compare(
    prompts: Sequence[HeldOutPrompt], base: Sequence[Pixels], pictures: Sequence[Pixels]
) -> ScaleFigures:
    return ScaleFigures(score_style(prompts, pictures), distance(base, pictures))


def overall(rows: dict[str, ScaleFigures]) -> ScaleFigures:
    """The figures of all rows together. Every row has equally many pictures."""
    scores = [asdict(found.scores) for found in rows.values()]
    shares = {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}
    pictures = sum(found.scores.pictures for found in rows.values())
    distances = [found.from_base for found in rows.values()]
    return ScaleFigures(
        StyleScores(**(shares | {"pictures": pictures})),  # type: ignore[arg-type]
        Distance(
            float(np.mean([one.mean for one in distances])),
            max(one.maximum for one in distances),
            float(np.mean([one.differing for one in distances])),
        ),
    )


def as_table(figures: dict[str, dict[str, ScaleFigures]]) -> str:
    """The figures in Markdown: for each scale a row of all pictures, then each size and number."""
    columns = [field.name.replace("_", " ") for field in fields(StyleScores)]
    lines = [
        f"| scale | | {' | '.join(columns)} | levels from base |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for scale, rows in figures.items():
        for row, found in {"all": overall(rows), **rows}.items():
            shares = asdict(found.scores).values()
            cells = [f"{value:.0%}" if isinstance(value, float) else str(value) for value in shares]
            lines.append(f"| {scale} | {row} | {' | '.join(cells)} | {found.from_base.mean:.3g} |")
    return "\n".join(lines)


def strip(
    pipeline: StableDiffusionXLPipeline,
    products: dict[str, Tensor],
    scales: Sequence[float],
    settings: DrawSettings,
) -> Image.Image:
    """Eight held-out prompts in columns, and a row for each scale."""
    width, height = DEMO_SIZES[0]
    prompts = held_out_prompts(5, 1, width, height) + held_out_prompts(3, 2, width, height)
    sheet = Image.new(
        "RGB",
        (len(prompts) * (width + _GAP) - _GAP, len(scales) * (height + _GAP) - _GAP),
        "white",
    )
    for row, scale in enumerate(scales):
        with with_lora(pipeline.unet, products, scale):
            for column, picture in enumerate(draw(pipeline, prompts, settings)):
                corner = (column * (width + _GAP), row * (height + _GAP))
                sheet.paste(Image.fromarray(picture), corner)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw held-out prompts with the LoRA at several scales, and judge the pictures."
    )
    parser.add_argument("--model", type=Path, default=checkpoint_path())
    parser.add_argument("--lora", type=Path, default=loras_path() / "night.safetensors")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=50, help="per size and number of objects")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--strip", type=output_file, help="write pictures of each scale here")
    arguments = parser.parse_args()
    pipeline = load(arguments.model, arguments.device)
    products = read_lora(arguments.lora)
    settings = DrawSettings(arguments.steps, arguments.guidance, arguments.batch)
    start = time.perf_counter()
    figures = evaluate_lora(pipeline, products, arguments.scales, settings, arguments.prompts)
    seconds = round(time.perf_counter() - start)
    sys.stdout.write(f"{as_table(figures)}\n{seconds} s\n")
    if arguments.json:
        record = {
            "command": "python -m bench.demo_model.evaluate_lora"
            f" --prompts {arguments.prompts}"
            f" --scales {' '.join(f'{scale:g}' for scale in arguments.scales)}",
            "lora_sha256": hashlib.sha256(arguments.lora.read_bytes()).hexdigest(),
            **circumstances(pipeline.device),
            "sampling": asdict(settings),
            "seconds": seconds,
            "scales": {
                scale: {row: asdict(found) for row, found in rows.items()}
                for scale, rows in figures.items()
            },
        }
        write_json(arguments.json, record)
    if arguments.strip:
        strip(pipeline, products, arguments.scales, settings).save(arguments.strip, optimize=True)


if __name__ == "__main__":
    main()
