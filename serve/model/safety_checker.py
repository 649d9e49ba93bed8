"""diffusers' safety checker: which images show a concept that its weights hold.

`load_safety_checker` loads it from a directory or the hub; `SafetyChecker` is what a run calls. The
arithmetic is that of `StableDiffusionSafetyChecker`, without its reads of single values, which
would wait for the device.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPConfig

from serve.errors import ModelError
from serve.model.hub import HUB_SECONDS, REPOSITORY, hub_failure, say_commit
from serve.model.weights import non_finite_tensor
from serve.settings.fields import stays_inside

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(rf"(?P<name>{REPOSITORY})(@(?P<revision>[\w./-]+))?")

WEIGHTS = "model.safetensors"
PREPROCESSING = "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number of the filter, as image processors' settings have it."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image is prepared for the checker: the settings of its CLIP image processor.

    Attributes:
        shortest_edge: pixels that the shorter side is resized to.
        crop: side in pixels of the square in the middle that the checker sees.
        mean, std: of red, green and blue from 0 to 1, to normalise them by.
    """

    shortest_edge: int = 224
    crop: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


class SafetyChecker:
    """Finds the images that are to be blanked. It computes in float32, because scores are compared
    with thresholds to three decimals."""

    def __init__(self, checker: Any, preprocessing: Preprocessing) -> None:
        self._checker = checker
        self._preprocessing = preprocessing
        device = checker.concept_embeds.device
        # Copied to the device once: in a run, a copy would wait for the work enqueued so far.
        self._mean = torch.tensor(preprocessing.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).view(3, 1, 1)
        self._concepts = functional.normalize(checker.concept_embeds).t()
        self._special = functional.normalize(checker.special_care_embeds).t()

    @torch.no_grad()
    def flagged(self, pixels: torch.Tensor) -> torch.Tensor:
        """Which images (images, height, width, 3) uint8 are to be blanked: (images,) bool, on the
        images' device. Enqueues its work and waits for nothing."""
        pooled = self._checker.vision_model(self._prepared(pixels))[1]
        embedded = functional.normalize(self._checker.visual_projection(pooled))
        special = embedded @ self._special - self._checker.special_care_embeds_weights
        # Near a concept of special care the other thresholds are lower.
        adjustment = 0.01 * (special.round(decimals=3) > 0).any(dim=1, keepdim=True)
        scores = embedded @ self._concepts - self._checker.concept_embeds_weights + adjustment
        # "Not all at most 0" instead of "any above 0": a score that is not a number is flagged.
        unsafe: torch.Tensor = ~(scores.round(decimals=3) <= 0).all(dim=1)
        return unsafe

    def _prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        """The images as the checker sees them, (images, 3, crop, crop) float32."""
        edge, crop = self._preprocessing.shortest_edge, self._preprocessing.crop
        images = pixels.permute(0, 3, 1, 2).float()
        height, width = images.shape[-2:]
        new_height, new_width = (edge * side // min(height, width) for side in (height, width))
        # As the image processor does it: in two passes, each to 256 levels.
        for size in ((height, new_width), (new_height, new_width)):
            images = functional.interpolate(images, size, mode="bicubic", antialias=True)
            images = images.round().clamp(0, 255)
        top, left = (new_height - crop) // 2, (new_width - crop) // 2
        seen = images[..., top : top + crop, left : left + crop]
        return (seen / 255 - self._mean) / self._std


def load_safety_checker(name: str, device: torch.device) -> SafetyChecker:
    """Load a checker onto its device.

    Args:
        name: a local directory, or a hub repository as `NAME` or `NAME@REVISION`.

    Raises:
        ModelError: there is no such checker, or it is not diffusers' with safetensors weights.
    """
    # Of os.path, which raise for no text: a user that is not there, a name that is too long.
    directory = Path(os.path.expanduser(name))
    if not os.path.isdir(directory):
        directory = _download(name)
    config = _config(name, directory)
    preprocessing = _preprocessing(name, directory)
    if preprocessing.crop != config.vision_config.image_size:
        raise ModelError(
            f"the safety checker at {name!r} sees images of {config.vision_config.image_size} "
            f"pixels, and its {PREPROCESSING} makes them of {preprocessing.crop}."
        )
    try:
        checker = StableDiffusionSafetyChecker(config)
        weights = {_renamed(key): tensor for key, tensor in load_file(directory / WEIGHTS).items()}
        missing, _ = checker.load_state_dict(weights, strict=False)
    except Exception as error:  # noqa: BLE001 - of three libraries' errors; all mean the same here
        raise ModelError(
            f"the safety checker at {name!r} could not be loaded: its {WEIGHTS} does not fit its "
            f"config.json ({type(error).__name__})."
        ) from None
    if missing:
        raise ModelError(f"the safety checker at {name!r} lacks the weights {sorted(missing)[0]}.")
    checker = checker.float().eval().requires_grad_(False).to(device)
    tensor = non_finite_tensor({"checker": checker})
    if tensor is not None:
        raise ModelError(
            f"the safety checker at {name!r} is damaged: {tensor} has values that are not finite."
        )
    return SafetyChecker(checker, preprocessing)


def _download(name: str) -> Path:
    """The directory of a hub repository's checker."""
    found = _HUB_NAME.fullmatch(name)
    if found is None or not stays_inside(found["revision"] or ""):
        raise ModelError(
            f"SDXL_SAFETY_CHECKER={name!r} is neither a directory here nor a hub repository like "
            "NAME/NAME or NAME/NAME@REVISION."
        )
    from huggingface_hub import HfApi, snapshot_download

    repository, revision = found["name"], found["revision"]
    files = ["config.json", PREPROCESSING, WEIGHTS]
    why_unavailable = None
    try:
        # With a limit on its time; the download itself has none.
        HfApi().model_info(repository, revision=revision, timeout=HUB_SECONDS)
    except Exception as error:  # noqa: BLE001 - the library's HTTP client raises many types
        why_unavailable = hub_failure(error, revision)
    offline = why_unavailable is not None
    try:
        directory = snapshot_download(
            repository, revision=revision, allow_patterns=files, local_files_only=offline
        )
    except Exception as error:  # noqa: BLE001 - as above
        why = why_unavailable or hub_failure(error, revision)
        raise ModelError(f"the safety checker {name!r} could not be loaded: {why}.") from None
    if offline:
        logger.warning("%s: %s; what was downloaded before is used", name, why_unavailable)
    say_commit(f"SDXL_SAFETY_CHECKER={repository}@", Path(directory), revision)
    return Path(directory)


def _config(name: str, directory: Path) -> CLIPConfig:
    settings = _json(directory / "config.json")
    kind = StableDiffusionSafetyChecker.__name__
    if settings is None or kind not in (settings.get("architectures") or ()):
        raise ModelError(
            f"there is no safety checker at {name!r}: the config.json of diffusers' {kind} is "
            "needed."
        )
    if not (directory / WEIGHTS).is_file():
        raise ModelError(
            f"the safety checker at {name!r} has no {WEIGHTS}; weights in other formats, which may "
            "run code when they are loaded, are not read."
        )
    try:
        return CLIPConfig.from_dict(settings)
    except Exception as error:  # noqa: BLE001 - the library validates by many types
        raise ModelError(
            f"the config.json of the safety checker at {name!r} is wrong ({type(error).__name__})."
        ) from None


def _preprocessing(name: str, directory: Path) -> Preprocessing:
    """The settings of the checker's image processor; CLIP's own where there are none."""
    path = directory / PREPROCESSING
    if not path.is_file():
        return Preprocessing()
    default = Preprocessing()
    try:
        settings = _json(path) or {}
        steps = ("do_resize", "do_center_crop", "do_normalize")
        supported = all(settings.get(step, True) for step in steps)
        supported &= settings.get("resample", BICUBIC) == BICUBIC
        found = Preprocessing(
            _side(settings.get("size", default.shortest_edge), "shortest_edge"),
            _side(settings.get("crop_size", default.crop), "height"),
            tuple(map(float, settings.get("image_mean", default.mean))),
            tuple(map(float, settings.get("image_std", default.std))),
        )
        supported &= found.crop <= found.shortest_edge
        supported &= len(found.mean) == len(found.std) == 3
    except (KeyError, TypeError, ValueError):
        supported = False
    if not supported:
        raise ModelError(
            f"the {PREPROCESSING} of the safety checker at {name!r} is not that of CLIP: a bicubic "
            "resize of the shortest edge, a square crop in the middle and a normalisation."
        )
    return found


def _side(size: Any, name: str) -> int:
    """A side in pixels; older settings have the number, newer ones a mapping."""
    return int(size[name] if isinstance(size, dict) else size)


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _renamed(key: str) -> str:
    """A weight's name in the installed libraries. Older ones had one level more."""
    return key.replace("vision_model.vision_model.", "vision_model.", 1)
