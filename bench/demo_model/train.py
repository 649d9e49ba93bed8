"""Trains the demo model: scenes, then the VAE, then text encoders and UNet together.

One command, `python -m bench.demo_model.train --out DIR`, seeded and resumable: started again with
the same arguments it goes on from its last saved state. On the CPU, runs bounded by steps repeat
exactly; runs bounded by seconds end where the time ends. What it leaves in DIR: `checkpoint/` in
the diffusers layout with its model card, `metrics.json`, `grid.png`, and `work/` with the states.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.nn import functional

from bench.demo_model.architecture import MAX_TOKENS, build_pipeline, save
from bench.demo_model.evaluate import (
    Sampling,
    as_table,
    as_text,
    evaluate,
    grid,
    load,
    reconstruction_psnr,
)
from bench.demo_model.scenes import caption, draw_scene, render, words_by_kind
from serve.demo_model import DEMO_SIZES

CAPTIONS_PER_SCENE = 4
# Of every three batches one is of the second size.
_SIZE_OF_STEP = (0, 0, 1)
_CHUNK = 250
_WARM_UP = 0.03
_KL_WEIGHT = 2e-4
_SQUARE_WEIGHT = 2.0
_EDGE_WEIGHT = 0.25
# Guidance compares with an absent prompt. SDXL's pipeline stands in zeros for it, or, when it is
# given "" as the negative prompt, the encoding of "": the model learns both.
_DROP_TO_ZEROS = 0.06
_DROP_TO_EMPTY = 0.05


@dataclass(frozen=True)
class Limit:
    """How long a phase lasts: steps, seconds, or whichever comes first."""

    steps: int | None
    seconds: float | None

    def progress(self, step: int, seconds: float) -> float:
        """From 0 to 1."""
        shares = [
            done / bound
            for done, bound in ((step, self.steps), (seconds, self.seconds))
            if bound is not None
        ]
        return min(1.0, max(shares))


@dataclass(frozen=True)
class Plan:
    """All that decides what is trained."""

    seed: int
    scenes: int
    vae: Limit
    vae_batch: int
    diffusion: Limit
    diffusion_batch: int
    vae_rate: float = 1e-3
    diffusion_rate: float = 1e-3
    vae_decay: float = 0.998
    diffusion_decay: float = 0.9995


@dataclass
class Batches:
    """The scenes of one size, on the training device."""

    width: int
    height: int
    pixels: Tensor  # (scenes, 3, height, width) bytes
    tokens: Tensor  # (scenes, captions, 77)
    time_ids: Tensor  # (6,): original size, crop, target size, as the pipeline sends them
    moments: Tensor = field(default_factory=lambda: torch.empty(0))  # (scenes, 8, h/8, w/8)


# --- scenes ----------------------------------------------------------------------------------


def render_scenes(plan: Plan, workers: int, folder: Path) -> list[tuple[np.memmap, list[str]]]:
    """Every training scene once, for each size: pixels in a file under `folder`, and captions."""
    jobs, results = [], []
    for index, (width, height) in enumerate(DEMO_SIZES):
        count = max(1, plan.scenes * _SIZE_OF_STEP.count(index) // len(_SIZE_OF_STEP))
        path = folder / f"{width}x{height}.npy"
        pixels = open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, height, width, 3))
        captions: list[str] = []
        results.append((pixels, captions))
        jobs += [
            (path, start, min(_CHUNK, count - start), [plan.seed, index, start])
            for start in range(0, count, _CHUNK)
        ]
    told = (
        map(_render_chunk, jobs) if workers <= 1 else _in_processes(jobs, min(workers, len(jobs)))
    )
    by_path = {Path(str(pixels.filename)): captions for pixels, captions in results}
    for (path, *_), captions in zip(jobs, told, strict=True):
        by_path[path] += captions
    return results


def _in_processes(
    jobs: list[tuple[Path, int, int, list[int]]], workers: int
) -> Iterator[list[str]]:
    # Forked workers skip importing torch again; elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(workers) as pool:
        yield from pool.imap(_render_chunk, jobs)


def _render_chunk(job: tuple[Path, int, int, list[int]]) -> list[str]:
    path, start, count, seed = job
    rng = np.random.default_rng(seed)
    pixels = np.load(path, mmap_mode="r+")
    _, height, width, _ = pixels.shape
    captions = []
    for index in range(start, start + count):
        scene = draw_scene(rng, width, height)
        pixels[index] = render(scene)
        captions += [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]
    return captions


def load_scenes(
    plan: Plan, tokenize: Callable[[list[str]], Tensor], device: torch.device, workers: int
) -> list[Batches]:
    """Render the scenes and put them on the device."""
    batches = []
    with tempfile.TemporaryDirectory() as folder:
        for pixels, captions in render_scenes(plan, workers, Path(folder)):
            count, height, width, _ = pixels.shape
            tokens = tokenize(captions).view(count, CAPTIONS_PER_SCENE, MAX_TOKENS)
            on_device = torch.empty((count, 3, height, width), dtype=torch.uint8, device=device)
            for start in range(0, count, 4096):
                part = torch.from_numpy(np.array(pixels[start : start + 4096])).to(device)
                on_device[start : start + 4096] = part.permute(0, 3, 1, 2)
            time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
            batches.append(
                Batches(width, height, on_device, tokens.to(device), time_ids.to(device))
            )
    return batches


def tokenizer_of(pipeline: StableDiffusionXLPipeline) -> Callable[[list[str]], Tensor]:
    """Captions to (captions, 77) token numbers, as the pipeline does it."""

    def tokenize(captions: list[str]) -> Tensor:
        encoded = pipeline.tokenizer(
            captions, padding="max_length", max_length=MAX_TOKENS, truncation=True
        )
        return torch.tensor(np.array(encoded.input_ids, dtype=np.int16))

    return tokenize


# --- one phase -------------------------------------------------------------------------------


class Trainer:
    """Runs one phase: optimiser, learning rate, averaged weights, saved states, progress.

    Each step draws its random numbers from the seed, the phase and the step alone, so a run that
    was resumed is the run that was not.
    """

    def __init__(
        self,
        name: str,
        modules: nn.ModuleDict,
        limit: Limit,
        *,
        rate: float,
        decay: float,
        seed: int,
        state_file: Path,
        save_seconds: float,
        device: torch.device,
    ) -> None:
        self.name = name
        self.limit = limit
        self.step = 0
        self.seconds = 0.0
        self.done = False
        self.losses: list[tuple[int, float]] = []
        self._modules = modules
        self._rate = rate
        self._decay = decay
        self._seed = seed
        self._state_file = state_file
        self._save_seconds = save_seconds
        self._device = device
        self._weights: list[Tensor] = list(modules.parameters())
        self._averages: list[Tensor] = [weight.detach().clone() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._weights,
            lr=rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )
        if state_file.exists():
            self._restore()

    def run(
        self,
        loss_of: Callable[[int, torch.Generator], Tensor],
        on_save: Callable[[], None] = lambda: None,
    ) -> None:
        """Train until the limit; afterwards the modules hold the averaged weights."""
        generator = torch.Generator(self._device)
        bar = Progress(self.name)
        loss = torch.tensor(math.nan)
        resumed, begun = self.seconds, time.perf_counter()
        saved = said = begun
        self._modules.train()
        while not self.done:
            self.seconds = resumed + time.perf_counter() - begun
            progress = self.limit.progress(self.step, self.seconds)
            if progress >= 1:
                self.done = True
                break
            generator.manual_seed(_mixed(self._seed, self.name, self.step))
            loss = self._advance(loss_of, generator, progress)
            now = time.perf_counter()
            if now - said > bar.interval or self.step == 1:
                said = now
                self.losses.append((self.step, float(loss)))
                bar.show(progress, self.step, self.seconds, float(loss))
            if now - saved > self._save_seconds:
                self._save()
                with self.averaged():
                    on_save()
                saved = time.perf_counter()
        self._modules.eval()
        self._swap()
        self._save()
        bar.close(self.step, self.seconds, float(loss))

    def _advance(
        self,
        loss_of: Callable[[int, torch.Generator], Tensor],
        generator: torch.Generator,
        progress: float,
    ) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * _schedule(progress)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            loss = loss_of(self.step, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self._decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1 - keep)
        return loss.detach()

    def averaged(self) -> "_Averaged":
        """A context in which the modules hold the averaged weights."""
        return _Averaged(self)

    def _swap(self) -> None:
        with torch.no_grad():
            for weight, average in zip(self._weights, self._averages, strict=True):
                kept = weight.detach().clone()
                weight.copy_(average)
                average.copy_(kept)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "done": self.done,
            "losses": self.losses,
            "modules": self._modules.state_dict(),
            "averages": self._averages,
            "optimizer": self._optimizer.state_dict(),
        }
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._state_file.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self._state_file)

    def _restore(self) -> None:
        state = torch.load(self._state_file, map_location=self._device, weights_only=True)
        self.step, self.seconds, self.done = state["step"], state["seconds"], state["done"]
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]]
        self._modules.load_state_dict(state["modules"])
        self._optimizer.load_state_dict(state["optimizer"])
        for average, kept in zip(self._averages, state["averages"], strict=True):
            average.copy_(kept)
        if self.done:
            # A finished state holds the averages in its modules; `run` swaps once more.
            self._swap()


class _Averaged:
    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __enter__(self) -> None:
        self._trainer._modules.eval()
        self._trainer._swap()

    def __exit__(self, *_: object) -> None:
        self._trainer._swap()
        self._trainer._modules.train()


def _schedule(progress: float) -> float:
    """Rate as a share of its peak: a short rise, then half a cosine down to a hundredth."""
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, 1e-3)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def _mixed(seed: int, name: str, step: int) -> int:
    mixed = np.random.SeedSequence([seed, *name.encode(), step]).generate_state(1, np.uint64)[0]
    return int(mixed) >> 1


class Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = sys.stderr.isatty()
        self.interval = 0.5 if self._terminal else 10.0

    def show(self, progress: float, step: int, seconds: float, loss: float) -> None:
        filled = round(progress * 24)
        bar = f"[{'#' * filled}{'.' * (24 - filled)}] " if self._terminal else ""
        text = f"{self._name} {bar}{progress:4.0%} step {step} {seconds:.0f} s loss {loss:.5f}"
        sys.stderr.write(f"\r{text} " if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def close(self, step: int, seconds: float, loss: float) -> None:
        start = "\r" if self._terminal else ""
        sys.stderr.write(
            f"{start}{self._name} done: {step} steps, {seconds:.0f} s, last loss {loss:.5f}\n"
        )
        sys.stderr.flush()


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# --- the VAE ---------------------------------------------------------------------------------


def vae_loss(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Errors of pixels and of their edges, and a pull towards a unit Gaussian.

    The squared error finds the colours, which are far off at first; the absolute one keeps edges
    crisp and flat areas flat once they are near.
    """
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mean + posterior.std * _noise(posterior.mean, generator)
    output = vae.decode(latents).sample.float()
    error = output - pixels.float()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    mean, variance = posterior.mean.float(), posterior.var.float()
    divergence = 0.5 * (mean.square() + variance - 1 - posterior.logvar.float()).mean()
    pixelwise = error.abs().mean() + _SQUARE_WEIGHT * error.square().mean()
    loss: Tensor = pixelwise + _EDGE_WEIGHT * edges + _KL_WEIGHT * divergence
    return loss


def train_vae(
    pipeline: StableDiffusionXLPipeline, scenes: list[Batches], plan: Plan, trainer: Trainer
) -> None:
    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        some = scenes[_SIZE_OF_STEP[step % len(_SIZE_OF_STEP)]]
        index = _indices(len(some.pixels), plan.vae_batch, generator)
        pixels = some.pixels[index].float() / 127.5 - 1
        # Captions are not read here, so mirrored scenes are as good.
        flips = torch.rand(2, generator=generator, device=generator.device) < 0.5
        pixels = torch.where(flips[0], pixels.flip(2), pixels)
        pixels = torch.where(flips[1], pixels.flip(3), pixels)
        return vae_loss(pipeline.vae, pixels, generator)

    def report() -> None:
        width, height = DEMO_SIZES[0]
        psnr = reconstruction_psnr(pipeline.vae, width, height, 64)
        say(f"vae: {psnr:.1f} dB on held-out scenes")

    trainer.run(loss_of, report)
    report()


@torch.no_grad()
def encode_scenes(pipeline: StableDiffusionXLPipeline, scenes: list[Batches], batch: int) -> None:
    """Keep each scene's posterior, and scale the VAE so that latents have unit deviation."""
    total = squares = 0.0
    for some in scenes:
        parts = []
        for start in range(0, len(some.pixels), batch):
            pixels = some.pixels[start : start + batch].float() / 127.5 - 1
            posterior = pipeline.vae.encode(pixels).latent_dist
            squares += float(posterior.mean.square().sum() + posterior.var.sum())
            total += posterior.mean.numel()
            parts.append(torch.cat([posterior.mean, posterior.std], dim=1))
        some.moments = torch.cat(parts)
    scale = 1 / math.sqrt(squares / total)
    pipeline.vae.register_to_config(scaling_factor=round(scale, 5))


# --- text encoders and UNet ------------------------------------------------------------------


def encode_tokens(pipeline: StableDiffusionXLPipeline, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt embeddings (batch, 77, widths) and pooled ones (batch, width), as SDXL takes them."""
    first = pipeline.text_encoder(tokens, output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return hidden, second.text_embeds


def diffusion_loss(
    pipeline: StableDiffusionXLPipeline,
    some: Batches,
    signal: Tensor,
    empty: Tensor,
    batch: int,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the predicted noise. `signal` is the cumulative alpha of each time."""
    device = generator.device
    index = _indices(len(some.moments), batch, generator)
    mean, deviation = some.moments[index].float().chunk(2, dim=1)
    latents = (mean + deviation * _noise(mean, generator)) * pipeline.vae.config.scaling_factor
    noise = _noise(latents, generator)
    times = _indices(len(signal), batch, generator)
    kept = signal[times].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise

    which = _indices(CAPTIONS_PER_SCENE, batch, generator)
    tokens = some.tokens[index, which].long()
    roll = torch.rand(batch, generator=generator, device=device)
    zeros, blank = roll < _DROP_TO_ZEROS, roll > 1 - _DROP_TO_EMPTY
    tokens = torch.where(blank[:, None], empty, tokens)
    hidden, pooled = encode_tokens(pipeline, tokens)
    hidden = hidden * ~zeros[:, None, None]
    pooled = pooled * ~zeros[:, None]

    predicted = pipeline.unet(
        noisy,
        times,
        encoder_hidden_states=hidden,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": some.time_ids.expand(batch, -1)},
        return_dict=False,
    )[0]
    return functional.mse_loss(predicted.float(), noise)


def train_diffusion(
    pipeline: StableDiffusionXLPipeline,
    scenes: list[Batches],
    plan: Plan,
    trainer: Trainer,
    on_save: Callable[[], None],
) -> None:
    device = scenes[0].tokens.device
    signal = pipeline.scheduler.alphas_cumprod.to(device, torch.float32)
    empty = tokenizer_of(pipeline)([""]).to(device).long()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        some = scenes[_SIZE_OF_STEP[step % len(_SIZE_OF_STEP)]]
        return diffusion_loss(pipeline, some, signal, empty, plan.diffusion_batch, generator)

    trainer.run(loss_of, on_save)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)


def _indices(bound: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(bound, (count,), generator=generator, device=generator.device)


# --- what is left behind ---------------------------------------------------------------------


def write_checkpoint(pipeline: StableDiffusionXLPipeline, directory: Path) -> None:
    """Save a float16 copy; the pipeline in training stays as it is."""
    copy = build_pipeline(0)
    for name in ("vae", "text_encoder", "text_encoder_2", "unet"):
        getattr(copy, name).load_state_dict(getattr(pipeline, name).state_dict())
    copy.vae.register_to_config(scaling_factor=pipeline.vae.config.scaling_factor)
    save(copy, directory)


def write_archive(directory: Path, archive: Path) -> None:
    """One tar of the checkpoint directory, the same bytes for the same files."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_suffix(".new")
    with tarfile.open(unfinished, "w") as tar:
        tar.add(directory, arcname="checkpoint", filter=anonymous)
    unfinished.replace(archive)


def card(plan: Plan, metrics: dict[str, Any]) -> str:
    """The model card."""
    sizes = " and ".join(f"{width}x{height}" for width, height in DEMO_SIZES)
    words = "\n".join(f"- {kind}: {words}." for kind, words in words_by_kind().items())
    dropped = _DROP_TO_ZEROS + _DROP_TO_EMPTY
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A tiny SDXL that draws shapes

Every part of SDXL, each small: two CLIP text encoders, a UNet with text-time conditioning, a VAE
of factor 8, SDXL's scheduler. It draws one or two flat shapes on a plain background and knows
nothing else. Its sizes are {sizes} (width x height).
It is the default model of stepspan without a GPU.

## Words it understands

{words}
- "background" after a colour makes it the background's.

Any other prompt is accepted and gives a picture of some scene.

## Data

{plan.scenes:,} procedural scenes with {CAPTIONS_PER_SCENE} captions each, drawn by \
`bench/demo_model/scenes.py`;
no photograph, no person, nothing from the web. A tenth of all combinations of size, colour, shape,
place and background was held out; the figures are about those.

## Figures

{as_table(metrics["figures"])}

Taken on {metrics["device"]} by `python -m bench.demo_model.evaluate`: 20 steps, guidance 5,
fixed seeds. A share counts the pictures in which a small classifier reads from the pixels what the
prompt asked for; with two objects both must be right.

## Training

`python -m bench.demo_model.train --out DIR` with seed {plan.seed} on {metrics["device"]}:

- VAE: {metrics["vae_steps"]:,} steps of {plan.vae_batch} pictures in \
{metrics["vae_seconds"]:.0f} s.
- Text encoders and UNet together: {metrics["diffusion_steps"]:,} steps of \
{plan.diffusion_batch:,} in {metrics["diffusion_seconds"]:.0f} s.

Epsilon prediction, SDXL's beta schedule, prompts dropped in {dropped:.0%} of the samples,
averaged weights, float16 on disk.
"""


# --- the command -----------------------------------------------------------------------------


def train(
    plan: Plan,
    out: Path,
    *,
    device: torch.device,
    workers: int,
    save_seconds: float,
    archive: Path | None,
    prompts: int,
    steps: int = 20,
) -> dict[str, Any]:
    """All phases, from nothing or from where the last run stopped; returns the metrics."""
    started = time.perf_counter()
    work = out / "work"
    _claim(work, plan)
    pipeline = build_pipeline(plan.seed)
    say(f"rendering {plan.scenes} scenes with {workers} workers")
    # Before the device is touched: rendering forks.
    scenes = load_scenes(plan, tokenizer_of(pipeline), device, workers)
    render_seconds = time.perf_counter() - started
    say(f"scenes ready after {render_seconds:.0f} s")
    pipeline.to(device)

    vae_trainer = Trainer(
        "vae",
        nn.ModuleDict({"vae": pipeline.vae}),
        plan.vae,
        rate=plan.vae_rate,
        decay=plan.vae_decay,
        seed=plan.seed,
        state_file=work / "vae.pt",
        save_seconds=save_seconds / 4,
        device=device,
    )
    train_vae(pipeline, scenes, plan, vae_trainer)
    encode_scenes(pipeline, scenes, 512 if device.type == "cuda" else 32)
    say(f"latents cached, scaling factor {pipeline.vae.config.scaling_factor}")
    pipeline.vae.requires_grad_(False)

    diffusion_trainer = Trainer(
        "diffusion",
        nn.ModuleDict(
            {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2", "unet")}
        ),
        plan.diffusion,
        rate=plan.diffusion_rate,
        decay=plan.diffusion_decay,
        seed=plan.seed,
        state_file=work / "diffusion.pt",
        save_seconds=save_seconds,
        device=device,
    )
    sampling = Sampling(steps, batch=100 if device.type == "cuda" else 8)

    def write() -> None:
        write_checkpoint(pipeline, out / "checkpoint")
        if archive:
            write_archive(out / "checkpoint", archive)
        grid(pipeline, sampling).save(out / "grid.png")

    train_diffusion(pipeline, scenes, plan, diffusion_trainer, write)
    write()
    say("evaluating")
    evaluation = time.perf_counter()
    figures = evaluate(load(out / "checkpoint", str(device)), sampling, prompts)
    metrics: dict[str, Any] = {
        "device": _device_name(device),
        "plan": asdict(plan),
        "figures": figures,
        "render_seconds": render_seconds,
        "vae_steps": vae_trainer.step,
        "vae_seconds": vae_trainer.seconds,
        "diffusion_steps": diffusion_trainer.step,
        "diffusion_seconds": diffusion_trainer.seconds,
        "evaluation_seconds": time.perf_counter() - evaluation,
        "losses": {"vae": vae_trainer.losses, "diffusion": diffusion_trainer.losses},
    }
    (out / "metrics.json").write_text(json.dumps(metrics) + "\n")
    (out / "checkpoint" / "README.md").write_text(card(plan, metrics))
    if archive:
        write_archive(out / "checkpoint", archive)
    say(as_text(figures))
    say(f"finished after {time.perf_counter() - started:.0f} s")
    return metrics


def _claim(work: Path, plan: Plan) -> None:
    """Refuse to go on from the states of another plan."""
    work.mkdir(parents=True, exist_ok=True)
    record = work / "plan.json"
    wanted = json.dumps(asdict(plan), sort_keys=True)
    if record.exists() and record.read_text() != wanted:
        raise SystemExit(f"{work} holds the states of another plan; choose another --out")
    record.write_text(wanted)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--archive", type=Path, help="also write the checkpoint as one tar here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scenes", type=int, default=90_000 if cuda else 12_000)
    parser.add_argument("--vae-seconds", type=float, default=170 if cuda else 2400)
    parser.add_argument("--vae-steps", type=int, help="end after this many steps, if sooner")
    parser.add_argument("--vae-batch", type=int, default=128 if cuda else 12)
    parser.add_argument("--diffusion-seconds", type=float, default=230 if cuda else 4500)
    parser.add_argument("--diffusion-steps", type=int, help="end after this many steps, if sooner")
    parser.add_argument("--diffusion-batch", type=int, default=1024 if cuda else 48)
    parser.add_argument("--save-seconds", type=float, default=90 if cuda else 300)
    parser.add_argument("--prompts", type=int, default=200, help="evaluated per size and kind")
    arguments = parser.parse_args()
    diffusers_logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    plan = Plan(
        seed=arguments.seed,
        scenes=arguments.scenes,
        vae=Limit(arguments.vae_steps, arguments.vae_seconds),
        vae_batch=arguments.vae_batch,
        diffusion=Limit(arguments.diffusion_steps, arguments.diffusion_seconds),
        diffusion_batch=arguments.diffusion_batch,
    )
    train(
        plan,
        arguments.out,
        device=torch.device(arguments.device),
        workers=arguments.workers,
        save_seconds=arguments.save_seconds,
        archive=arguments.archive,
        prompts=arguments.prompts,
    )


if __name__ == "__main__":
    main()
