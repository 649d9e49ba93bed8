"""Which module of the model a key of a LoRA file is about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

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
