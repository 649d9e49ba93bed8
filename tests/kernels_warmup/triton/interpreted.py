"""Runs the Triton kernels in Triton's interpreter on CPU tensors and compares them with references.

Run it as a program, with TRITON_INTERPRET=1 set before anything imports Triton. It prints JSON: for
each check and case a relative error or a count. `test_interpreted` checks them.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy
import torch
import triton.language as tl
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import interpreter

from bench.kernels import operator_times
from kernels_warmup.attention import set_attention
from kernels_warmup.fp8 import LARGEST, Rounded, calibrate, set_fp8
from kernels_warmup.quantize import quantized_names
from kernels_warmup.rewrites.text_once import TextOnce
from kernels_warmup.rewrites.zero_text import ZERO_TEXT
from kernels_warmup.triton import (
    cross_attention,
    geglu,
    install,
    layer_norm,
    reference,
    residuals,
    self_attention,
)
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_unet

# The interpreter cannot multiply bfloat16.
TYPES = {"float32": torch.float32, "float16": torch.float16}


def draw(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def norms(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    for width in (32, 640, 1280):
        hidden, change = draw(4, 5, width).to(dtype), draw(4, 5, width, seed=2).to(dtype)
        weight, bias = draw(width, seed=3).to(dtype), draw(width, seed=4).to(dtype)
        missing = draw(width, seed=5).to(dtype)
        wide = [tensor.float() for tensor in (hidden, change, weight, bias)]
        expected = reference.add_layer_norm(*wide, 1e-5)
        total, norm = layer_norm.add_layer_norm(hidden, change, None, weight, bias, 1e-5, 4)
        yield f"sum {width}", relative_error(total, expected[0])
        yield f"norm of the sum {width}", relative_error(norm, expected[1])
        alone = layer_norm.layer_norm(hidden, weight, bias, 1e-5)
        of = torch.nn.functional.layer_norm(wide[0], (width,), wide[2], wide[3], 1e-5)
        yield f"norm {width}", relative_error(alone, of)
        # The first three of four change by the same vector, and only the last is normed.
        filled = torch.cat([missing.expand(3, 5, width), change[3:]])
        expected = reference.add_layer_norm(wide[0], filled.float(), *wide[2:], 1e-5)
        total, norm = layer_norm.add_layer_norm(hidden, change[3:], missing, weight, bias, 1e-5, 1)
        yield f"sum of a part {width}", relative_error(total, expected[0])
        yield f"norm of a part {width}", relative_error(norm, expected[1][3:])
    if dtype == torch.float32:
        # Far from zero, mean of squares minus squared mean would cancel.
        far = draw(1, 8, 1280) + 1000
        one, nothing = torch.ones(1280), torch.zeros(1280)
        of = torch.nn.functional.layer_norm(far.double(), (1280,))
        yield "norm far from zero", relative_error(layer_norm.layer_norm(far, one, nothing, 0), of)


def norms_fp8(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """The errors of the sum, the fp8 values, the scales, and their product against the norm."""
    for width in (32, 640, 1280):
        hidden, change = draw(4, 5, width).to(dtype), draw(4, 5, width, seed=2).to(dtype)
        weight, bias = draw(width, seed=3).to(dtype), draw(width, seed=4).to(dtype)
        # A row of zeros, whose scale must not be zero, and a row of large values.
        hidden[0, 0], change[0, 0] = 0, 0
        hidden[1, 1] *= 100
        if width == 32:
            bias.zero_()
        missing = draw(width, seed=5).to(dtype)
        wide = [tensor.float() for tensor in (hidden, change, weight, bias)]
        exact = reference.add_layer_norm(*wide, 1e-5)[1]
        # With the second scale, a part of the norm saturates.
        for scale in (None, torch.tensor(0.005)):
            how = f"{width} {'by row' if scale is None else 'by one scale'}"
            of = (weight, bias, 1e-5, scale)
            total, *found = layer_norm.add_layer_norm_fp8(hidden, change, None, *of)
            sums, expected = reference.add_layer_norm_fp8(*wide, 1e-5, scale)
            yield f"sum {how}", relative_error(total, sums)
            yield from rounded(how, found, expected, scale)
            found = list(layer_norm.layer_norm_fp8(hidden, weight, bias, 1e-5, scale))
            zero = torch.zeros_like(wide[1])
            _, expected = reference.add_layer_norm_fp8(wide[0], zero, *wide[2:], 1e-5, scale)
            yield from rounded(f"alone {how}", found, expected, scale)
            filled = torch.cat([missing.expand(3, 5, width), change[3:]])
            total, *found = layer_norm.add_layer_norm_fp8(hidden, change[3:], missing, *of)
            sums, expected = reference.add_layer_norm_fp8(
                wide[0], filled.float(), *wide[2:], 1e-5, scale
            )
            yield f"sum of a part {how}", relative_error(total, sums)
            yield from rounded(f"of a part {how}", found, expected, scale)
        values, scales = layer_norm.add_layer_norm_fp8(
            hidden, change, None, weight, bias, 1e-5, None
        )[1:]
        yield f"fp8's own {width}", relative_error(values.float() * scales, exact)


def rounded(
    how: str, found: list[torch.Tensor], expected: Rounded, scale: torch.Tensor | None
) -> Iterator[tuple[str, float]]:
    values, scales = found
    assert values.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    if scale is None:
        yield f"scales {how}", relative_error(scales, expected.scales)
    else:
        assert scales.numel() == 0
    # A value in the middle of two fp8 numbers may be rounded to either: at most 1e-3 each.
    yield f"values {how}", relative_error(values.float(), expected.values.float())


def attentions(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    # 77 of a prompt; head and tail without a mask; one power of two, full and not; very few.
    for keys in (77, 80, 128, 64, 7):
        for tokens in (150, 40):
            query = draw(2, tokens, 128).to(dtype)
            # As in `TextOnce`: views of one buffer with keys and values alternating.
            stacked = draw(2, 2, keys, 128, seed=2).to(dtype)
            key, value = stacked.unbind()
            result = cross_attention.few_keys_attention(query, key, value, 2)
            expected = reference.attention(query.float(), key.float(), value.float(), 2)
            yield f"{tokens} to {keys} keys", relative_error(result, expected)
    # The query is a part of a wider projection; the scores would overflow an unshifted softmax.
    query = draw(2, 40, 3 * 128).to(dtype)[..., 128:256] * 40
    key, value = draw(2, 77, 128, seed=2).to(dtype), draw(2, 77, 128, seed=3).to(dtype)
    result = cross_attention.few_keys_attention(query, key, value, 2)
    expected = reference.attention(query.float(), key.float(), value.float(), 2)
    yield "a strided query of large scores", relative_error(result, expected)


def self_attentions(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    # Full and partial tiles, one and several, parts of a fused projection, large scores.
    for tokens, scale in ((128, 1), (150, 1), (40, 1), (150, 40)):
        fused = draw(2, tokens, 3 * 128).to(dtype)
        fused[..., :128] *= scale
        query, key, value = fused.chunk(3, dim=-1)
        expected = reference.attention(query.float(), key.float(), value.float(), 2)
        result = self_attention.self_attention(query, key, value, 2)
        yield f"{tokens} tokens times {scale}", relative_error(result, expected)
    for how in self_attention.CANDIDATES[1:]:
        result = self_attention.launch(query, key, value, 2, how)
        yield str(how), relative_error(result, expected)
    # A tensor that no descriptor can describe is copied first.
    odd = [part[:, :, 1:33] for part in (query, key, value)]
    expected = reference.attention(*(part.float() for part in odd), 2)
    result = self_attention.self_attention(*odd, 2)
    yield "rows at odd addresses", relative_error(result, expected)


def geglus(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    # Several tiles in each direction and per program, rows past the end, every tile width.
    for rows, inner, columns in ((300, 128, 512), (40, 72, 320), (10, 32, 48)):
        hidden = draw(2, rows // 2, inner).to(dtype)
        weight = (draw(2 * columns, inner, seed=2) / inner**0.5).to(dtype)
        bias = draw(2 * columns, seed=3).to(dtype)
        result = geglu.geglu(hidden, weight, bias)
        expected = reference.geglu(hidden.float(), weight.float(), bias.float())
        yield f"{rows} x {inner} x {columns}", relative_error(result, expected)


def residual(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    for width in (32, 640, 1280):
        hidden, shift = draw(4, 5, width).to(dtype), draw(width, seed=2)
        weight, bias = draw(width, seed=3).to(dtype), draw(width, seed=4).to(dtype)
        expected = reference.shifted_layer_norm(
            hidden.float(), shift, weight.float(), bias.float(), 1e-5
        )
        for last in (4, 1):
            norm = residuals.shifted_layer_norm(hidden, shift, weight, bias, 1e-5, last)
            yield f"norm of {width}, last {last}", relative_error(norm, expected[-last:])
        inner = draw(4, 5, 48, seed=5).to(dtype)
        product = draw(width, 48, seed=6).to(dtype)
        for last in (4, 1):
            total = hidden.clone()
            residuals.add_product(total, inner[-last:], product)
            summed = hidden.double()
            summed[-last:] += inner[-last:].double() @ product.double().T
            yield f"sum of {width}, last {last}", relative_error(total, summed)
            assert torch.equal(total[:-last], hidden[:-last])


def gelu() -> Iterator[tuple[str, float]]:
    """1 x gelu from -12 to 12: the largest difference; then gelu far below zero."""
    grid = torch.linspace(-12, 12, 16 * 8192).view(-1, 16)
    weight = torch.cat([torch.zeros(16, 16), torch.eye(16)])
    bias = torch.cat([torch.ones(16), torch.zeros(16)])
    difference = geglu.geglu(grid, weight, bias) - torch.nn.functional.gelu(grid.double())
    yield "gelu", float(difference.abs().max())
    yield "gelu far below", float(geglu.geglu(torch.full((1, 16), -1e4), weight, bias).abs().max())


def operators() -> Iterator[tuple[str, float]]:
    """How many of torch's checks of each operator's schema and fake version fail."""
    x, channels, one = draw(2, 4, 32), draw(32), torch.tensor(1.0)
    some = torch.ops.stepspan
    cases: tuple[tuple[Any, tuple[Any, ...]], ...] = (
        (some.add_layer_norm, (x, x + 1, None, channels, channels, 1e-5, 2)),
        (some.add_layer_norm, (x, x[1:], channels, channels, channels, 1e-5, 1)),
        (some.layer_norm, (x, channels, channels, 1e-5)),
        (some.add_layer_norm_fp8, (x, x + 1, None, channels, channels, 1e-5, None)),
        (some.add_layer_norm_fp8, (x, x[1:], channels, channels, channels, 1e-5, one)),
        (some.layer_norm_fp8, (x, channels, channels, 1e-5, None)),
        (some.layer_norm_fp8, (x, channels, channels, 1e-5, one)),
        (some.few_keys_attention, (x, x + 1, x + 2, 2)),
        (some.geglu, (x, draw(96, 32), draw(96))),
        (some.self_attention, (x, x + 1, x + 2, 2)),
        (some.add_product, (x, x + 1, draw(32, 32))),
        (some.shifted_layer_norm, (x, channels, channels, channels, 1e-5, 1)),
    )
    for number, (operator, arguments) in enumerate(cases):
        checks = ("test_schema", "test_faketensor")
        found = torch.library.opcheck(operator.default, arguments, test_utils=checks)
        yield f"{number}: {operator}", sum(outcome != "SUCCESS" for outcome in found.values())


def flops() -> Iterator[tuple[str, float]]:
    """The FLOPs that a counter counts for each operator, over those of its reference."""
    x = draw(2, 16, 32)
    for own, plain, arguments in (
        (geglu.geglu, reference.geglu, (x, draw(96, 32), draw(96))),
        (
            cross_attention.few_keys_attention,
            reference.attention,
            (x, x[:, :7], x[:, 7:14], 2),
        ),
        (self_attention.self_attention, reference.attention, (x, x, x, 2)),
        (residuals.add_product, residual_product, (x.clone(), x, draw(32, 32))),
    ):
        counts = []
        for function in (own, plain):
            with FlopCounterMode(display=False) as counter:
                function(*arguments)
            counts.append(counter.get_total_flops())
        yield own._name, counts[0] / counts[1]


def residual_product(
    total: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    return total + inner @ weight.T


def rows() -> Iterator[tuple[str, float]]:
    """How many rows of `bench operators` use these kernels; each is called once."""
    sizes = {
        "norm": [8, 32],
        "geglu": [16, 32, 64],
        "attention": [1, 2, 16, 7, 16],
        "attention to itself": [1, 2, 16, 16, 16],
    }
    with mock.patch.object(operator_times, "kernels_unusable", return_value=None):
        for case, size in sizes.items():
            kind = case.split()[0]
            ours = {
                how: call
                for how, _, call in operator_times._candidates(kind, size, torch.device("cpu"))
                if how.startswith("triton")
            }
            # The bench draws bfloat16, so this checks only that they run.
            for call in ours.values():
                call(0)
            yield case, len(ours)


def whole() -> Iterator[tuple[str, float]]:
    """A tiny UNet in float32: its errors against the unmodified one, and its calls per kernel."""
    plain = tiny_unet()
    inputs = step_inputs(2, size=8)
    expected = plain(**inputs)[0]

    unet = copy.deepcopy(plain)
    set_attention(unet, "auto")
    install.set_layer_norm(unet, across_blocks=False)
    yield "by block", relative_error(unet(**inputs)[0], expected)

    unet = copy.deepcopy(plain)
    text = prepared(unet)
    text.prepare(inputs["encoder_hidden_states"], inputs["added_cond_kwargs"])
    after_text = inputs | {"encoder_hidden_states": None, "added_cond_kwargs": {}}
    with Counted() as counted:
        yield "all", relative_error(unet(**after_text)[0], expected)
    yield from counted.calls.items()
    yield "traced", traced_error(unet)

    inputs["encoder_hidden_states"][:1] = 0
    expected = plain(**inputs)[0]
    text.prepare(inputs["encoder_hidden_states"], inputs["added_cond_kwargs"])
    after_text["cross_attention_kwargs"] = {ZERO_TEXT: True}
    yield "all, half without text", relative_error(unet(**after_text)[0], expected)

    residuals.set_residual_products(unet)
    install.set_self_attention(unet, "auto")
    with Counted() as counted:
        yield "residual, half without text", relative_error(unet(**after_text)[0], expected)
    yield from ((f"residual {name}", calls) for name, calls in counted.calls.items())
    yield "residual, traced", traced_error(unet)
    inputs = step_inputs(2, size=8)
    expected = plain(**inputs)[0]
    text.prepare(inputs["encoder_hidden_states"], inputs["added_cond_kwargs"])
    del after_text["cross_attention_kwargs"]
    yield "residual", relative_error(unet(**after_text)[0], expected)


def whole_fp8() -> Iterator[tuple[str, float]]:
    """With fp8 products: norms rounded by the kernel, against norms rounded by operators."""
    plain = tiny_unet()
    inputs = step_inputs(2, size=8)
    after_text = inputs | {"encoder_hidden_states": None, "added_cond_kwargs": {}}
    expected = plain(**inputs)[0]
    for way in ("by row", "static"):
        by_operators, _ = fp8_result(plain, inputs, after_text, way, fused=False)
        with Counted() as counted:
            by_kernel, unet = fp8_result(plain, inputs, after_text, way, fused=True)
        yield f"{way} against operators", relative_error(by_kernel, by_operators)
        yield f"{way} against the unmodified", relative_error(by_kernel, expected)
        for name, calls in counted.calls.items():
            yield f"{way} {name}", calls
        yield f"{way} traced", traced_error(unet)


def fp8_result(
    plain: Any, inputs: dict[str, Any], after_text: dict[str, Any], way: str, *, fused: bool
) -> tuple[torch.Tensor, Any]:
    """The result of a forward, and the UNet, prepared as by `compile_unet` on Hopper."""
    unet = copy.deepcopy(plain)
    set_attention(unet, "auto")
    names = quantized_names(unet)
    scales = calibrate(unet, names, lambda: unet(**inputs)) if way == "static" else None
    set_fp8(unet, names, scales)
    text = TextOnce(unet)
    install.set_layer_norm(unet)
    if fused:
        install.set_fp8_norms(unet)
    text.prepare(inputs["encoder_hidden_states"], inputs["added_cond_kwargs"])
    return unet(**after_text)[0], unet


def traced_error(unet: Any) -> float:
    """The error of a transformer traced as one graph, against the same without tracing."""
    transformer = unet.mid_block.attentions[0]
    hidden = draw(2, 128, 4, 4)
    compiled = torch.compile(transformer, fullgraph=True, dynamic=False, backend="aot_eager")
    return relative_error(compiled(hidden)[0], transformer(hidden)[0])


def prepared(unet: Any) -> TextOnce:
    """Prepare a UNet as `compile_unet` does on Hopper, without compiling."""
    set_attention(unet, "auto")
    text = TextOnce(unet)
    install.set_layer_norm(unet)
    install.set_cross_attention(unet, "auto")
    install.set_geglu(unet)
    return text


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of our own operators while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "stepspan":
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


_convert_float = interpreter._convert_float


def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The interpreter's conversion, but to fp8 as on Hopper: saturating and to the nearest.

    The interpreter's own rounds 7.93 to 4 instead of 8, because it loses the carry into the
    exponent.
    """
    if target != tl.float8e4nv:
        return _convert_float(values, source, target, rounding)
    # The interpreter stores the bits of fp8 in integers of the same size.
    wide = torch.from_numpy(numpy.asarray(values).view(numpy.float32).copy())
    assert source == tl.float32
    narrow = wide.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return narrow.view(torch.uint8).numpy()


def main(wanted: list[str]) -> None:
    """Print the figures of the wanted element types, of `checks` and of `whole`, as JSON."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "Triton would look for a GPU"
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad(), mock.patch.object(interpreter, "_convert_float", convert_float):
        for name in set(wanted) & set(TYPES):
            for part in (norms, norms_fp8, attentions, self_attentions, geglus, residual):
                found[f"{part.__name__} {name}"] = dict(part(TYPES[name]))
        if "checks" in wanted:
            for check in (gelu, operators, flops, rows):
                found[check.__name__] = dict(check())
        if "whole" in wanted:
            for check in (whole, whole_fp8):
                found[check.__name__] = dict(check())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
