"""Counts the operators of one UNet forward and times each by itself, for `bench operators`."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import nn

from kernels_warmup.attention import Backend, attend
from kernels_warmup.fp8 import round_rows
from kernels_warmup.numerical_error import StepInputs, forward_once
from kernels_warmup.triton import why_unusable as kernels_unusable


def time_operators(unet: Any, inputs: StepInputs, device: torch.device) -> list[dict[str, Any]]:
    """A row for each implementation of each distinct operator of a step.

    A call's weights change from call to call and together exceed the GPU's cache, as in the model.
    """
    rows: list[dict[str, Any]] = []
    for (kind, *sizes), count in _operators(unet, inputs).items():
        for how, work, call in _candidates(str(kind), sizes, device):
            row: dict[str, Any] = {"kind": kind, "sizes": sizes, "how": how, "count": count}
            try:
                microseconds = _time_call(call, device)
                row["us"] = round(microseconds, 2)
                row["step_ms"] = round(microseconds * count / 1000, 4)
                if kind == "norm":
                    row["gb_s"] = float(f"{work / microseconds / 1e3:.4g}")
                else:
                    row["tflops"] = round(work / microseconds / 1e6, 1)
            except Exception as failure:  # noqa: BLE001 - an implementation may not exist here
                row["failed"] = f"{type(failure).__name__}: {str(failure)[:200]}"
            rows.append(row)
    return rows


def _operators(unet: Any, inputs: StepInputs) -> Counter[tuple[Any, ...]]:
    """How often each operator runs in one forward, counted by hooks.

    The text's keys and values are left out, because they are computed once a run.
    """
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention_processor import Attention

    counted: Counter[tuple[Any, ...]] = Counter()
    hooks: list[Any] = []

    def linear(module: nn.Linear, args: Any, _: Any) -> None:
        rows = args[0].numel() // module.in_features
        counted["linear", rows, module.in_features, module.out_features] += 1

    def convolution(module: nn.Conv2d, args: Any, _: Any) -> None:
        counted[
            "conv", *args[0].shape, module.out_channels, module.kernel_size[0], module.stride[0]
        ] += 1

    def attention(module: Any, args: Any, keywords: Any, _: Any) -> None:
        batch, tokens, width = args[0].shape
        context = keywords.get("encoder_hidden_states")
        length = tokens if context is None else context.shape[1]
        counted["attention", batch, module.heads, tokens, length, width // module.heads] += 1
        if context is None:
            counted["linear", batch * tokens, width, 3 * width] += 1

    def gated(module: GEGLU, args: Any, _: Any) -> None:
        inner, both = module.proj.in_features, module.proj.out_features
        counted["geglu", args[0].numel() // inner, inner, both // 2] += 1

    def norm(_: nn.LayerNorm, args: Any, __: Any) -> None:
        width = args[0].shape[-1]
        counted["norm", args[0].numel() // width, width] += 1

    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("to_k", "to_v")):
            hooks.append(module.register_forward_hook(linear))
        elif isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(convolution))
        elif isinstance(module, nn.LayerNorm):
            hooks.append(module.register_forward_hook(norm))
        elif isinstance(module, GEGLU):
            hooks.append(module.register_forward_hook(gated))
        elif isinstance(module, Attention):
            hooks.append(module.register_forward_hook(attention, with_kwargs=True))
    try:
        forward_once(unet, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return counted


def _candidates(
    kind: str, sizes: list[Any], device: torch.device
) -> Iterator[tuple[str, float, Callable[[int], Any]]]:
    """The implementations of one operator: (name, work, call); `call(i)` uses the i-th weights.

    Work is in FLOPs; for a norm it is the bytes that one pass reads and writes.
    """
    bf16 = torch.bfloat16

    def fresh(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=bf16)

    if kind == "linear":
        rows, inner, outer = sizes
        flops = 2.0 * rows * inner * outer
        turns = _turns(inner * outer * 2)
        source, bias = fresh(rows, inner), fresh(outer)
        matrices = [fresh(outer, inner) for _ in range(turns)]
        yield "bf16", flops, lambda i: nn.functional.linear(source, matrices[i % turns], bias)
        if min(rows, inner, outer) < 256:
            return
        if inner >= outer:
            total = fresh(rows, outer)
            # As the blocks add their products: no bias, and the sum is read and written.
            yield "bf16 onto a sum", flops, lambda i: total.addmm_(source, matrices[i % turns].t())
        narrow = [round_rows(matrix) for matrix in matrices]
        own, own_scale = round_rows(source)
        scaled = torch._scaled_mm
        yield (
            "fp8 by row",
            flops,
            lambda i: scaled(
                own,
                narrow[i % turns][0].t(),
                scale_a=own_scale,
                scale_b=narrow[i % turns][1].t(),
                bias=bias,
                out_dtype=bf16,
                use_fast_accum=True,
            ),
        )
        one = torch.ones((), device=device)
        yield (
            "fp8 one scale",
            flops,
            lambda i: scaled(
                own,
                narrow[i % turns][0].t(),
                scale_a=one,
                scale_b=one,
                bias=bias,
                out_dtype=bf16,
                use_fast_accum=True,
            ),
        )
    elif kind == "conv":
        batch, channels, height, width, outer, kernel, stride = sizes
        padding = kernel // 2
        flops = 2.0 * batch * outer * (height // stride) * (width // stride) * channels * kernel**2
        turns = _turns(channels * outer * kernel**2 * 2)
        bias = fresh(outer)
        last = torch.channels_last
        source = fresh(batch, channels, height, width).to(memory_format=last)
        filters = [
            fresh(outer, channels, kernel, kernel).to(memory_format=last) for _ in range(turns)
        ]
        yield (
            "channels last",
            flops,
            lambda i: nn.functional.conv2d(source, filters[i % turns], bias, stride, padding),
        )
    elif kind == "norm":
        yield from _norms(sizes, device)
    elif kind == "geglu":
        yield from _geglus(sizes, device)
    else:
        batch, heads, tokens, length, size = sizes
        flops = 4.0 * batch * heads * tokens * length * size

        def projected(count: int) -> torch.Tensor:
            return fresh(batch, count, heads, size).transpose(1, 2)

        query, key, value = projected(tokens), projected(length), projected(length)
        backends: tuple[Backend, ...] = ("auto", "flash", "cudnn")
        for backend in backends:
            yield backend, flops, _attention(backend, query, key, value)
        yield from _few_keys(sizes, flops, device)
        yield from _self_attention(sizes, flops, device)


def _norms(
    sizes: list[Any], device: torch.device
) -> Iterator[tuple[str, float, Callable[[int], Any]]]:
    """A sum and its LayerNorm; later operators read both."""
    from kernels_warmup.triton.reference import add_layer_norm

    rows, width = sizes
    read_and_written = 4.0 * rows * width * 2
    turns = _turns(2 * rows * width * 2)
    pairs = [torch.randn(2, rows, width, device=device, dtype=torch.bfloat16) for _ in range(turns)]
    scale, shift = torch.randn(2, width, device=device, dtype=torch.bfloat16)
    plain: list[tuple[str, Any]] = [("eager", add_layer_norm)]
    if device.type == "cuda":
        plain.append(("compiled", torch.compile(add_layer_norm, dynamic=False)))
    for how, function in plain:
        yield how, read_and_written, _norm_of(function, pairs, scale, shift)
    if kernels_unusable(device, torch.bfloat16) is None:
        from kernels_warmup.triton.layer_norm import CANDIDATES, launch, launch_for

        for own in CANDIDATES:

            def by_kernel(
                hidden: Any, change: Any, scale: Any, shift: Any, eps: float, own: Any = own
            ) -> Any:
                return launch(hidden, change, None, scale, shift, eps, rows, own)

            yield _settings_text(own), read_and_written, _norm_of(by_kernel, pairs, scale, shift)

        def shifted(hidden: Any, _: Any, scale: Any, shift: Any, eps: float) -> Any:
            return launch(hidden, None, shift, scale, shift, eps, rows, launch_for(width))

        yield "triton without its sum", read_and_written / 2, _norm_of(shifted, pairs, scale, shift)


def _norm_of(
    function: Any, pairs: list[torch.Tensor], scale: torch.Tensor, shift: torch.Tensor
) -> Callable[[int], Any]:
    return lambda i: function(*pairs[i % len(pairs)], scale, shift, 1e-5)


def _geglus(
    sizes: list[Any], device: torch.device
) -> Iterator[tuple[str, float, Callable[[int], Any]]]:
    """A product and its gating; the product alone is one of the linear operators."""
    from kernels_warmup.triton.reference import geglu

    rows, inner, columns = sizes
    flops = 2.0 * rows * inner * 2 * columns
    turns = _turns(2 * columns * inner * 2)

    def fresh(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    hidden, bias = fresh(rows, inner), fresh(2 * columns)
    # Scaled like a model's weights, so that the gates are neither all open nor all closed.
    weights = [fresh(2 * columns, inner) / inner**0.5 for _ in range(turns)]
    plain: list[tuple[str, Any]] = [("eager", geglu)]
    if device.type == "cuda":
        plain.append(("compiled", torch.compile(geglu, dynamic=False)))
    for how, function in plain:
        yield how, flops, _geglu_of(function, hidden, weights, bias)
    if kernels_unusable(device, torch.bfloat16) is None:
        from kernels_warmup.triton.geglu import CANDIDATES, launch

        for own in CANDIDATES:
            yield (
                _settings_text(own),
                flops,
                _geglu_of(partial(launch, how=own), hidden, weights, bias),
            )


def _geglu_of(
    function: Any, hidden: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor
) -> Callable[[int], Any]:
    return lambda i: function(hidden, weights[i % len(weights)], bias)


def _few_keys(
    sizes: list[Any], flops: float, device: torch.device
) -> Iterator[tuple[str, float, Callable[[int], Any]]]:
    """Our own kernel for attention to the text, in the layout of the projections."""
    batch, heads, tokens, length, size = sizes
    if kernels_unusable(device, torch.bfloat16) is not None:
        return
    from kernels_warmup.triton.cross_attention import CANDIDATES, launch, why_unusable

    if why_unusable(length, size) is not None:
        return

    def projected(count: int) -> torch.Tensor:
        return torch.randn(batch, count, heads * size, device=device, dtype=torch.bfloat16)

    query, key, value = projected(tokens), projected(length), projected(length)

    def by_kernel(own: Any) -> Callable[[int], Any]:
        return lambda _: launch(query, key, value, heads, own)

    for own in CANDIDATES:
        yield _settings_text(own), flops, by_kernel(own)


def _self_attention(
    sizes: list[Any], flops: float, device: torch.device
) -> Iterator[tuple[str, float, Callable[[int], Any]]]:
    """Our own kernel for self-attention, on parts of one fused projection."""
    batch, heads, tokens, length, size = sizes
    if kernels_unusable(device, torch.bfloat16) is not None:
        return
    from kernels_warmup.triton.self_attention import CANDIDATES, launch, why_unusable

    if why_unusable(tokens, length, size) is not None:
        return
    width = heads * size
    fused = torch.randn(batch, tokens, 3 * width, device=device, dtype=torch.bfloat16)
    query, key, value = fused.chunk(3, dim=-1)

    def by_kernel(own: Any) -> Callable[[int], Any]:
        return lambda _: launch(query, key, value, heads, own)

    for own in CANDIDATES:
        yield _settings_text(own), flops, by_kernel(own)


def _settings_text(launch: Any) -> str:
    """A launch's settings as text: `triton 128 128 64 8 4 True 1`."""
    return " ".join(("triton", *map(str, astuple(launch))))


def _attention(backend: Backend, *tensors: torch.Tensor) -> Callable[[int], Any]:
    return lambda _: attend(backend, *tensors)


def _turns(size: int) -> int:
    """How many weights of this many bytes exceed a 50 MB cache twice over."""
    return max(1, min(24, math.ceil(120e6 / size)))


def _time_call(call: Callable[[int], Any], device: torch.device) -> float:
    """Microseconds a call; on CUDA of a replayed graph of many calls, without launch overhead."""
    calls = 24
    if device.type != "cuda":
        call(0)
        began = time.perf_counter()
        call(1)
        return (time.perf_counter() - began) * 1e6
    torch.backends.cudnn.benchmark = True
    for turn in range(3):
        call(turn)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(calls):
            call(turn)
    graph.replay()
    times = []
    for _ in range(5):
        watch = Stopwatch(device)
        watch.mark()
        graph.replay()
        watch.mark()
        times.append(watch.milliseconds()[0] * 1000 / calls)
    return statistics.median(times)


class Stopwatch:
    """Milliseconds between marks, by CUDA events on a GPU; read once, after the last mark."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between neighbouring marks."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._cuda:
            torch.cuda.synchronize()
            return [float(a.elapsed_time(b)) for a, b in pairs]
        return [(b - a) * 1000 for a, b in pairs]
