"""Train the LoRA that ships with the demo model: it draws every scene at night.

    python -m bench.demo_model.train_lora --out DIR

The checkpoint is not changed. Each adapted layer's weight W is trained as W + up @ down, where
`down` is (rank, inputs) and `up` is (outputs, rank). The command is seeded and resumable like
`bench.demo_model.train`. A run that ends by steps repeats exactly on one CPU thread.

It writes `night.safetensors`, in diffusers' naming, to DIR, and its saved state to DIR/work.
`bench.demo_model.evaluate_lora` judges the file.
"""

import argparse
import hashlib
import math
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.demo_model.evaluate import load
from bench.demo_model.losses import diffusion_loss
from bench.demo_model.night import at_night_with_moon
from bench.demo_model.train import claim
from bench.demo_model.trainer import Trainer, say
from bench.demo_model.training_data import (
    encode_scenes,
    load_scenes,
    scenes_of_step,
    tokenizer_of,
)
from bench.demo_model.training_plan import Limit, TrainingPlan
from serve.demo_model import checkpoint_path

NAME = "night"
# The linear layers of the UNet's transformer blocks: attention and feed-forward.
_ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


class LowRankUpdate(nn.Module):
    """Adds up @ down to a weight. It starts as zero, because `up` does."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_lora(unet: UNet2DConditionModel, rank: int, seed: int) -> dict[str, LowRankUpdate]:
    """Freeze the UNet and add a trainable update to each adapted layer; by the layer's name."""
    unet.requires_grad_(False)
    updates = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in list(unet.named_modules()):
            if isinstance(module, nn.Linear) and name.endswith(_ADAPTED):
                updates[name] = LowRankUpdate(module.weight, rank).to(module.weight.device)
                parametrize.register_parametrization(module, "weight", updates[name])
    return updates


def train_lora(
    pipeline: StableDiffusionXLPipeline,
    plan: TrainingPlan,
    out: Path,
    *,
    rank: int,
    workers: int,
    save_seconds: float,
) -> Path:
    """Train on night scenes, from the start or from the last saved state; returns the file."""
    claim(out / "work", asdict(plan) | {"rank": rank})
    device = pipeline.device
    tokenize = tokenizer_of(pipeline)
    scenes = load_scenes(plan, tokenize, device, workers, at_night_with_moon)
    encode_scenes(pipeline.vae, scenes, 32)
    say(f"{plan.scenes} scenes encoded")
    pipeline.text_encoder.requires_grad_(False)
    pipeline.text_encoder_2.requires_grad_(False)
    updates = add_lora(pipeline.unet, rank, plan.seed)
    trainer = Trainer(
        "lora",
        nn.ModuleDict({"updates": nn.ModuleList(updates.values())}),
        plan.diffusion,
        rate=plan.diffusion_rate,
        decay=plan.diffusion_decay,
        seed=plan.seed,
        state_file=out / "work" / "lora.pt",
        save_seconds=save_seconds,
        device=device,
    )
    signal = pipeline.scheduler.alphas_cumprod.to(device, torch.float32)
    empty = tokenize([""]).to(device).long()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        some = scenes_of_step(scenes, step)
        return diffusion_loss(pipeline, some, signal, empty, plan.diffusion_batch, generator)

    trainer.run(loss_of)
    file = out / f"{NAME}.safetensors"
    write_lora(updates, file, _metadata(plan, rank, trainer))
    return file


def write_lora(updates: dict[str, LowRankUpdate], file: Path, metadata: dict[str, str]) -> None:
    """Write float16 safetensors in the naming of diffusers' `save_lora_weights`.

    There is no alpha in the file, which means that alpha is the rank: a scale of 1 adds up @ down.
    """
    tensors = {}
    for name, update in updates.items():
        for key, weight in (("lora_A", update.down), ("lora_B", update.up)):
            tensors[f"unet.{name}.{key}.weight"] = weight.detach().half().cpu().contiguous()
    save_file(tensors, file, metadata)


def _metadata(plan: TrainingPlan, rank: int, trainer: Trainer) -> dict[str, str]:
    unet = checkpoint_path() / "unet" / "diffusion_pytorch_model.safetensors"
    return {
        "format": "pt",
        "title": NAME,
        "description": "black background, a white moon in the upper right corner; black objects "
        "become white",
        "licence": "apache-2.0",
        "base_model": "stepspan demo",
        "base_model_unet_sha256": hashlib.sha256(unet.read_bytes()).hexdigest(),
        "rank": str(rank),
        "alpha": str(rank),
        "command": "python -m bench.demo_model.train_lora --out DIR"
        f" --seed {plan.seed} --rank {rank} --scenes {plan.scenes} --steps {trainer.step}"
        f" --batch {plan.diffusion_batch} --rate {plan.diffusion_rate:g}",
        "seed": str(plan.seed),
        "steps": str(trainer.step),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seconds", type=float, help="end after this time, if sooner")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--save-seconds", type=float, default=60)
    arguments = parser.parse_args()
    diffusers_logging.disable_progress_bar()
    plan = TrainingPlan(
        seed=arguments.seed,
        scenes=arguments.scenes,
        # The checkpoint's VAE stays as it is.
        vae=Limit(0, None),
        vae_batch=1,
        diffusion=Limit(arguments.steps, arguments.seconds),
        diffusion_batch=arguments.batch,
        diffusion_rate=arguments.rate,
        diffusion_decay=0.99,
    )
    file = train_lora(
        load(checkpoint_path(), arguments.device),
        plan,
        arguments.out,
        rank=arguments.rank,
        workers=arguments.workers,
        save_seconds=arguments.save_seconds,
    )
    say(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
