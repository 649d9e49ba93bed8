"""The roofline of a step or a decode: FLOPs and bytes by kind of kernel, and the time they need.

The counts come from a forward of the unmodified model on the meta device: FLOPs of the products,
convolutions and attentions, and the bytes that each reads and writes once. The compiler's generated
kernels are not in that forward. Their counts come from `bench launches`, which takes precedence.
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
class FlopsAndBytes:
    """Of one forward; None if not known."""

    flops: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Rate:
    """The rates that some work was done at, and the least time it needs on this device."""

    tflops: float | None
    gb_per_second: float | None
    bound_ms: float | None
    """The longer of: its FLOPs at the rate of a large product, its bytes at the rate of a copy."""

    @classmethod
    def of(cls, work: FlopsAndBytes, ms: float, dtype: str, ceilings: Ceilings) -> Rate:
        product = ceilings.matmul_tflops.get(dtype)
        needs = []
        if work.flops is not None and product is not None:
            needs.append(work.flops / product / 1e9)
        if work.bytes is not None:
            needs.append(work.bytes / ceilings.copy_gb_per_second / 1e6)
        return cls(
            tflops=None if not work.flops else work.flops / ms / 1e9,
            gb_per_second=None if work.bytes is None else work.bytes / ms / 1e6,
            bound_ms=max(needs, default=None),
        )


def count(
    pipeline: Any, shape: CompiledShape, part: str, *, text_once: bool = False
) -> dict[str, FlopsAndBytes]:
    """FLOPs and bytes by kind, in the pipeline's dtype; only its configurations are read.

    Args:
        part: `step` (one guided UNet forward) or `decode`.
        text_once: leave out the products of the text alone; such a model computes them once a run.
    """
    config = dict((pipeline.unet if part == "step" else pipeline.vae).config)
    dtype = (pipeline.unet if part == "step" else pipeline.vae).dtype
    meta = torch.device("meta")
    with meta:
        model = (UNet2DConditionModel if part == "step" else AutoencoderKL).from_config(config)
    torch.nn.Module.to(model, dtype).eval()
    totals: dict[str, FlopsAndBytes] = {}

    def add(kind: str, flops: float, *tensors: torch.Tensor) -> None:
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        before = totals.get(kind, FlopsAndBytes(0, 0))
        totals[kind] = FlopsAndBytes((before.flops or 0) + flops, (before.bytes or 0) + moved)

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
    """Counts products and convolutions, by torch's own formulas."""

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
    """Counts attentions without running them: on the meta device they would run as products."""

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


def read_launches(path: Path, scenario: str, part: str, shape: str) -> dict[str, FlopsAndBytes]:
    """FLOPs and bytes by kind of kernel, from a file that `bench launches` wrote.

    Raises:
        BenchError: there is no such file, or it does not hold this scenario, part and shape.
    """
    wanted = {"scenario": scenario, "part": part, "shape": shape}
    try:
        for counted in json.loads(path.read_text())["counted"]:
            if {name: counted[name] for name in wanted} == wanted:
                return {
                    kind: FlopsAndBytes(row["flops"], row["bytes"])
                    for kind, row in counted["by_kind"].items()
                }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchError(f"{path} is not a file of `bench launches --out`: {error}") from None
    raise BenchError(f"{path} counts no {part} of {scenario} at {shape}")


def rounded(value: float | None) -> float | None:
    """Rounded to four significant digits; None if not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
