"""How much work a step or a decode is, by kind of kernel: FLOPs and bytes, and how long they need.

Counted over a forward on the meta device: what the products, convolutions and attentions of the
unmodified model compute, and the bytes they read and write once. What the compiler generates is not
known here: its FLOPs and bytes come from what `bench launches` counted, and take precedence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.errors import BenchError
from kernels_warmup.numerical_error import StepInputs, forward_once
from kernels_warmup.shapes import CompiledShape

if TYPE_CHECKING:
    from bench.harness.result_file import Ceilings


@dataclass(frozen=True)
class Amount:
    """Of one forward; None is not known."""

    flops: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Rate:
    """What an amount was done at, against what the device reached in the same session."""

    tflops: float | None
    gb_per_second: float | None
    bound_ms: float | None
    """What its FLOPs need at a large product's rate, or its bytes at a copy's: the longer."""

    @classmethod
    def of(cls, amount: Amount, ms: float, dtype: str, ceilings: Ceilings) -> Rate:
        product = ceilings.matmul_tflops.get(dtype)
        needs = []
        if amount.flops is not None and product is not None:
            needs.append(amount.flops / product / 1e9)
        if amount.bytes is not None:
            needs.append(amount.bytes / ceilings.copy_gb_per_second / 1e6)
        return cls(
            tflops=None if not amount.flops else amount.flops / ms / 1e9,
            gb_per_second=None if amount.bytes is None else amount.bytes / ms / 1e6,
            bound_ms=max(needs, default=None),
        )


def count(
    pipeline: Any, shape: CompiledShape, part: str, *, text_once: bool = False
) -> dict[str, Amount]:
    """By kind, in the type that the pipeline computes in; only its configurations are read.

    Args:
        part: `step` (one guided UNet forward) or `decode`.
        text_once: leave out the products of the text alone, which such a model does once a run.
    """
    config = dict((pipeline.unet if part == "step" else pipeline.vae).config)
    dtype = (pipeline.unet if part == "step" else pipeline.vae).dtype
    meta = torch.device("meta")
    with meta:
        model = (UNet2DConditionModel if part == "step" else AutoencoderKL).from_config(config)
    torch.nn.Module.to(model, dtype).eval()
    totals: dict[str, Amount] = {}

    def add(kind: str, flops: float, *tensors: torch.Tensor) -> None:
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        before = totals.get(kind, Amount(0, 0))
        totals[kind] = Amount((before.flops or 0) + flops, (before.bytes or 0) + moved)

    with torch.no_grad():
        if part == "step":
            inputs = StepInputs.draw(model, shape, 1, meta, dtype)
            text_rows = inputs.text.shape[0] * inputs.text.shape[1]
            with _Products(add, text_rows if text_once else None), _Attention(add):
                forward_once(model, inputs)
        else:
            size = (1, model.config.latent_channels, *shape.latent)
            latents = torch.empty(size, dtype=dtype, device=meta)
            with _Products(add, None), _Attention(add):
                model.decode(latents)
    return totals


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up products and convolutions by torch's own formulas."""

    def __init__(self, add: Callable[..., None], text_rows: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._add, self._text_rows = add, text_rows

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = flop_registry.get(function.overloadpacket)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if formula is None or any(t.dim() == 2 and len(t) == self._text_rows for t in read):
            return result
        kind = "conv" if "conv" in function.overloadpacket.__name__ else "gemm"
        self._add(kind, formula(*args, **kwargs, out_val=result), *read, result)
        return result


class _Attention(TorchFunctionMode):
    """Adds up attentions, and does not run them: on the meta device they would be products."""

    def __init__(self, add: Callable[..., None]) -> None:
        super().__init__()
        self._add = add

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args[:3]
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        # Two products, each of every query with every key.
        flops = 2 * query.numel() * key.shape[-2] + 2 * result.numel() * key.shape[-2]
        self._add("attention", flops, query, key, value, result)
        return result


def read_launches(path: Path, scenario: str, part: str, shape: str) -> dict[str, Amount]:
    """What `bench launches` counted of this scenario's part at this size, by kind of kernel.

    Raises:
        BenchError: there is no such file, or it is another, or of something else.
    """
    wanted = {"scenario": scenario, "part": part, "shape": shape}
    try:
        for counted in json.loads(path.read_text())["counted"]:
            if {name: counted[name] for name in wanted} == wanted:
                return {
                    kind: Amount(told["flops"], told["bytes"])
                    for kind, told in counted["by_kind"].items()
                }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchError(f"{path} does not tell launches by kind: {error}") from None
    raise BenchError(f"{path} counts no {part} of {scenario} at {shape}")


def rounded(value: float | None) -> float | None:
    """Four significant digits."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
