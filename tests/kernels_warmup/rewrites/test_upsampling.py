import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from kernels_warmup.compile import channels_last
from kernels_warmup.rewrites.upsampling import Upsample, set_upsampling
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_unet, tiny_vae

ROUNDING = 1e-5
WAYS: Any = ("phases", "transposed")


# Warnings from inside torch's compiler.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def an_upsampling(bias: bool = True) -> tuple[nn.Module, Upsample2D]:
    torch.manual_seed(0)
    plain = Upsample2D(6, use_conv=True, out_channels=10, bias=bias)
    return nn.ModuleList([copy.deepcopy(plain)]), plain


def features(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("way", WAYS)
def test_every_pixel_equals_the_unmodified_one_at_the_edges_too(
    way: Any, memory: str, bias: bool
) -> None:
    holder, plain = an_upsampling(bias)
    if memory == "channels last":
        channels_last(holder)
    set_upsampling(holder, way)
    for size in ((2, 6, 5, 7), (1, 6, 1, 1), (1, 6, 8, 4)):
        given = features(*size)
        if memory == "channels last":
            given = given.contiguous(memory_format=torch.channels_last)
        result, expected = holder[0](given), plain(given)
        assert result.shape == expected.shape
        # Per pixel, because a wrong edge hardly changes the error of the whole image.
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        if memory == "channels last" and size[2] > 1:
            assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_traced_without_a_break(way: Any) -> None:
    holder, plain = an_upsampling()
    channels_last(holder)
    set_upsampling(holder, way)
    given = features(2, 6, 5, 7)
    traced = torch.compile(holder[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(given), plain(given), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("way", WAYS)
def test_a_size_that_is_not_twice_as_large_is_computed_as_before(way: Any) -> None:
    holder, plain = an_upsampling()
    set_upsampling(holder, way)
    given = features(2, 6, 5, 7)
    assert torch.equal(holder[0](given, (9, 13)), plain(given, (9, 13)))
    torch.testing.assert_close(
        holder[0](given, torch.Size((10, 14))), plain(given, (10, 14)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", [16, 18], ids=["halved twice", "odd in the middle"])
@pytest.mark.parametrize("way", WAYS)
def test_the_unet_gives_the_unmodified_result(way: Any, size: int) -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    set_upsampling(unet, way)
    assert sum(type(module) is Upsample for module in unet.modules()) == 2
    assert unet.state_dict().keys() == plain.state_dict().keys()
    inputs = step_inputs(2, size=size)
    assert relative_error(unet(**inputs)[0], plain(**inputs)[0]) < ROUNDING


@pytest.mark.parametrize("way", WAYS)
def test_the_decoder_gives_the_unmodified_result(way: Any) -> None:
    vae = tiny_vae()
    plain = copy.deepcopy(vae)
    set_upsampling(vae.decoder, way)
    assert sum(type(module) is Upsample for module in vae.modules()) == 3
    latents = features(1, 4, 8, 12)
    assert relative_error(vae.decode(latents).sample, plain.decode(latents).sample) < ROUNDING


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_sums_are_rounded_once(way: Any) -> None:
    """Eager rounds only the result; the summed kernel is rounded in addition. On a CPU without
    bfloat16 PyTorch also rounds what it adds to a transposed convolution's result."""
    holder, plain = an_upsampling()
    holder, plain = holder.bfloat16(), plain.bfloat16()
    set_upsampling(holder, way)
    given = features(2, 6, 16, 16).bfloat16()
    exact = copy.deepcopy(plain).float()(given.float())
    ours = relative_error(holder[0](given), exact)
    theirs = relative_error(plain(given), exact)
    added = way == "transposed" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert ours < (3 if added else 2) * theirs


def test_nearest_changes_nothing_and_what_is_not_sdxls_is_refused() -> None:
    holder, _ = an_upsampling()
    set_upsampling(holder, "nearest")
    assert type(holder[0]) is Upsample2D
    with pytest.raises(ValueError, match="nearest, phases, transposed"):
        set_upsampling(holder, "bilinear")  # type: ignore[arg-type]

    def refused(upsample: Upsample2D) -> None:
        holder = nn.ModuleList([an_upsampling()[1], upsample])
        with pytest.raises(ValueError, match="not SDXL's upsampling"):
            set_upsampling(holder, "phases")
        assert not any(isinstance(module, Upsample) for module in holder)

    refused(Upsample2D(6))
    refused(Upsample2D(6, use_conv_transpose=True))
    refused(Upsample2D(6, use_conv=True, kernel_size=5, padding=2))
    refused(Upsample2D(6, use_conv=True, padding=0))
    refused(Upsample2D(6, use_conv=True, interpolate=False))
    refused(Upsample2D(6, use_conv=True, norm_type="rms_norm"))
    refused(Upsample2D(6, use_conv=True, name="Conv2d_0"))
