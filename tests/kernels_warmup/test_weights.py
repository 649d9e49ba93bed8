"""Where a rewritten model reads its weights, and what it computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kernels_warmup.attention import set_attention, transformer_blocks
from kernels_warmup.compile import channels_last
from kernels_warmup.rewrites.text_once import TextOnce
from kernels_warmup.rewrites.time_once import set_time_once
from kernels_warmup.rewrites.upsampling import set_upsampling
from kernels_warmup.weights import as_matrix, derived_tensors, like_matrix
from tests.kernels_warmup.tiny import tiny_unet
from tests.kernels_warmup.triton_here import require_triton


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def change(unet: Any) -> None:
    """Another value for every weight, in place."""
    generator = torch.Generator().manual_seed(3)
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.data
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("last", [False, True])
def test_a_convolution_as_a_matrix_is_a_view_in_the_order_of_its_memory(last: bool) -> None:
    memory = torch.channels_last if last else torch.contiguous_format
    weight = torch.randn(5, 4, 3, 3).contiguous(memory_format=memory)
    matrix = as_matrix(weight)
    assert matrix.data_ptr() == weight.data_ptr()
    assert torch.equal(matrix, like_matrix(weight.clone(), weight))
    change = torch.randn(5, 4, 3, 3)
    wanted = weight + change
    matrix += like_matrix(change, weight)
    assert torch.equal(weight, wanted)


def test_a_pointwise_and_a_linear_weight_are_matrices_as_they_are() -> None:
    for weight in (torch.randn(5, 4), torch.randn(5, 4, 1, 1)):
        assert as_matrix(weight).shape == (5, 4)
        assert as_matrix(weight).data_ptr() == weight.data_ptr()


def test_fused_and_stacked_weights_share_their_memory_with_the_modules() -> None:
    unet = tiny_unet()
    channels_last(unet)
    set_attention(unet, "auto", fuse_qkv=True)
    set_time_once(unet)
    TextOnce(unet)
    for block in transformer_blocks(unet):
        attn = block.attn1
        attn.to_k.weight.data.fill_(7.0)
        width = attn.to_q.out_features
        assert bool((attn.to_qkv.weight[width : 2 * width] == 7.0).all())
        assert not bool((attn.to_qkv.weight[:width] == 7.0).any())
        stored = {linear.weight.untyped_storage().data_ptr() for linear in (attn.to_q, attn.to_v)}
        assert stored == {attn.to_qkv.weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("way", ["phases", "transposed"])
def test_summed_kernels_follow_their_weight(way: Any) -> None:
    wanted, unet = tiny_unet(), tiny_unet()
    change(wanted)
    set_upsampling(wanted, way)
    set_upsampling(unet, way)
    change(unet)
    derived = derived_tensors(unet)
    assert len(derived) == 2
    for name, each in derived.items():
        assert unet.get_submodule(name).weight.dim() == 4
        summed = wanted.get_submodule(name.removesuffix(".conv")).summed
        assert not torch.equal(each.tensor, summed)
        each.tensor.copy_(each.compute())
        assert torch.equal(each.tensor, summed)


def test_the_output_bias_of_residual_products_follows_its_weight() -> None:
    require_triton()
    from kernels_warmup.triton.install import set_layer_norm
    from kernels_warmup.triton.residuals import set_residual_products

    def rewritten(unet: Any) -> Any:
        set_layer_norm(unet)
        set_residual_products(unet)
        return unet

    wanted = tiny_unet()
    change(wanted)
    rewritten(wanted)
    unet = rewritten(tiny_unet())
    change(unet)
    derived = derived_tensors(unet)
    assert len(derived) > 1
    for name, each in derived.items():
        assert name.endswith(".proj_out")
        transformer = wanted.get_submodule(name.removesuffix(".proj_out"))
        assert not torch.equal(each.tensor, transformer.output_bias)
        each.tensor.copy_(each.compute())
        assert torch.equal(each.tensor, transformer.output_bias)
