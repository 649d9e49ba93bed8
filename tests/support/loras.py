"""LoRAs with seeded values for a model, written in the namings that trainers use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from serve.model.loras.naming import PARTS, Target, sgm_name

Made = dict[Target, tuple[torch.Tensor, torch.Tensor, float]]
"""Of each weight up (outputs, rank), down (rank, inputs...) and alpha."""


def attention_and_more(part: str, name: str) -> bool:
    """Of every kind of weight at least one: what the rewrites fuse, stack and sum is among them."""
    if part != "unet":
        return name.endswith(("q_proj", "k_proj", "out_proj", "fc1", "text_projection"))
    ends = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    return name.endswith((*ends, "time_emb_proj", "upsamplers.0.conv", "conv1", "conv_shortcut"))


def make(
    pipeline: Any,
    rank: int = 2,
    seed: int = 0,
    size: float = 0.3,
    chosen: Callable[[str, str], bool] = attention_and_more,
) -> Made:
    """Factors whose product is about `size` times as large as the weight."""
    generator = torch.Generator().manual_seed(seed)
    made: Made = {}
    for part in PARTS:
        for name, module in getattr(pipeline, part).named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or not chosen(part, name):
                continue
            weight = module.weight
            up = torch.randn(len(weight), rank, generator=generator)
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            by = size * weight.float().std() / rank**0.5
            made[Target(part, name)] = (up * by, down, float(rank))
    return made


def _in_files(target: Target) -> str:
    if target.part == "unet" or target.module == "text_projection":
        return target.module
    return "text_model." + target.module.removeprefix("text_model.")


def as_peft(made: Made) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for target, (up, down, alpha) in made.items():
        name = f"{target.part}.{_in_files(target)}"
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = _as_kernel(up, down) * (alpha / len(down))
    return tensors


def as_diffusers(made: Made) -> dict[str, torch.Tensor]:
    """What diffusers wrote before it used PEFT."""
    tensors: dict[str, torch.Tensor] = {}
    words = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    for target, (up, down, alpha) in made.items():
        name = f"{target.part}.{_in_files(target)}"
        *path, last = name.removesuffix(".0").split(".")
        if "attn" in path[-1]:
            middle = [] if target.part != "unet" else ["processor"]
            name = ".".join([*path, *middle, words.get(last, last) + "_lora"])
        elif "mlp" in path:
            name += ".lora_linear_layer"
        else:
            name += ".lora"
        tensors[f"{name}.down.weight"] = down
        tensors[f"{name}.up.weight"] = _as_kernel(up, down) * (alpha / len(down))
    return tensors


def as_kohya(made: Made, unet_config: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """By diffusers' names of the UNet's modules; by SGM's, which kohya's trainer uses for SDXL,
    with the UNet's configuration."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    tensors: dict[str, torch.Tensor] = {}
    for target, (up, down, alpha) in made.items():
        name = _in_files(target)
        if unet_config is not None and target.part == "unet":
            name = sgm_name(name, unet_config) or name
        name = prefixes[target.part] + name.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = _as_kernel(up, down)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def save(tensors: Mapping[str, torch.Tensor], file: Path, **metadata: str) -> Path:
    save_file({key: each.contiguous() for key, each in tensors.items()}, file, metadata or None)
    return file


def merged(pipeline: Any, made: Made, scale: float = 1.0) -> dict[Target, torch.Tensor]:
    """The weights with a LoRA in them, by the arithmetic of diffusers' and PEFT's `fuse_lora`."""
    result = {}
    for target, (up, down, alpha) in made.items():
        weight = getattr(pipeline, target.part).get_submodule(target.module).weight.detach()
        delta = (up @ down.flatten(1)).reshape(weight.shape)
        result[target] = weight.clone() + delta * (scale * alpha / len(down))
    return result


def _as_kernel(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return up[:, :, None, None] if down.dim() == 4 else up
