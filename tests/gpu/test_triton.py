"""The Triton kernels on a Hopper GPU, at SDXL base's sizes.

Each test compares a kernel with its reference in float32; the error may be at most that of the
reference in bfloat16. Then follow all kernels inside `torch.compile` and inside a captured CUDA
graph. `test_ways` tests them in the whole UNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.kernels_warmup.tiny import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NO_WORSE = 1.02
"""Two bfloat16 computations of the same result round at different places."""

Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def _here() -> Iterator[None]:
    from kernels_warmup.triton import why_unusable

    reason = why_unusable(torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.compiler.reset()


def draw(*size: int, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    made = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*size, generator=made, device="cuda") * scale).to(torch.bfloat16)


def norm_inputs(tokens: int, width: int) -> Tensors:
    hidden, change = draw(2, tokens, width) + 2, draw(2, tokens, width, seed=2)
    return hidden, change, draw(width, seed=3), draw(width, seed=4)


def attention_inputs(tokens: int, width: int, keys: int = 77) -> Tensors:
    stacked = draw(4, 2, keys, width, seed=2)
    return draw(2, tokens, width), stacked[0], stacked[1]


def geglu_inputs(rows: int, width: int) -> Tensors:
    weight = draw(8 * width, width, seed=2, scale=width**-0.5)
    return draw(2, rows // 2, width), weight, draw(8 * width, seed=3, scale=0.1)


def check(own: Callable[..., Any], reference: Callable[..., Any], inputs: Tensors) -> None:
    """Check that a kernel's error against float32 is at most that of its bfloat16 reference."""
    exact = listed(reference(*(tensor.float() for tensor in inputs)))
    plain = listed(reference(*inputs))
    results = listed(own(*inputs))
    assert len(results) == len(exact)
    for result, eager, expected in zip(results, plain, exact, strict=True):
        assert result.dtype == torch.bfloat16
        assert result.shape == expected.shape
        assert relative_error(result, expected) <= NO_WORSE * relative_error(eager, expected)


def listed(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


# The sizes of 1024x1024, and of 1216x832, whose numbers of tokens are no multiples of 128.
LEVELS = [(1024, 1280), (4096, 640), (26 * 38, 1280), (52 * 76, 640)]


@pytest.mark.parametrize(("tokens", "width"), LEVELS)
def test_a_sum_and_its_norm(tokens: int, width: int) -> None:
    from kernels_warmup.triton import layer_norm, reference

    def own(hidden: torch.Tensor, change: torch.Tensor, *of: torch.Tensor) -> Any:
        return layer_norm.add_layer_norm(hidden, change, None, *of, 1e-5, 2)

    def plain(*inputs: torch.Tensor) -> Any:
        return reference.add_layer_norm(*inputs, 1e-5)

    check(own, plain, norm_inputs(tokens, width))


@pytest.mark.parametrize(("tokens", "width"), LEVELS)
def test_a_norm_alone(tokens: int, width: int) -> None:
    from kernels_warmup.triton import layer_norm

    def plain(hidden: torch.Tensor, *of: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(hidden, (width,), *of, 1e-5)

    hidden, _, *of = norm_inputs(tokens, width)
    check(lambda *inputs: layer_norm.layer_norm(*inputs, 1e-5), plain, (hidden, *of))


@pytest.mark.parametrize(("tokens", "width"), LEVELS)
def test_a_sum_of_which_half_changes_by_the_same(tokens: int, width: int) -> None:
    from kernels_warmup.triton import layer_norm, reference

    def own(hidden: torch.Tensor, change: torch.Tensor, *of: torch.Tensor) -> Any:
        return layer_norm.add_layer_norm(hidden, change[1:], of[1], *of, 1e-5, 1)

    def plain(hidden: torch.Tensor, change: torch.Tensor, *of: torch.Tensor) -> Any:
        filled = torch.cat([of[1].expand_as(change[:1]), change[1:]])
        total, norm = reference.add_layer_norm(hidden, filled, *of, 1e-5)
        return total, norm[1:]

    check(own, plain, norm_inputs(tokens, width))


@pytest.mark.parametrize("candidate", range(5))
@pytest.mark.parametrize("width", [640, 1280])
def test_every_launch_of_the_norm(width: int, candidate: int) -> None:
    from kernels_warmup.triton import layer_norm, reference

    how = layer_norm.CANDIDATES[candidate]

    def own(hidden: torch.Tensor, change: torch.Tensor, *of: torch.Tensor) -> Any:
        rows = (hidden.flatten(0, 1), change.flatten(0, 1))
        results = layer_norm.launch(*rows, None, *of, 1e-5, len(rows[0]), how)
        return [result.view(hidden.shape) for result in results if result is not None]

    check(own, lambda *i: reference.add_layer_norm(*i, 1e-5), norm_inputs(999, width))


@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
@pytest.mark.parametrize(("tokens", "width"), LEVELS)
def test_a_norm_as_fp8_and_the_product_that_reads_it(tokens: int, width: int, static: bool) -> None:
    from kernels_warmup.fp8 import LARGEST, MARGIN, Fp8Linear, Rounded, set_fp8
    from kernels_warmup.triton import layer_norm, reference

    hidden, change, *of = norm_inputs(tokens, width)
    wide = [tensor.float() for tensor in (hidden, change, *of)]
    total, exact = reference.add_layer_norm(*wide, 1e-5)
    scale = MARGIN * exact.abs().max() / LARGEST if static else None
    _, expected = reference.add_layer_norm_fp8(*wide, 1e-5, scale)

    found, values, scales = layer_norm.add_layer_norm_fp8(hidden, change, None, *of, 1e-5, scale)
    assert values.dtype == torch.float8_e4m3fn
    assert relative_error(found, total) < 0.003
    if not static:
        assert relative_error(scales, expected.scales) < 1e-6
    # A value in the middle of two fp8 numbers may be rounded to either.
    assert relative_error(values.float(), expected.values.float()) < 1e-3
    rounded = Rounded(values, scales if scale is None else scale)
    assert relative_error(rounded.values.float() * rounded.scales, exact) < 0.035
    values, own = layer_norm.layer_norm_fp8(found, *of, 1e-5, scale)
    assert relative_error(values.float() * (own if scale is None else scale), exact) < 0.035

    model = torch.nn.Sequential(torch.nn.Linear(width, 3 * width, device="cuda"))
    weight = model[0].weight.clone()
    model.to(torch.bfloat16)
    set_fp8(model, ["0"], None if scale is None else {"0": scale})
    assert type(model[0]) is Fp8Linear
    product = model(rounded)
    assert product.dtype == torch.bfloat16
    stored = model[0].weight.float() * model[0].weight_scale.view(-1, 1)
    near = torch.nn.functional.linear(rounded.values.float() * rounded.scales, stored)
    assert relative_error(product, near + model[0].bias.float()) < 0.01
    plain = torch.nn.functional.linear(exact, weight, model[0].bias.float())
    assert relative_error(product, plain) < 0.06


@pytest.mark.parametrize("keys", [77, 64, 128, 7])
@pytest.mark.parametrize(("tokens", "width"), LEVELS)
def test_attention_to_few_keys(tokens: int, width: int, keys: int) -> None:
    from kernels_warmup.triton import cross_attention, reference

    heads = width // 64
    check(
        lambda *inputs: cross_attention.few_keys_attention(*inputs, heads),
        lambda *inputs: reference.attention(*inputs, heads),
        attention_inputs(tokens, width, keys),
    )


@pytest.mark.parametrize("candidate", range(4))
def test_every_launch_of_the_attention(candidate: int) -> None:
    from kernels_warmup.triton import cross_attention, reference

    how = cross_attention.CANDIDATES[candidate]
    check(
        lambda *inputs: cross_attention.launch(*inputs, 20, how),
        lambda *inputs: reference.attention(*inputs, 20),
        attention_inputs(26 * 38, 1280),
    )


def self_attention_inputs(tokens: int, width: int) -> Tensors:
    """Query, key and value, as parts of the result of one fused projection."""
    return draw(2, tokens, 3 * width).chunk(3, dim=-1)


# The sizes of 512x512 as well: 256 tokens with 20 heads, 1,024 with 10.
@pytest.mark.parametrize(("tokens", "width"), [*LEVELS, (256, 1280), (1024, 640)])
def test_self_attention(tokens: int, width: int) -> None:
    from kernels_warmup.triton import reference, self_attention

    heads = width // 64
    check(
        lambda *inputs: self_attention.self_attention(*inputs, heads),
        lambda *inputs: reference.attention(*inputs, heads),
        self_attention_inputs(tokens, width),
    )


@pytest.mark.parametrize("candidate", range(6))
@pytest.mark.parametrize("tokens", [1024, 26 * 38])
def test_every_launch_of_self_attention(tokens: int, candidate: int) -> None:
    from kernels_warmup.triton import reference, self_attention

    how = self_attention.CANDIDATES[candidate]
    check(
        lambda *inputs: self_attention.launch(*inputs, 20, how),
        lambda *inputs: reference.attention(*inputs, 20),
        self_attention_inputs(tokens, 1280),
    )


@pytest.mark.parametrize("last", [2, 1])
@pytest.mark.parametrize(("tokens", "width"), LEVELS)
def test_a_sum_by_its_product_and_the_norm_of_what_it_lacks(
    tokens: int, width: int, last: int
) -> None:
    from kernels_warmup.triton import reference, residuals

    shift = draw(width, seed=7).float()

    def own(total: torch.Tensor, inner: torch.Tensor, product: torch.Tensor, *of: Any) -> Any:
        total = total.clone()
        residuals.add_product(total, inner[-last:], product)
        return total, residuals.shifted_layer_norm(total, shift, *of, 1e-5, last)

    def plain(total: torch.Tensor, inner: torch.Tensor, product: torch.Tensor, *of: Any) -> Any:
        total = torch.cat([total[:-last], total[-last:] + inner[-last:] @ product.T])
        return total, reference.shifted_layer_norm(total[-last:], shift, *of, 1e-5)

    hidden, inner, *of = norm_inputs(tokens, width)
    product = draw(width, width, seed=8, scale=width**-0.5)
    check(own, plain, (hidden, inner, product, *of))


@pytest.mark.parametrize(("tokens", "width"), LEVELS)
def test_geglu(tokens: int, width: int) -> None:
    from kernels_warmup.triton import geglu, reference

    check(geglu.geglu, reference.geglu, geglu_inputs(2 * tokens, width))


@pytest.mark.parametrize("candidate", range(6))
@pytest.mark.parametrize("width", [640, 1280])
def test_every_launch_of_geglu(width: int, candidate: int) -> None:
    from kernels_warmup.triton import geglu, reference

    how = geglu.CANDIDATES[candidate]
    inputs = geglu_inputs(2 * 26 * 38, width)
    check(lambda *i: geglu.launch(*i, how), reference.geglu, inputs)


def every_kernel(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """All kernels, with operators between them that the compiler may reorder or fuse.

    hidden: (2, 1024, 1280).
    """
    from kernels_warmup.triton import cross_attention, geglu, layer_norm, residuals, self_attention

    scale, shift = bias[:1280], bias[1280:2560]
    norm = layer_norm.layer_norm(hidden * 0.5, scale, shift, 1e-5)
    attended = self_attention.self_attention(norm, norm * 0.5, norm + 1, 20)
    total = norm + 2
    residuals.add_product(total, attended, weight[:1280])
    norm = residuals.shifted_layer_norm(total, scale.float(), scale, shift, 1e-5, 2)
    change = cross_attention.few_keys_attention(norm + 1, text, text * 0.5, 20)
    total, norm = layer_norm.add_layer_norm(hidden, change, None, scale, shift, 1e-5, 2)
    return geglu.geglu(norm, weight, bias)[..., :1280] * 0.5 + total


def as_one(hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """`every_kernel`, computed by the references."""
    from kernels_warmup.triton import reference

    weight, bias, text = rest
    scale, shift = bias[:1280], bias[1280:2560]
    norm = torch.nn.functional.layer_norm(hidden * 0.5, (1280,), scale, shift, 1e-5)
    attended = reference.attention(norm, norm * 0.5, norm + 1, 20)
    total = norm + 2 + attended @ weight[:1280].T
    norm = reference.shifted_layer_norm(total, scale.float(), scale, shift, 1e-5)
    change = reference.attention(norm + 1, text, text * 0.5, 20)
    total, norm = reference.add_layer_norm(hidden, change, scale, shift, 1e-5)
    return reference.geglu(norm, weight, bias)[..., :1280] * 0.5 + total


def inputs_of_all(seed: int = 1) -> Tensors:
    _, weight, bias = geglu_inputs(2, 1280)
    return draw(2, 1024, 1280, seed=seed), weight, bias, draw(2, 77, 1280, seed=seed + 1)


def test_inside_a_compiled_function() -> None:
    compiled = torch.compile(every_kernel, fullgraph=True, dynamic=False)
    check(compiled, as_one, inputs_of_all())


@pytest.mark.parametrize("compile_first", [False, True], ids=["eager", "compiled"])
def test_inside_a_captured_graph(compile_first: bool) -> None:
    """The graph stores descriptors by value, so new inputs must be copied to the same addresses."""
    from kernels_warmup.cuda_graphs import Captured

    function = torch.compile(every_kernel, fullgraph=True) if compile_first else every_kernel
    captured = Captured(function, inputs_of_all(), torch.cuda.graph_pool_handle())
    for seed in (1, 5):
        inputs = inputs_of_all(seed)
        check(lambda *given: captured.replay(given), as_one, inputs)
        assert torch.equal(captured.replay(inputs), captured.replay(inputs))
    assert not torch.equal(captured.replay(inputs_of_all(1)), captured.replay(inputs_of_all(5)))
