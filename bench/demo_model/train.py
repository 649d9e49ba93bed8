"""Train the demo model: scenes, then the VAE, then the text encoders and the UNet together.

    python -m bench.demo_model.train --out DIR

Seeded and resumable: started again with the same arguments, it continues from its last saved state.
On the CPU, runs limited by steps repeat exactly; runs limited by seconds do not. It writes to DIR:
`checkpoint/` in the diffusers layout with its model card, `metrics.json`, `grid.png`, and `work/`
with the saved states.
"""

import argparse
import json
import math
import os
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from bench.demo_model.architecture import build_pipeline, save
from bench.demo_model.evaluate import (
    DrawSettings,
    as_text,
    evaluate,
    grid,
    load,
    reconstruction_psnr,
)
from bench.demo_model.losses import diffusion_loss, random_indices, vae_loss
from bench.demo_model.model_card import card
from bench.demo_model.trainer import Trainer, say
from bench.demo_model.training_data import (
    TrainingScenes,
    encode_scenes,
    load_scenes,
    scenes_of_step,
    tokenizer_of,
)
from bench.demo_model.training_plan import Limit, TrainingPlan
from bench.outputs import output_file
from serve.demo_model import DEMO_SIZES

# Phases ------------------------------------------------------------------------------------------


def train_vae(
    pipeline: StableDiffusionXLPipeline,
    scenes: list[TrainingScenes],
    plan: TrainingPlan,
    trainer: Trainer,
) -> None:
    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        some = scenes_of_step(scenes, step)
        index = random_indices(len(some.pixels), plan.vae_batch, generator)
        pixels = some.pixels[index].float() / 127.5 - 1
        # The VAE sees no captions, so a scene may be mirrored.
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


def scale_latents(pipeline: StableDiffusionXLPipeline, scenes: list[TrainingScenes]) -> None:
    """Scale the VAE so that the latents of the encoded scenes have unit deviation."""
    # The mean of a latent's square is its mean squared, plus its variance.
    squares = sum(float(some.moments.square().sum()) for some in scenes)
    latents = sum(some.moments.numel() // 2 for some in scenes)
    scale = 1 / math.sqrt(squares / latents)
    pipeline.vae.register_to_config(scaling_factor=round(scale, 5))


def train_diffusion(
    pipeline: StableDiffusionXLPipeline,
    scenes: list[TrainingScenes],
    plan: TrainingPlan,
    trainer: Trainer,
    on_save: Callable[[], None],
) -> None:
    device = scenes[0].tokens.device
    signal = pipeline.scheduler.alphas_cumprod.to(device, torch.float32)
    empty = tokenizer_of(pipeline)([""]).to(device).long()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        some = scenes_of_step(scenes, step)
        return diffusion_loss(pipeline, some, signal, empty, plan.diffusion_batch, generator)

    trainer.run(loss_of, on_save)


# Files -------------------------------------------------------------------------------------------


def write_checkpoint(pipeline: StableDiffusionXLPipeline, directory: Path) -> None:
    """Save a float16 copy; the pipeline itself is not changed."""
    copy = build_pipeline(0)
    for name in ("vae", "text_encoder", "text_encoder_2", "unet"):
        getattr(copy, name).load_state_dict(getattr(pipeline, name).state_dict())
    copy.vae.register_to_config(scaling_factor=pipeline.vae.config.scaling_factor)
    save(copy, directory)


def write_archive(directory: Path, archive: Path) -> None:
    """Pack the checkpoint directory into one tar; the same files give the same bytes."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_suffix(".new")
    with tarfile.open(unfinished, "w") as tar:
        tar.add(directory, arcname="checkpoint", filter=anonymous)
    unfinished.replace(archive)


# The command -------------------------------------------------------------------------------------


def train(
    plan: TrainingPlan,
    out: Path,
    *,
    device: torch.device,
    workers: int,
    save_seconds: float,
    archive: Path | None,
    prompts: int,
    steps: int = 20,
) -> dict[str, Any]:
    """Run all phases, from the start or from the last saved state; returns the metrics."""
    started = time.perf_counter()
    work = out / "work"
    claim(work, asdict(plan))
    pipeline = build_pipeline(plan.seed)
    say(f"rendering {plan.scenes} scenes with {workers} workers")
    # Before CUDA is initialised, because rendering forks.
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
    encode_scenes(pipeline.vae, scenes, 512 if device.type == "cuda" else 32)
    scale_latents(pipeline, scenes)
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
    settings = DrawSettings(steps, batch=100 if device.type == "cuda" else 8)

    def write() -> None:
        write_checkpoint(pipeline, out / "checkpoint")
        if archive:
            write_archive(out / "checkpoint", archive)
        grid(pipeline, settings).save(out / "grid.png")

    train_diffusion(pipeline, scenes, plan, diffusion_trainer, write)
    write()
    say("evaluating")
    evaluation = time.perf_counter()
    figures = evaluate(load(out / "checkpoint", str(device)), settings, prompts)
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


def claim(work: Path, plan: dict[str, Any]) -> None:
    """Make `work` and note the plan there. Exits if it holds the states of another plan."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out: {work} cannot be made: {error.strerror}") from None
    record = work / "plan.json"
    wanted = json.dumps(plan, sort_keys=True)
    if record.exists() and record.read_text() != wanted:
        raise SystemExit(f"{work} holds the states of another plan; choose another --out")
    record.write_text(wanted)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--archive", type=output_file, help="also write the checkpoint as one tar here"
    )
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
    plan = TrainingPlan(
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
