"""Reading a LoRA file, and checking it against the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from serve.errors import ModelError
from serve.model.loras.naming import Names, Role, Target, other_kind

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"
"""The entry of a file's metadata in which diffusers keeps the ranks and alphas."""

_KEY_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Factors:
    """The change of one weight by a LoRA: `scale * up @ down`, with a scale of alpha / rank.

    Attributes:
        up: (outputs, rank).
        down: (rank, inputs), or of a convolution (rank, channels, kernel height, kernel width).
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True, slots=True)
class Lora:
    """One LoRA, read and checked: its factors for each weight that it changes."""

    name: str
    factors: Mapping[Target, Factors]


class _DoesNotFit(Exception):
    """The rest of a sentence that begins with the file."""


def read_lora(name: str, file: Path, pipeline: Any, names: Names | None = None) -> Lora:
    """Read a LoRA and check that it fits the pipeline.

    Args:
        pipeline: as it was loaded, before any rewrite.
        names: `Names(pipeline)`, if there is one already.

    Raises:
        ModelError: it is no LoRA in safetensors, or does not fit. Names the file and the first key
            that does not fit.
    """
    try:
        return Lora(name, _read(file, pipeline, names or Names(pipeline)))
    except _DoesNotFit as problem:
        raise ModelError(f"SDXL_LORAS: {name}: the file {file} {problem}.") from None


def _read(file: Path, pipeline: Any, names: Names) -> dict[Target, Factors]:
    tensors, metadata = _load(file)
    if not tensors:
        raise _DoesNotFit("has no tensors")
    config = _Config.of(file, metadata)
    found: dict[Target, dict[Role, tuple[str, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        target, role = _find(key, names)
        if role in found.setdefault(target, {}):
            raise _DoesNotFit(f"has two tensors for one module: {_shown(key)} is the second")
        if not tensor.is_floating_point() and role != "alpha":
            raise _DoesNotFit(f"has a key {_shown(key)} whose values are no fractions")
        if not bool(tensor.float().isfinite().all()):
            raise _DoesNotFit(f"has a key {_shown(key)} with values that are not finite")
        found[target][role] = key, tensor
    return {target: _factors(target, roles, pipeline, config) for target, roles in found.items()}


def _load(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError):
        raise _DoesNotFit(
            "cannot be read as safetensors, the only format that is allowed"
        ) from None


def _find(key: str, names: Names) -> tuple[Target, Role]:
    found = names.find(key)
    if found is not None:
        return found
    if (kind := other_kind(key)) is not None:
        raise _DoesNotFit(
            f"is {kind}, as its key {_shown(key)} says; a LoRA of pairs of matrices is allowed"
        )
    raise _DoesNotFit(f"does not fit this model: its key {_shown(key)} is for no module of it")


def _factors(
    target: Target,
    roles: Mapping[Role, tuple[str, torch.Tensor]],
    pipeline: Any,
    config: _Config,
) -> Factors:
    for role, missing in (("down", "up"), ("up", "down")):
        if missing not in roles:
            key = roles[role][0] if role in roles else roles["alpha"][0]  # type: ignore[index]
            raise _DoesNotFit(f"lacks the {missing} matrix that belongs to its key {_shown(key)}")
    (down_key, down), (up_key, up) = roles["down"], roles["up"]
    weight = getattr(pipeline, target.part).get_submodule(target.module).weight
    outputs, *inputs = weight.shape
    down, up = _unpadded(down, len(weight.shape)), _unpadded(up, 2)
    if down.dim() == 2 and len(inputs) == 3:
        down = down[:, :, None, None]  # of a convolution without a neighbourhood
    rank = len(down)
    if list(down.shape) != [rank, *inputs] or rank == 0:
        wanted = " x ".join(map(str, ["rank", *inputs]))
        raise _DoesNotFit(_wrong_shape(down_key, roles["down"][1], wanted))
    if list(up.shape) != [outputs, rank]:
        raise _DoesNotFit(_wrong_shape(up_key, roles["up"][1], f"{outputs} x {rank}"))
    alpha = roles["alpha"][1].item() if "alpha" in roles else None
    return Factors(up, down, config.scale(target, rank, alpha))


def _unpadded(tensor: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Without the kernel of 1 x 1 that some trainers give to every matrix."""
    while tensor.dim() > max(dimensions, 2) and tensor.shape[-1] == 1:
        tensor = tensor.squeeze(-1)
    return tensor


def _wrong_shape(key: str, tensor: torch.Tensor, wanted: str) -> str:
    shape = " x ".join(map(str, tensor.shape)) or "one number"
    return f"does not fit this model: its key {_shown(key)} is {shape}, and {wanted} is needed"


def _shown(key: str) -> str:
    return repr(key if len(key) <= _KEY_CHARACTERS else key[:_KEY_CHARACTERS] + "...")


@dataclass(frozen=True)
class _Config:
    """What a file's metadata, or the configuration beside it, say of the scales."""

    by_part: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, file: Path, metadata: Mapping[str, str]) -> _Config:
        """diffusers writes one configuration for each part into the file's metadata. PEFT writes
        one beside the file."""
        by_part: dict[str, dict[str, Any]] = {}
        if DIFFUSERS_METADATA in metadata:
            for key, value in _json(metadata[DIFFUSERS_METADATA], "metadata").items():
                part, _, field = key.partition(".")
                by_part.setdefault(part, {})[field] = value
        elif (
            file.name.startswith("adapter_model")
            and (beside := file.with_name(PEFT_CONFIG)).is_file()
        ):
            by_part[""] = _json(beside.read_text(errors="replace"), PEFT_CONFIG)
        for config in by_part.values():
            if config.get("use_dora"):
                raise _DoesNotFit("is a DoRA, as its configuration says; a LoRA is allowed")
            if config.get("bias", "none") != "none":
                raise _DoesNotFit("is a LoRA with biases, as its configuration says")
        return cls(by_part)

    def scale(self, target: Target, rank: int, alpha: float | None) -> float:
        """alpha / rank; 1 if nothing says what alpha is, as in diffusers."""
        config = self.by_part.get(target.part, self.by_part.get("", {}))
        if alpha is None:
            alpha = _matching(config.get("alpha_pattern"), target.module)
        if alpha is None:
            alpha = config.get("lora_alpha", rank)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise _DoesNotFit("has a configuration whose alpha is not a number")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _DoesNotFit(f"has a configuration ({where}) that is no JSON object")
    return value


def _matching(pattern: Any, module: str) -> Any:
    """The entry of PEFT's `alpha_pattern` for a module: its keys end modules' names."""
    if not isinstance(pattern, Mapping):
        return None
    fitting = [key for key in pattern if module == key or module.endswith(f".{key}")]
    return pattern[max(fitting, key=len)] if fitting else None
