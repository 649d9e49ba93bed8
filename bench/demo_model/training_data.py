"""The demo model's training data: random scenes, rendered, described and put on the device."""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from numpy.lib.format import open_memmap
from torch import Tensor

from bench.demo_model.architecture import MAX_TOKENS
from bench.demo_model.scenes import Scene, caption, draw_scene, render
from bench.demo_model.training_plan import TrainingPlan
from serve.demo_model import DEMO_SIZES

CAPTIONS_PER_SCENE = 4
_SIZE_OF_STEP = (0, 0, 1)
"""Indices into DEMO_SIZES, one a step in turn: of three batches one has the second size."""
_CHUNK = 250
"""Scenes that one process renders at a time."""
Restyle = Callable[[Scene], Scene]
"""Changes how a scene is drawn, but not its captions. Other processes must be able to import it."""


@dataclass
class TrainingScenes:
    """All scenes of one size, on the training device."""

    width: int
    height: int
    pixels: Tensor
    """(scenes, 3, height, width) bytes."""
    tokens: Tensor
    """(scenes, captions, 77)."""
    time_ids: Tensor
    """(6,): original size, crop and target size, as the pipeline passes them to the UNet."""
    moments: Tensor = field(default_factory=lambda: torch.empty(0))
    """(scenes, 8, height/8, width/8): mean and deviation of the VAE's posterior, once encoded."""


def load_scenes(
    plan: TrainingPlan,
    tokenize: Callable[[list[str]], Tensor],
    device: torch.device,
    workers: int,
    restyle: Restyle | None = None,
) -> list[TrainingScenes]:
    """Render the scenes in `workers` processes and put them on the device; one entry a size."""
    scenes = []
    with tempfile.TemporaryDirectory() as folder:
        for pixels, captions in render_scenes(plan, workers, Path(folder), restyle):
            count, height, width, _ = pixels.shape
            tokens = tokenize(captions).view(count, CAPTIONS_PER_SCENE, MAX_TOKENS)
            on_device = torch.empty((count, 3, height, width), dtype=torch.uint8, device=device)
            for start in range(0, count, 4096):
                part = torch.from_numpy(np.array(pixels[start : start + 4096])).to(device)
                on_device[start : start + 4096] = part.permute(0, 3, 1, 2)
            time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
            scenes.append(
                TrainingScenes(width, height, on_device, tokens.to(device), time_ids.to(device))
            )
    return scenes


def scenes_of_step(scenes: list[TrainingScenes], step: int) -> TrainingScenes:
    """The size that a training step draws its batch from."""
    return scenes[_SIZE_OF_STEP[step % len(_SIZE_OF_STEP)]]


def render_scenes(
    plan: TrainingPlan, workers: int, folder: Path, restyle: Restyle | None = None
) -> list[tuple[np.memmap, list[str]]]:
    """For each size all training scenes: pixels, in a file under `folder`, and captions."""
    jobs: list[_Job] = []
    results = []
    for index, (width, height) in enumerate(DEMO_SIZES):
        count = max(1, plan.scenes * _SIZE_OF_STEP.count(index) // len(_SIZE_OF_STEP))
        path = folder / f"{width}x{height}.npy"
        pixels = open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, height, width, 3))
        captions: list[str] = []
        results.append((pixels, captions))
        jobs += [
            _Job(path, start, min(_CHUNK, count - start), [plan.seed, index, start], restyle)
            for start in range(0, count, _CHUNK)
        ]
    if workers <= 1:
        rendered: Iterator[list[str]] = map(_render_chunk, jobs)
    else:
        rendered = _render_in_processes(jobs, min(workers, len(jobs)))
    by_path = {Path(str(pixels.filename)): captions for pixels, captions in results}
    for job, captions in zip(jobs, rendered, strict=True):
        by_path[job.path] += captions
    return results


@dataclass(frozen=True)
class _Job:
    """A chunk of scenes, rendered into a file."""

    path: Path
    start: int
    count: int
    seed: list[int]
    restyle: Restyle | None


def _render_in_processes(jobs: list[_Job], workers: int) -> Iterator[list[str]]:
    # Forked workers need not import torch again. Other systems than Linux cannot fork safely.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(workers) as pool:
        yield from pool.imap(_render_chunk, jobs)


def _render_chunk(job: _Job) -> list[str]:
    rng = np.random.default_rng(job.seed)
    pixels = np.load(job.path, mmap_mode="r+")
    _, height, width, _ = pixels.shape
    captions = []
    for index in range(job.start, job.start + job.count):
        scene = draw_scene(rng, width, height)
        pixels[index] = render(job.restyle(scene) if job.restyle else scene)
        captions += [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]
    return captions


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: list[TrainingScenes], batch: int) -> None:
    """Encode every scene, and fill its `moments`."""
    for some in scenes:
        parts = []
        for start in range(0, len(some.pixels), batch):
            pixels = some.pixels[start : start + batch].float() / 127.5 - 1
            posterior = vae.encode(pixels).latent_dist
            parts.append(torch.cat([posterior.mean, posterior.std], dim=1))
        some.moments = torch.cat(parts)


def tokenizer_of(pipeline: StableDiffusionXLPipeline) -> Callable[[list[str]], Tensor]:
    """A function from captions to (captions, 77) token ids, as the pipeline computes them."""

    def tokenize(captions: list[str]) -> Tensor:
        encoded = pipeline.tokenizer(
            captions, padding="max_length", max_length=MAX_TOKENS, truncation=True
        )
        return torch.tensor(np.array(encoded.input_ids, dtype=np.int16))

    return tokenize
