"""LoRAs by changing the model's weights in place.

A LoRA changes a weight by `scale * alpha / rank * up @ down`. The change is added to the weight
where the model reads it, so compiled code and captured graphs stay valid and a step costs what it
costs without a LoRA. For each weight that any of the LoRAs changes, the weight as it was loaded is
kept: every change starts from it, so nothing adds up over many changes, and going back copies its
bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels_warmup.weights import Derived, as_matrix, derived_tensors, like_matrix
from metrics.records import LoraSet
from serve.model.loras.files import Factors, Lora
from serve.model.loras.naming import PARTS


@dataclass(slots=True)
class _Weight:
    """One weight that at least one LoRA changes.

    Attributes:
        now: (outputs, inputs), a view of the weight that the model reads.
        loaded: the same as it was loaded.
        derived: what a rewrite computed from it, and a copy of that as it was loaded.
        factors: of each LoRA that changes it, on the weight's device and in its type.
    """

    now: torch.Tensor
    loaded: torch.Tensor
    derived: tuple[Derived, torch.Tensor] | None = None
    factors: dict[str, Factors] = field(default_factory=dict)

    def part_of(self, loras: LoraSet) -> LoraSet:
        """Those of the LoRAs that change this weight."""
        return tuple((name, scale) for name, scale in loras if name in self.factors)

    def write(self, loras: LoraSet) -> None:
        changes = [(self.factors[name], scale) for name, scale in self.part_of(loras)]
        if not changes:
            self.now.copy_(self.loaded)
            if self.derived is not None:
                self.derived[0].tensor.copy_(self.derived[1])
            return
        # One product adds all changes: it sums in float32 and rounds once.
        up, down, scale = _side_by_side(changes)
        torch.addmm(self.loaded, up, down, alpha=scale, out=self.now)
        if self.derived is not None:
            self.derived[0].tensor.copy_(self.derived[0].compute())


def _side_by_side(
    changes: Sequence[tuple[Factors, float]],
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The sum of the changes as one: `scale * up @ down`, its rank the sum of theirs."""
    if len(changes) == 1:
        factors, scale = changes[0]
        return factors.up, factors.down, scale * factors.scale
    scaled = [(each.up.float() * (scale * each.scale)).to(each.up.dtype) for each, scale in changes]
    return torch.cat(scaled, dim=1), torch.cat([each.down for each, _ in changes]), 1.0


class LorasInPlace:
    """The LoRAs of a loaded model, and which of them its weights have now. For the GPU thread.

    Make it after the model was made fast: the rewrites decide where a weight is read.

    Attributes:
        names: what requests may call them.
        active: what the weights have now; None while that is not known, after a change that failed
            and could not be undone. The next `use` then writes every weight.
    """

    def __init__(self, loras: Iterable[Lora], pipeline: Any) -> None:
        self.active: LoraSet | None = ()
        weights: dict[tuple[str, str], _Weight] = {}
        derived = {part: derived_tensors(getattr(pipeline, part)) for part in PARTS}
        names = []
        for lora in loras:
            names.append(lora.name)
            for target, factors in lora.factors.items():
                module = getattr(pipeline, target.part).get_submodule(target.module)
                key = target.part, target.module
                if key not in weights:
                    computed = derived[target.part].get(target.module)
                    weights[key] = _weight(module.weight.detach(), computed)
                weights[key].factors[lora.name] = _prepared(factors, module.weight.detach())
        self.names = tuple(names)
        self._weights = tuple(weights.values())

    def use(self, loras: LoraSet) -> None:
        """Change the weights to those of these LoRAs. Only weights that differ are written.

        Raises:
            Exception: whatever the device raised. The weights are then those that were loaded, or
                `active` is None.
        """
        before = self.active
        if loras == before:
            return
        self.active = None
        try:
            self._write(loras, before)
        except BaseException:
            with contextlib.suppress(Exception):
                self._write((), None)
                self.active = ()
            raise
        self.active = loras

    @torch.no_grad()
    def _write(self, loras: LoraSet, before: LoraSet | None) -> None:
        for weight in self._weights:
            if before is None or weight.part_of(loras) != weight.part_of(before):
                weight.write(loras)

    @property
    def bytes_kept(self) -> int:
        """Bytes on the device for the weights as they were loaded and for the factors."""
        tensors = [weight.loaded for weight in self._weights]
        for weight in self._weights:
            tensors += [] if weight.derived is None else [weight.derived[1]]
            tensors += [part for each in weight.factors.values() for part in (each.up, each.down)]
        return sum(tensor.nbytes for tensor in tensors)


def _weight(weight: torch.Tensor, derived: Derived | None) -> _Weight:
    now = as_matrix(weight)
    copied = None if derived is None else (derived, derived.tensor.clone())
    return _Weight(now, now.clone(), copied)


def _prepared(factors: Factors, weight: torch.Tensor) -> Factors:
    return Factors(
        factors.up.to(weight.device, weight.dtype),
        like_matrix(factors.down, weight).to(weight.device, weight.dtype),
        factors.scale,
    )
