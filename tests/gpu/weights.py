"""SDXL base's UNet and VAE with seeded random weights, which several instances share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from serve.model.sdxl_base import UNET_CONFIG, VAE_CONFIG


class Weights:
    """The seeded weights, stored once; the modules that it builds start as views of them."""

    def __init__(self, device: torch.device) -> None:
        self._configs = (UNET_CONFIG, VAE_CONFIG)
        self._states: list[dict[str, torch.Tensor]] = []
        for model, config in zip((UNet2DConditionModel, AutoencoderKL), self._configs, strict=True):
            torch.manual_seed(7)
            with device:
                built = model.from_config(config)
            self._states.append(built.to(torch.bfloat16).state_dict())

    def unet(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        return self._build(UNet2DConditionModel, 0, dtype)

    def vae(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        return self._build(AutoencoderKL, 1, dtype)

    def _build(self, model: Any, index: int, dtype: torch.dtype) -> Any:
        with torch.device("meta"):
            built = model.from_config(self._configs[index])
        state = {name: tensor.to(dtype) for name, tensor in self._states[index].items()}
        built.load_state_dict(state, assign=True)
        return built.eval().requires_grad_(False)
