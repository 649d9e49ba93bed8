import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernels_warmup.attention import set_attention, transformer_blocks
from kernels_warmup.compile import Recipe, compile_model
from kernels_warmup.quantize import SKIPPED, quantize_unet, why_unusable
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_models, tiny_unet

# torchao and torch warn of each other's insides when they are first imported together.
pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def quantized_names(unet: Any) -> set[str]:
    return {
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight.data) is not torch.Tensor
    }


def test_int8_says_how_far_one_forward_moved() -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    report = quantize_unet(unet, "int8")
    assert report is not None
    assert report.quantization == "int8"
    inputs = step_inputs(2)
    seen = relative_error(unet(**inputs)[0], plain(**inputs)[0])
    assert 1e-4 < seen < 0.05
    # Other inputs than its own, so the same only in size.
    assert seen / 3 < report.error < seen * 3


def test_the_large_products_are_replaced_and_the_skipped_are_not() -> None:
    unet = tiny_unet()
    set_attention(unet, "auto")
    report = quantize_unet(unet, "int8")
    names = quantized_names(unet)
    assert report is not None
    assert report.layers == len(names)
    blocks, transformers = len(transformer_blocks(unet)), 7
    # to_qkv, both outputs, the cross-attention's query and two of the feed-forward; in and out.
    assert len(names) == 6 * blocks + 2 * transformers
    assert not any(name.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v")) for name in names)
    for skipped in (
        "time_embedding.linear_1",
        "add_embedding.linear_2",
        "mid_block.resnets.0.time_emb_proj",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    ):
        assert isinstance(unet.get_submodule(skipped), torch.nn.Linear)
        assert skipped not in names
    assert all(reason for _, reason in SKIPPED)


def test_it_works_beside_every_rewrite() -> None:
    models = tiny_models()
    plain = copy.deepcopy(models.unet)
    recipe = Recipe(
        scope="none",
        replay="none",
        group_norm=True,
        upsample="phases",
        zero_text=True,
        time_once=True,
    )
    compiled = compile_model(models, quantize="int8", recipe=recipe)
    assert compiled.quantized is not None
    assert compiled.quantized.layers == len(quantized_names(models.unet))
    for batch in (2, 1):
        inputs = step_inputs(batch)
        assert relative_error(models.unet(**inputs)[0], plain(**inputs)[0]) < 0.05


def test_off_is_quantised_too() -> None:
    models = tiny_models()
    assert compile_model(models, "off", quantize="int8").quantized is not None


def test_none_changes_nothing_and_what_cannot_run_says_why() -> None:
    unet = tiny_unet()
    assert quantize_unet(unet, "none") is None
    assert not quantized_names(unet)
    with pytest.raises(ValueError, match="'int3' is not a quantisation: one of none, int8, fp8 is"):
        quantize_unet(unet, "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp8 needs an Ada or Hopper GPU or a later one; this is"):
        quantize_unet(unet, "fp8")
    assert not quantized_names(unet)


def test_without_torchao_the_reason_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    assert why_unusable("int8", CPU) == (
        "quantisation 'int8' needs torchao, which fails: ModuleNotFoundError"
    )
