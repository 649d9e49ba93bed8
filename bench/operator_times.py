"""The operators of one UNet forward, counted and timed by themselves, for `bench operators`."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from kernels_warmup.attention import Backend, attend
from kernels_warmup.one_forward import StepInputs, forward_once


def time_operators(unet: Any, inputs: StepInputs, device: torch.device) -> list[dict[str, Any]]:
    """Every distinct product, convolution and attention of a step, each timed by itself.

    Weights rotate through more memory than the cache holds, as they do in the model.
    """
    rows: list[dict[str, Any]] = []
    for (kind, *sizes), count in _operators(unet, inputs).items():
        for how, flops, call in _candidates(str(kind), sizes, device):
            row: dict[str, Any] = {"kind": kind, "sizes": sizes, "how": how, "count": count}
            try:
                microseconds = _time_call(call, device)
                row["us"] = round(microseconds, 2)
                row["step_ms"] = round(microseconds * count / 1000, 4)
                row["tflops"] = round(flops / microseconds / 1e6, 1)
            except Exception as failure:  # noqa: BLE001 - a candidate may not exist here
                row["failed"] = f"{type(failure).__name__}: {str(failure)[:200]}"
            rows.append(row)
    return rows


def _operators(unet: Any, inputs: StepInputs) -> Counter[tuple[Any, ...]]:
    """What one forward runs, counted by hooks; text keys and values are left out (once a run)."""
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

    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("to_k", "to_v")):
            hooks.append(module.register_forward_hook(linear))
        elif isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(convolution))
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
    """(how, FLOPs, call): ways to do one operator; call(i) uses the i-th of the rotated weights."""
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
        narrow = [to_fp8_rows(matrix) for matrix in matrices]
        own, own_scale = to_fp8_rows(source)
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
    else:
        batch, heads, tokens, length, size = sizes
        flops = 4.0 * batch * heads * tokens * length * size

        def projected(count: int) -> torch.Tensor:
            return fresh(batch, count, heads, size).transpose(1, 2)

        query, key, value = projected(tokens), projected(length), projected(length)
        backends: tuple[Backend, ...] = ("auto", "flash", "cudnn")
        for backend in backends:
            yield backend, flops, _attention(backend, query, key, value)


def to_fp8_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) as fp8 and the float32 scales (rows, 1) that give the values back."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / largest
    return (rows.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


def _attention(backend: Backend, *tensors: torch.Tensor) -> Callable[[int], Any]:
    return lambda _: attend(backend, *tensors)


def _turns(size: int) -> int:
    """How many weights of this many bytes outgrow a 50 MB cache."""
    return max(1, min(24, math.ceil(120e6 / size)))


def _time_call(call: Callable[[int], Any], device: torch.device) -> float:
    """Microseconds a call, launches left out on CUDA by replaying a graph of many."""
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
    """Marks between steps; read once, after the last. CUDA's own clock where there is one."""

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
