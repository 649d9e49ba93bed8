"""Which module of the model a key of a LoRA file is about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from serve.model.loras.naming import Names, Target, other_kind, sgm_name
from serve.model.sdxl_base import UNET_CONFIG


@pytest.fixture(scope="module")
def unet() -> Any:
    """SDXL's UNet, without memory."""
    with init_empty_weights():
        return UNet2DConditionModel(**UNET_CONFIG)


def _targets(unet: Any) -> list[str]:
    kinds = torch.nn.Linear | torch.nn.Conv2d
    return [name for name, module in unet.named_modules() if isinstance(module, kinds)]


def test_kohyas_names_of_every_module_of_sdxl_are_read_as_diffusers_reads_them(unet: Any) -> None:
    """diffusers' own converter, for the same file."""
    names = Names(
        SimpleNamespace(unet=unet, text_encoder=torch.nn.Module(), text_encoder_2=torch.nn.Module())
    )
    spelt = {}
    for module in _targets(unet):
        sgm = sgm_name(module, unet.config)
        assert sgm is not None
        spelt[f"lora_unet_{sgm.replace('.', '_')}"] = module
    assert len(spelt) == len(_targets(unet)) > 790
    tensors = {}
    for number, name in enumerate(spelt):
        tensors[f"{name}.lora_down.weight"] = torch.full((1, 1), float(number))
        tensors[f"{name}.lora_up.weight"] = torch.zeros(1, 1)
        assert names.find(f"{name}.lora_down.weight") == (Target("unet", spelt[name]), "down")
    converted, _ = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=unet.config)
    modules = list(spelt.values())
    for key, tensor in converted.items():
        if ".up." in key:
            continue
        found = names.find(key)
        assert found is not None, key
        assert found[0].module == modules[int(tensor.item())], key


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_out_2.lora_mid.weight", "LoCon"),
        ("lora_unet_out_2.hada_w1_a", "LoHa"),
        ("lora_unet_out_2.lokr_w1", "LoKr"),
        ("lora_unet_out_2.dora_scale", "DoRA"),
        ("unet.conv_in.lora_magnitude_vector", "DoRA"),
        ("lora_unet_out_2.diff", "differences"),
        ("unet.conv_in.lora_B.bias", "biases"),
    ],
)
def test_other_kinds_are_known_by_name(key: str, kind: str) -> None:
    found = other_kind(key)
    assert found is not None
    assert kind in found


KEY_PARTS = st.sampled_from(
    [
        *(
            "unet",
            "text_encoder",
            "text_encoder_2",
            "base_model",
            "model",
            "processor",
            "to_out",
            "0",
        ),
        *(
            "conv_in",
            "mid_block",
            "attentions",
            "to_q",
            "self_attn",
            "text_model",
            "lora_unet_",
            ".",
        ),
        *(
            ".lora_A",
            ".lora_B.",
            ".weight",
            ".lora.down",
            ".lora_up",
            ".alpha",
            "_lora",
            "lora_te1_",
        ),
        *(".hada_w1", ".dora_scale", ".diff", ".on_input", ".oft_", "..", "/", "\n", "\0"),
    ]
)


@pytest.mark.parser
@given(st.lists(KEY_PARTS | st.text(max_size=4), max_size=10).map("".join))
def test_any_key_is_a_module_of_the_model_or_none(key: str) -> None:
    pipeline = SimpleNamespace(
        unet=torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(1, 1, 1)}),
        text_encoder=torch.nn.Module(),
        text_encoder_2=torch.nn.Module(),
    )
    pipeline.unet.config = {"layers_per_block": 2, "up_block_types": []}
    found = Names(pipeline).find(key)
    assert found is None or found[0] == Target("unet", "conv_in")
    kind = other_kind(key)
    assert kind is None or key not in kind
