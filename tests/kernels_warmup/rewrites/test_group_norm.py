import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from kernels_warmup.compile import channels_last
from kernels_warmup.rewrites.group_norm import (
    GroupNorm,
    GroupNormSilu,
    Resnet,
    group_norm,
    set_decoder_norms,
    set_unet_norms,
    stored,
)
from kernels_warmup.rewrites.vae_attention import set_vae_attention
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_unet, tiny_vae

ROUNDING = 1e-5


# Warnings from inside torch's compiler.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def a_norm(channels: int = 24, groups: int = 4, seed: int = 0) -> nn.GroupNorm:
    draw = torch.Generator().manual_seed(seed)
    norm = nn.GroupNorm(groups, channels, eps=1e-5)
    norm.weight.copy_(torch.randn(channels, generator=draw))
    norm.bias.copy_(torch.randn(channels, generator=draw))
    return norm


def features(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


ORDERS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a slice of channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "a slice of rows": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "tokens": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_it_equals_nn_group_norm_in_any_memory_order(order: str, silu: bool) -> None:
    norm, given = a_norm(), ORDERS[order](features(2, 24, 6, 10))
    expected = norm(given)
    result = group_norm(given, norm, silu=silu)
    assert result.shape == given.shape
    assert relative_error(result, nn.functional.silu(expected) if silu else expected) < ROUNDING


def test_channels_last_stays_channels_last() -> None:
    given = features(2, 24, 6, 10).contiguous(memory_format=torch.channels_last)
    result = group_norm(given, a_norm(), silu=True)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (1e3, 1), (3e4, 1), (1.0, 1e-4)], ids=str)
def test_a_large_mean_loses_no_more_precision_than_in_nn_group_norm(
    mean: float, deviation: float
) -> None:
    """Mean of squares minus squared mean would cancel, or become negative."""
    norm = a_norm()
    norm.eps = 1e-12
    given = (features(2, 24, 32, 32) * deviation + mean).contiguous(
        memory_format=torch.channels_last
    )
    exact = copy.deepcopy(norm).double()(given.double())
    ours = relative_error(group_norm(given, norm), exact)
    theirs = relative_error(norm(given), exact)
    assert ours <= max(1.1 * theirs, 1e-6)


def test_channels_of_one_group_that_lie_far_apart() -> None:
    """The variance of the group is then that of the channels' means."""
    norm, given = a_norm(), features(2, 24, 8, 8)
    given += torch.arange(24.0)[:, None, None] * 100
    assert relative_error(group_norm(given, norm), norm(given)) < ROUNDING


@pytest.mark.parametrize("silu", [False, True])
def test_bfloat16_is_no_further_from_float32(silu: bool) -> None:
    norm = a_norm(64, 8).bfloat16()
    given = (features(2, 64, 16, 16) * 3 + 1).bfloat16()
    exact = copy.deepcopy(norm).float()(given.float())
    theirs = norm(given)
    if silu:
        exact, theirs = nn.functional.silu(exact), nn.functional.silu(theirs)
    ours = group_norm(given, norm, silu=silu)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 1.01 * relative_error(theirs, exact)


def test_one_pixel_and_one_channel_a_group() -> None:
    norm = nn.GroupNorm(6, 6)
    for size in ((2, 6, 1, 1), (1, 6, 3, 5)):
        given = features(*size)
        assert torch.allclose(group_norm(given, norm), norm(given), atol=1e-5)


def test_it_is_traced_without_a_break() -> None:
    norm, given = a_norm(), features(2, 24, 6, 10)
    traced = torch.compile(
        lambda x: group_norm(stored(x), norm, silu=True), backend="aot_eager", fullgraph=True
    )
    assert relative_error(traced(given), nn.functional.silu(norm(given))) < ROUNDING
    torch.compiler.reset()


def test_stored_is_the_tensor_itself() -> None:
    for order in ORDERS.values():
        given = order(features(2, 24, 6, 10))
        same = stored(given)
        assert torch.equal(same, given)
        assert same.stride() == given.stride()
        assert same.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("part", ["unet", "decoder"])
def test_no_norm_is_left_and_the_result_is_the_unmodified_one(part: str, memory: str) -> None:
    model: Any = tiny_unet() if part == "unet" else tiny_vae()
    plain = copy.deepcopy(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if part == "unet":
        set_unet_norms(model)
        replaced = model
    else:
        # The attention's norm gets tokens.
        set_vae_attention(model)
        set_decoder_norms(model.decoder)
        replaced = model.decoder
    if memory == "channels last":
        channels_last(model)
    norms = [module for module in replaced.modules() if isinstance(module, nn.GroupNorm)]
    assert {type(norm) for norm in norms} == {GroupNorm, GroupNormSilu}
    resnets = [module for module in replaced.modules() if isinstance(module, ResnetBlock2D)]
    assert {type(resnet) for resnet in resnets} == {Resnet}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    if part == "unet":
        inputs = step_inputs(2)
        assert relative_error(model(**inputs)[0], plain(**inputs)[0]) < ROUNDING
    else:
        latents = features(1, 4, 8, 12)
        assert relative_error(model.decode(latents).sample, plain.decode(latents).sample) < ROUNDING


def test_a_module_that_is_not_sdxls_is_refused_and_unchanged() -> None:
    def refuses(change: Any, sentence: str, part: Any = tiny_unet) -> None:
        model = part()
        change(model)
        with pytest.raises(ValueError, match=f"not SDXL's group norms: .*{sentence}"):
            set_unet_norms(model) if part is tiny_unet else set_decoder_norms(model.decoder)
        assert not any(isinstance(m, GroupNorm | GroupNormSilu | Resnet) for m in model.modules())

    def first_resnet(unet: Any) -> Any:
        return unet.down_blocks[0].resnets[0]

    refuses(lambda unet: setattr(unet, "conv_act", nn.GELU()), "conv_norm_out")
    refuses(lambda unet: setattr(unet, "conv_norm_out", None), "conv_norm_out")
    refuses(
        lambda unet: setattr(first_resnet(unet), "norm1", nn.GroupNorm(8, 32, affine=False)),
        r"down_blocks\.0\.resnets\.0\.norm1",
    )
    refuses(lambda unet: setattr(first_resnet(unet), "output_scale_factor", 2.0), "output_scale")
    refuses(lambda unet: setattr(first_resnet(unet), "nonlinearity", nn.GELU()), "nonlinearity")
    refuses(
        lambda unet: setattr(first_resnet(unet), "time_embedding_norm", "scale_shift"),
        "time_embedding_norm",
    )
    refuses(lambda unet: setattr(first_resnet(unet), "upsample", nn.Identity()), "resampling")
    refuses(lambda unet: setattr(first_resnet(unet).dropout, "p", 0.1), "dropout")
    refuses(lambda vae: setattr(vae.decoder, "conv_act", nn.GELU()), "conv_norm_out", part=tiny_vae)
