"""Whether the demo model draws what the prompt says: held-out prompts, read back from the pixels.

    python -m bench.demo_model.evaluate

Prints the figures of the model card. It evaluates any SDXL directory, loaded as by the service.
"""

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image

from bench.demo_model.classifier import Reading, SeenThing, place_of, read
from bench.demo_model.scenes import Pixels, Scene, draw_scene, full_caption, render
from bench.outputs import output_file, write_json
from serve.demo_model import DEMO_SIZES, checkpoint_path
from serve.model.loading import load_model

_PROMPT_SEED = 20_000
_PSNR_SEED = 30_000
_GRID_SIDE = 8
_GRID_GAP = 4


@dataclass(frozen=True)
class HeldOutPrompt:
    """A held-out scene, a text that describes it, and the seed of the picture."""

    scene: Scene
    text: str
    seed: int


@dataclass(frozen=True)
class DrawSettings:
    """How the model draws pictures."""

    steps: int = 20
    guidance: float = 5.0
    batch: int = 8


@dataclass(frozen=True)
class Scores:
    """In which share of the pictures each part is as the prompt says."""

    pictures: int
    background: float
    colour: float
    shape: float
    size: float
    place: float
    everything: float


def held_out_prompts(count: int, objects: int, width: int, height: int) -> list[HeldOutPrompt]:
    """Held-out scenes with complete captions; the same in every run."""
    rng = np.random.default_rng([_PROMPT_SEED, objects, width, height])
    prompts = []
    for seed in range(count):
        scene = draw_scene(rng, width, height, objects=objects, held_out=True)
        prompts.append(HeldOutPrompt(scene, full_caption(scene, rng), seed))
    return prompts


def draw(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[HeldOutPrompt],
    settings: DrawSettings,
) -> list[Pixels]:
    """A picture for each prompt, (height, width, 3) bytes; all prompts must have one size."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Pixels] = []
    for start in range(0, len(prompts), settings.batch):
        chunk = prompts[start : start + settings.batch]
        drawn = pipeline(
            prompt=[prompt.text for prompt in chunk],
            width=chunk[0].scene.width,
            height=chunk[0].scene.height,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            # Noise from the CPU, so that a seed gives the same picture on every device.
            generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in chunk],
            output_type="np",
        ).images
        pictures += [np.rint(picture * 255).astype(np.uint8) for picture in drawn]
    return pictures


def score(prompts: Sequence[HeldOutPrompt], pictures: Sequence[Pixels]) -> Scores:
    """Compare each picture with its prompt."""
    marks = np.array(
        [
            _marks(prompt.scene, read(picture))
            for prompt, picture in zip(prompts, pictures, strict=True)
        ],
        dtype=float,
    )
    background, colour, shape, size, place = (float(share) for share in marks.mean(axis=0))
    everything = float(marks.all(axis=1).mean())
    return Scores(len(prompts), background, colour, shape, size, place, everything)


def _marks(scene: Scene, seen: Reading) -> tuple[bool, bool, bool, bool, bool]:
    """Whether background, colours, shapes, sizes and place are right, of all objects.

    Objects are matched by position, so two objects with exchanged colours are wrong. With too few
    or too many objects everything but the background is wrong.
    """
    background = seen.background == scene.background
    if len(seen.things) != len(scene.things):
        return background, False, False, False, False
    if len(scene.things) == 1:
        wanted, things = list(scene.things), list(seen.things)
        place = place_of(things[0]) == scene.place
    else:
        sideways = scene.relation in ("left of", "right of")
        wanted = sorted(scene.things, key=lambda thing: thing.x if sideways else thing.y)
        things = sorted(seen.things, key=lambda thing: thing.x if sideways else thing.y)
        place = _lies_sideways(things) == sideways
    pairs = list(zip(wanted, things, strict=True))
    return (
        background,
        all(thing.colour == other.colour for thing, other in pairs),
        all(thing.shape == other.shape for thing, other in pairs),
        all(thing.size == other.size for thing, other in pairs),
        place,
    )


def _lies_sideways(things: Sequence[SeenThing]) -> bool:
    first, second = things
    return abs(first.x - second.x) > abs(first.y - second.y)


def reconstruction_psnr(vae: AutoencoderKL, width: int, height: int, count: int) -> float:
    """PSNR in decibels between held-out scenes and their reconstructions, over all pixels."""
    rng = np.random.default_rng([_PSNR_SEED, width, height])
    error, batch = 0.0, 32
    for start in range(0, count, batch):
        scenes = [
            draw_scene(rng, width, height, held_out=True) for _ in range(min(batch, count - start))
        ]
        originals = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
        inputs = originals.permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
        with torch.inference_mode():
            outputs = vae.decode(vae.encode(inputs).latent_dist.mode()).sample
        levels = ((outputs.float().clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).cpu()
        error += float((levels - originals.float()).square().mean(dim=(1, 2, 3)).sum())
    return 10 * math.log10(255**2 / (error / count))


def evaluate(
    pipeline: StableDiffusionXLPipeline, settings: DrawSettings, count: int
) -> dict[str, dict[str, float]]:
    """All figures of the model card, for each size that the model was trained at.

    `count`: prompts for each size and number of objects.
    """
    figures: dict[str, dict[str, float]] = {}
    for width, height in DEMO_SIZES:
        size = f"{width}x{height}"
        psnr = reconstruction_psnr(pipeline.vae, width, height, count)
        figures[f"{size} vae"] = {"psnr_db": psnr}
        for objects, name in ((1, "one object"), (2, "two objects")):
            prompts = held_out_prompts(count, objects, width, height)
            pictures = draw(pipeline, prompts, settings)
            figures[f"{size} {name}"] = asdict(score(prompts, pictures))
    return figures


def as_text(figures: dict[str, dict[str, float]]) -> str:
    """The figures, one line a row; shares in percent."""
    lines = []
    for row, values in figures.items():
        cells = (
            f"{name} {value:.1%}"
            if isinstance(value, float) and name != "psnr_db"
            else f"{name} {value:.4g}"
            for name, value in values.items()
        )
        lines.append(f"{row:22s} {', '.join(cells)}")
    return "\n".join(lines)


def as_table(figures: dict[str, dict[str, float]]) -> str:
    """The figures in Markdown: a table of the shares, then a sentence with the VAE's PSNR."""
    shares = {row: values for row, values in figures.items() if "psnr_db" not in values}
    columns = list(next(iter(shares.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, values in shares.items():
        cells = (f"{v:.1%}" if isinstance(v, float) else f"{v}" for v in values.values())
        lines.append(f"| {row} | {' | '.join(cells)} |")
    kept = (
        f"{values['psnr_db']:.1f} dB at {row.split()[0]}"
        for row, values in figures.items()
        if "psnr_db" in values
    )
    return "\n".join([*lines, "", f"The VAE gives held-out scenes back with {', '.join(kept)}."])


def grid(pipeline: StableDiffusionXLPipeline, settings: DrawSettings) -> Image.Image:
    """64 held-out pictures in 8 rows; every fourth row has two objects, the others one."""
    width, height = DEMO_SIZES[0]
    rows = _GRID_SIDE
    paired = held_out_prompts(rows // 4 * _GRID_SIDE, 2, width, height)
    single = held_out_prompts((rows - rows // 4) * _GRID_SIDE, 1, width, height)
    pairs, singles = draw(pipeline, paired, settings), draw(pipeline, single, settings)
    sheet = Image.new(
        "RGB",
        (_GRID_SIDE * (width + _GRID_GAP) - _GRID_GAP, rows * (height + _GRID_GAP) - _GRID_GAP),
        "white",
    )
    for row in range(rows):
        source = pairs if row % 4 == 3 else singles
        for column in range(_GRID_SIDE):
            corner = (column * (width + _GRID_GAP), row * (height + _GRID_GAP))
            sheet.paste(Image.fromarray(source.pop(0)), corner)
    return sheet


def load(directory: Path, device: str) -> StableDiffusionXLPipeline:
    """The pipeline as the service loads it, in float32.

    Raises:
        ModelError: the directory holds no complete SDXL pipeline.
    """
    return load_model(str(directory), device_name=device, dtype_name="float32").pipeline


def circumstances(device: torch.device) -> dict[str, str | int]:
    """The machine and the versions that the figures were measured with."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "machine": gpu or f"{platform.system()} {platform.machine()}, CPU",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Render held-out prompts and read the pixels back."
    )
    parser.add_argument("--model", type=Path, default=checkpoint_path())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=200, help="per size and number of objects")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--grid", type=output_file, help="write 64 pictures here, as one PNG")
    arguments = parser.parse_args()
    pipeline = load(arguments.model, arguments.device)
    settings = DrawSettings(arguments.steps, arguments.guidance, arguments.batch)
    start = time.perf_counter()
    figures = evaluate(pipeline, settings, arguments.prompts)
    seconds = round(time.perf_counter() - start)
    sys.stdout.write(f"{as_text(figures)}\n{seconds} s\n")
    if arguments.json:
        record = {
            "command": "python -m bench.demo_model.evaluate",
            **circumstances(pipeline.device),
            "sampling": asdict(settings),
            "seconds": seconds,
            "figures": figures,
        }
        write_json(arguments.json, record)
    if arguments.grid:
        grid(pipeline, settings).save(arguments.grid, optimize=True)


if __name__ == "__main__":
    main()
