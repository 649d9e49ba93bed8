"""The compiled model on a GPU, on SDXL base's architecture at 1024x1024."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from kernels_warmup.attention import attend, why_unusable  # noqa: E402
from kernels_warmup.compile import compile_decoder, compile_unet  # noqa: E402
from kernels_warmup.numerical_error import StepInputs, forward_once, relative_error  # noqa: E402
from kernels_warmup.recipes import RECIPES  # noqa: E402
from kernels_warmup.shapes import CompiledShape  # noqa: E402
from tests.gpu.weights import Weights  # noqa: E402

DEFAULT = CompiledShape(1024, 1024)
TEXT = replace(RECIPES["off"], replay="captured", channels_last=True, fuse_qkv=True, text_once=True)
"""The UNet's measured rewrites, captured and not compiled."""
NO_WORSE = 1.02
"""Two bfloat16 computations of the same result round at different places."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(torch.device("cuda"))


@pytest.fixture(scope="module")
def inputs(weights: Weights) -> StepInputs:
    return StepInputs.draw(weights.unet(), DEFAULT, 1, torch.device("cuda"), torch.bfloat16)


@pytest.fixture(scope="module")
def reference(weights: Weights, inputs: StepInputs) -> torch.Tensor:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        exact = weights.unet(torch.float32)
        return forward_once(exact, inputs.cast(torch.float32))


@pytest.fixture(scope="module")
def eager_error(weights: Weights, inputs: StepInputs, reference: torch.Tensor) -> float:
    with torch.no_grad():
        return relative_error(forward_once(weights.unet(), inputs), reference)


@pytest.fixture(scope="module")
def compiled(weights: Weights, inputs: StepInputs) -> Any:
    """A UNet compiled as in the default mode, warm at one shape."""
    torch.backends.cudnn.benchmark = True
    with torch.no_grad():
        unet = weights.unet()
        compile_unet(unet, RECIPES["default"], "cudnn")
        forward_once(unet, inputs)
        return unet


def other(inputs: StepInputs) -> StepInputs:
    return replace(inputs, latents=-inputs.latents, text=inputs.text.flip(0))


def test_the_default_is_no_further_from_float32_than_eager(
    compiled: Any, inputs: StepInputs, reference: torch.Tensor, eager_error: float
) -> None:
    error = relative_error(forward_once(compiled, inputs), reference)
    print(f"compiled {error}, eager {eager_error}")
    assert error <= NO_WORSE * eager_error


def test_a_replay_never_overwrites_an_earlier_output(compiled: Any, inputs: StepInputs) -> None:
    first = forward_once(compiled, inputs)
    kept = first.clone()
    second = forward_once(compiled, other(inputs))
    again = forward_once(compiled, inputs)
    torch.cuda.synchronize()
    assert torch.equal(first, kept)
    assert torch.equal(again, kept)
    assert not torch.equal(second, kept)


def test_a_replay_follows_the_prompt(
    weights: Weights, compiled: Any, inputs: StepInputs, eager_error: float
) -> None:
    changed = replace(inputs, text=inputs.text.flip(0), latents=inputs.latents)
    result = forward_once(compiled, changed)
    expected = forward_once(weights.unet(), changed)
    before = forward_once(compiled, inputs)
    assert relative_error(result, expected) < 3 * eager_error
    assert relative_error(before, expected) > relative_error(result, expected)


def test_text_computed_once_is_the_same_in_float32(
    weights: Weights, inputs: StepInputs, reference: torch.Tensor
) -> None:
    torch.backends.cudnn.benchmark = False
    unet = weights.unet(torch.float32)
    compile_unet(unet, replace(TEXT, replay="none"), "auto")
    assert relative_error(forward_once(unet, inputs.cast(torch.float32)), reference) < 1e-4


@pytest.mark.parametrize(("backend", "kernel"), [("cudnn", "cudnn"), ("flash", "flash_fwd")])
def test_the_named_backend_is_the_kernel_that_runs(
    weights: Weights, inputs: StepInputs, backend: Any, kernel: str
) -> None:
    assert why_unusable(backend, torch.device("cuda"), torch.bfloat16) is None
    unet = weights.unet()
    compile_unet(unet, TEXT, backend)
    forward_once(unet, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        forward_once(unet, inputs)
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() or [] if event.device_type.name == "CUDA"]
    ran = [name for name in names if kernel in name and ("sdpa" in name or "flash" in name)]
    others = [name for name in names if "fmha_cutlass" in name or "softmax" in name.lower()]
    assert len(ran) >= 140, sorted(set(names))
    assert not others


@pytest.mark.parametrize("backend", ["cudnn", "flash", "auto"])
@pytest.mark.parametrize("tokens", [(1024, 1024), (4096, 77)])
def test_every_backend_computes_attention(backend: Any, tokens: tuple[int, int]) -> None:
    torch.manual_seed(4)
    query, key, value = (
        torch.randn(2, count, 10, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for count in (tokens[0], tokens[1], tokens[1])
    )
    exact = attend("math", query.float(), key.float(), value.float())
    assert relative_error(attend(backend, query, key, value), exact) < 1e-2


@pytest.mark.parametrize(
    "rewrites",
    [
        {},
        {"group_norm": True},
        {"upsample": "phases"},
        {"upsample": "transposed"},
        {"group_norm": True, "upsample": "phases"},
    ],
    ids=str,
)
def test_the_decoder_is_no_further_from_float32_than_eager(
    weights: Weights, rewrites: dict[str, Any]
) -> None:
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()
    latents = torch.randn(1, 4, *DEFAULT.latent, device="cuda", dtype=torch.bfloat16) * 7
    exact = weights.vae(torch.float32).decode(latents.float()).sample
    eager = relative_error(weights.vae().decode(latents).sample, exact)
    vae = weights.vae()
    compile_decoder(vae, replace(RECIPES["default"], **rewrites))
    first = vae.decode(latents).sample
    error = relative_error(first, exact)
    print(f"\n{rewrites}: error {error}, eager {eager}")
    assert error <= NO_WORSE * eager
    kept = first.clone()
    vae.decode(-latents)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("pixels", [(1, 512, 512, 256), (2, 128, 128, 960)], ids=str)
def test_a_group_norm_reads_memory_in_its_order(pixels: tuple[int, ...]) -> None:
    """Compiled alone, with SiLU, it takes at most three times as long as copying its bytes."""
    from torch import nn

    from kernels_warmup.rewrites.group_norm import group_norm

    torch.manual_seed(5)
    features = torch.randn(*pixels, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    norm = nn.GroupNorm(32, pixels[-1], device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: group_norm(x, norm, silu=True), dynamic=False)
    result = compiled(features)
    assert result.is_contiguous(memory_format=torch.channels_last)
    exact = nn.functional.silu(nn.functional.group_norm(features.double(), 32))
    assert relative_error(result, exact) < 3e-3

    def milliseconds(work: Any) -> float:
        for _ in range(3):
            work()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(20):
            work()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 20

    # A copy reads and writes the same bytes once; the norm reads them once more.
    copied = milliseconds(lambda: features.clone())
    took = milliseconds(lambda: compiled(features))
    print(f"\n{pixels}: {took * 1e3:.0f} us, a copy {copied * 1e3:.0f} us")
    assert took < 3 * 1.5 * copied
