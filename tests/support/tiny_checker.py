"""A tiny safety checker with seeded weights, and diffusers' own call of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from torch.nn import functional
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE = 32
NEVER = 2.0
"""A threshold that no cosine reaches."""

PROCESSOR = CLIPImageProcessorPil(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
)


def tiny_checker() -> Any:
    """A checker that flags nothing."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    torch.nn.init.normal_(checker.visual_projection.weight)
    torch.nn.init.normal_(checker.concept_embeds)
    torch.nn.init.normal_(checker.special_care_embeds)
    checker.concept_embeds_weights.fill_(NEVER)
    checker.special_care_embeds_weights.fill_(NEVER)
    return checker.eval()


def flag_one(checker: Any, unsafe: np.ndarray, safe: np.ndarray) -> None:
    """Make the first concept flag one picture (height, width, 3) uint8 and not the other."""
    one, other = embedded(checker, [unsafe, safe])
    checker.concept_embeds[0] = one - other
    checker.concept_embeds_weights[0] = 0.0


def save(checker: Any, directory: Path) -> Path:
    checker.save_pretrained(directory)
    PROCESSOR.save_pretrained(directory)
    return directory


@torch.no_grad()
def embedded(checker: Any, pictures: list[np.ndarray]) -> torch.Tensor:
    """(pictures, 16), each of length 1."""
    pooled = checker.vision_model(prepared(pictures))[1]
    return functional.normalize(checker.visual_projection(pooled))


def prepared(pictures: list[np.ndarray]) -> torch.Tensor:
    images = [Image.fromarray(picture) for picture in pictures]
    tensor: torch.Tensor = PROCESSOR(images, return_tensors="pt").pixel_values
    return tensor


def flagged_by_diffusers(checker: Any, pictures: list[np.ndarray]) -> list[bool]:
    copies = [picture.astype(np.float32) for picture in pictures]
    _, flagged = checker(images=copies, clip_input=prepared(pictures))
    return list(flagged)
