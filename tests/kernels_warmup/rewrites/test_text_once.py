import copy

import pytest
import torch

from kernels_warmup.attention import set_attention, transformer_blocks
from kernels_warmup.compile import compile_model
from kernels_warmup.recipes import Recipe
from kernels_warmup.rewrites.text_once import BUFFERED_TEXT, TextOnce
from tests.kernels_warmup.tiny import (
    relative_error,
    step_inputs,
    tiny_models,
    tiny_unet,
)

ROUNDING = 1e-5

EAGER = Recipe(scope="none", replay="none")


def test_text_once_follows_the_prompt_the_batch_and_a_write_in_place() -> None:
    unet = tiny_unet()
    models = tiny_models()
    models.unet = copy.deepcopy(unet)
    compile_model(models, "default", recipe=EAGER)

    def same(inputs) -> bool:  # type: ignore[no-untyped-def]
        return relative_error(models.unet(**inputs)[0], unet(**inputs)[0]) < ROUNDING

    first, other = step_inputs(2, seed=1), step_inputs(2, seed=2)
    assert same(first)
    assert same(other)
    assert same(first)
    assert same(step_inputs(1, seed=3))
    assert same(first)
    assert same(step_inputs(2, tokens=14, seed=4))
    assert same(first)
    first["encoder_hidden_states"].mul_(-1)
    assert same(first)
    first["added_cond_kwargs"]["time_ids"].add_(64)
    assert same(first)


def test_text_is_projected_once_a_run_and_not_once_a_step() -> None:
    models = tiny_models()
    compiled = compile_model(models, "default", recipe=EAGER)
    assert compiled.text is not None
    products = []
    real = torch.bmm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", lambda *a, **k: products.append(1) or real(*a, **k))
        inputs = step_inputs(2)
        text = inputs["encoder_hidden_states"], inputs["added_cond_kwargs"]
        of_the_run = {BUFFERED_TEXT: compiled.text.prepare(*text)}
        for _ in range(5):
            models.unet(**inputs, cross_attention_kwargs=of_the_run)
    assert len(products) == 2  # one for each attention width
    reads = []
    for block in transformer_blocks(models.unet):
        block.attn2.to_k.register_forward_hook(lambda *_: reads.append(1))
    models.unet(**inputs, cross_attention_kwargs=of_the_run)
    assert not reads
    # Without it a step reads the text that it gets, and then the buffers hold that one.
    models.unet(**inputs)
    with pytest.raises(RuntimeError, match="another run"):
        models.unet(**inputs, cross_attention_kwargs=of_the_run)


def test_text_buffers_keep_their_address_for_a_captured_graph() -> None:
    unet = tiny_unet()
    set_attention(unet, "auto")
    text = TextOnce(unet)

    def prepare(batch: int, seed: int) -> int:
        inputs = step_inputs(batch, seed=seed)
        text.prepare(inputs["encoder_hidden_states"], inputs["added_cond_kwargs"])
        return int(transformer_blocks(unet)[-1].attn2.text_value.data_ptr())

    first = prepare(2, 1)
    assert prepare(1, 2) != first
    assert prepare(2, 3) == first


def test_text_once_works_in_inference_mode_and_outside_it() -> None:
    models = tiny_models()
    plain = copy.deepcopy(models.unet)
    compile_model(models, "default", recipe=EAGER)
    with torch.inference_mode():
        inputs = step_inputs(2, seed=1)
        assert relative_error(models.unet(**inputs)[0], plain(**inputs)[0]) < ROUNDING
    inputs = step_inputs(2, seed=2)
    assert relative_error(models.unet(**inputs)[0], plain(**inputs)[0]) < ROUNDING


def test_text_once_holds_the_weights_once_and_keeps_them_loadable() -> None:
    unet = tiny_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    set_attention(unet, "auto", fuse_qkv=False)
    TextOnce(unet)
    after = unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    blocks = transformer_blocks(unet)
    same_width = [b.attn2 for b in blocks if b.attn2.inner_dim == 128]
    storages = {attn.to_k.weight.untyped_storage().data_ptr() for attn in same_width}
    assert len(storages) == 1
