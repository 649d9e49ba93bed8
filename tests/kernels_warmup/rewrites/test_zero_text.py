import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kernels_warmup.attention import set_attention, transformer_blocks
from kernels_warmup.rewrites.text_once import TextOnce
from kernels_warmup.rewrites.zero_text import ZERO_TEXT, Block, set_blocks
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_unet

ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def without_negative(batch: int) -> dict[str, Any]:
    inputs = step_inputs(batch)
    inputs["encoder_hidden_states"][: batch // 2] = 0
    inputs["added_cond_kwargs"]["text_embeds"][: batch // 2] = 0
    return inputs


def prepared(inputs: dict[str, Any]) -> Any:
    """A UNet with these blocks, whose text buffers are filled."""
    unet = tiny_unet()
    set_attention(unet, "auto")
    set_blocks(unet)
    text = TextOnce(unet)
    text.prepare(inputs["encoder_hidden_states"], inputs["added_cond_kwargs"])
    return unet


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_block_is_diffusers_block(batch: int) -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    set_blocks(unet)
    assert {type(block) for block in transformer_blocks(unet)} == {Block}
    assert unet.state_dict().keys() == plain.state_dict().keys()
    inputs = step_inputs(batch)
    assert relative_error(unet(**inputs)[0], plain(**inputs)[0]) < ROUNDING


@pytest.mark.parametrize("batch", [2, 4], ids=["one image", "two images"])
def test_zero_text_gives_the_full_result_from_half_the_cross_attention(batch: int) -> None:
    inputs = without_negative(batch)
    unet = prepared(inputs)
    rows = []
    for block in transformer_blocks(unet):
        for module in (block.norm2, block.attn2.to_q, block.attn2.to_out[0]):
            module.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    expected = tiny_unet()(**inputs)[0]
    assert relative_error(unet(**inputs)[0], expected) < ROUNDING
    assert set(rows) == {batch}
    rows.clear()
    with_zero_text = inputs | {"cross_attention_kwargs": {ZERO_TEXT: True}}
    assert relative_error(unet(**with_zero_text)[0], expected) < ROUNDING
    assert len(rows) == 3 * len(transformer_blocks(unet))
    assert set(rows) == {batch // 2}


def test_the_first_half_skips_its_text_which_matters_if_that_is_not_zero() -> None:
    inputs = step_inputs(2)
    unet = prepared(inputs)
    full = unet(**inputs)[0]
    result = unet(**inputs, cross_attention_kwargs={ZERO_TEXT: True})[0]
    assert relative_error(result[1:], full[1:]) < ROUNDING
    assert relative_error(result[:1], full[:1]) > 1e-4


def test_in_bfloat16_the_zero_half_is_exactly_the_same() -> None:
    inputs = without_negative(2)
    unet = prepared(inputs).bfloat16()
    block = transformer_blocks(unet)[0]
    for name in ("text_key", "text_value"):
        setattr(block.attn2, name, getattr(block.attn2, name).bfloat16())
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 16, block.attn2.inner_dim, generator=draw).bfloat16()
    full = block(hidden)
    half = block(hidden, cross_attention_kwargs={ZERO_TEXT: True})
    assert torch.equal(half[:1], full[:1])


def test_a_block_that_does_more_is_refused_and_none_is_changed() -> None:
    def refuses(change: Any, sentence: str) -> None:
        unet = tiny_unet()
        change(transformer_blocks(unet)[-1])
        with pytest.raises(ValueError, match=f"not SDXL's transformer block: .*{sentence}"):
            set_blocks(unet)
        assert not any(isinstance(block, Block) for block in transformer_blocks(unet))

    refuses(lambda block: setattr(block, "norm_type", "ada_norm"), "norm_type")
    refuses(lambda block: setattr(block, "pos_embed", nn.Identity()), "pos_embed")
    refuses(lambda block: setattr(block, "only_cross_attention", True), "only_cross_attention")
    refuses(lambda block: setattr(block, "fuser", nn.Identity()), "fuser")
    refuses(lambda block: block.set_chunk_feed_forward(2), "chunked")
    refuses(lambda block: setattr(block, "norm2", nn.Identity()), "norms")
    refuses(lambda block: setattr(block.attn2.to_out[0], "bias", None), "attn2")
