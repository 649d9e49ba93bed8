"""Reading LoRA files: every naming gives the same factors, and what does not fit is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ModelError
from serve.model.loras.files import Lora, _Config, _DoesNotFit, read_lora
from serve.model.loras.naming import Target
from serve.model.sdxl import SdxlModel
from tests.support import loras

Tensors = dict[str, torch.Tensor]
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_TO_Q = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


def _products(lora: Lora) -> dict[Target, torch.Tensor]:
    return {
        target: each.scale * each.up @ each.down.flatten(1) for target, each in lora.factors.items()
    }


def test_every_naming_of_one_lora_gives_the_same_changes(plain: SdxlModel, tmp_path: Path) -> None:
    pipeline = plain.pipeline
    made = {
        target: (up, down, 3.0) for target, (up, down, _) in loras.make(pipeline, rank=2).items()
    }
    files = {
        "peft": loras.as_peft(made),
        "diffusers": loras.as_diffusers(made),
        "kohya": loras.as_kohya(made, pipeline.unet.config),
        "kohya-diffusers": loras.as_kohya(made),
        "wrapped": {
            key.replace(".", ".base_model.model.", 1): value
            for key, value in loras.as_peft(made).items()
        },
    }
    for name, tensors in files.items():
        file = loras.save(tensors, tmp_path / f"{name}.safetensors")
        read = _products(read_lora(name, file, pipeline))
        assert read.keys() == made.keys(), name
        for target, (up, down, alpha) in made.items():
            wanted = alpha / 2 * up @ down.flatten(1)
            torch.testing.assert_close(read[target], wanted, msg=f"{name} {target}")


def test_alpha_comes_from_the_metadata_or_from_pefts_configuration(
    plain: SdxlModel, tmp_path: Path
) -> None:
    tensors = {
        f"unet.{TO_Q}.lora_A.weight": torch.ones(4, 128),
        f"unet.{TO_Q}.lora_B.weight": torch.ones(128, 4),
    }
    target = Target("unet", TO_Q)

    def scale(file: Path) -> float:
        return read_lora("ink", file, plain.pipeline).factors[target].scale

    assert scale(loras.save(tensors, tmp_path / "none.safetensors")) == 1.0
    metadata = {"unet.lora_alpha": 8, "unet.r": 4, "unet.alpha_pattern": {}}
    file = tmp_path / "diffusers.safetensors"
    assert scale(loras.save(tensors, file, lora_adapter_metadata=json.dumps(metadata))) == 2.0
    metadata |= {"unet.alpha_pattern": {"attn1.to_q": 12}}
    assert scale(loras.save(tensors, file, lora_adapter_metadata=json.dumps(metadata))) == 3.0
    file = loras.save(tensors, tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 8, "r": 4, "use_rslora": True}))
    assert scale(file) == 4.0
    config.write_text(json.dumps({"use_dora": True}))
    with pytest.raises(ModelError, match="DoRA"):
        scale(file)


def _without(ending: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(ending)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {"lora_unet_nowhere.lora_down.weight": torch.ones(2, 2), **t}, "nowhere"),
        (lambda t: t | {f"{KOHYA_TO_Q}.lora_mid.weight": torch.ones(2, 2)}, "LoCon"),
        (lambda t: {f"{KOHYA_TO_Q}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        (lambda t: t | {f"{KOHYA_TO_Q}.dora_scale": torch.ones(2, 2)}, "DoRA"),
        (lambda t: t | {f"{KOHYA_TO_Q}.lora_down.weight": torch.ones(2, 640)}, "rank x 128"),
        (lambda t: t | {f"{KOHYA_TO_Q}.lora_up.weight": torch.ones(128, 3)}, "128 x 2"),
        (lambda t: t | {f"{KOHYA_TO_Q}.lora_up.weight": torch.full((128, 2), torch.nan)}, "finite"),
        (lambda t: t | {f"{KOHYA_TO_Q}.lora_down.weight": torch.ones(0, 128)}, "rank x 128"),
        (_without("lora_up.weight"), "lacks the up"),
        (_without("lora_down.weight"), "lacks the down"),
        (_without(".weight"), "lacks the"),
        (lambda t: {}, "no tensors"),
        (lambda t: t | {f"unet.{TO_Q}.lora_A.weight": torch.ones(2, 128)}, "two tensors"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_its_name_and_key(
    plain: SdxlModel, tmp_path: Path, change: Callable[[Tensors], Tensors], named: str
) -> None:
    made = loras.make(plain.pipeline, chosen=lambda part, name: name == TO_Q)
    tensors = change(loras.as_kohya(made, plain.pipeline.unet.config))
    file = loras.save(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(ModelError, match=re.escape(named)) as failure:
        read_lora("ink", file, plain.pipeline)
    assert "wrong.safetensors" in str(failure.value)


def test_what_is_no_safetensors_is_refused(plain: SdxlModel, tmp_path: Path) -> None:
    file = tmp_path / "pickled.safetensors"
    torch.save({"unet.conv_in.lora_A.weight": torch.ones(1)}, file)
    with pytest.raises(ModelError, match="safetensors"):
        read_lora("ink", file, plain.pipeline)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
FIELDS = ("unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "unet.bias", "unet.use_dora")


@pytest.mark.parser
@given(
    st.text(max_size=20)
    | JSON_VALUES.map(json.dumps)
    | st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES).map(json.dumps)
)
def test_any_metadata_gives_a_scale_or_is_refused(metadata: str) -> None:
    try:
        config = _Config.of(Path("ink.safetensors"), {"lora_adapter_metadata": metadata})
        scale = config.scale(Target("unet", TO_Q), 4, None)
    except _DoesNotFit:
        return
    assert math.isfinite(scale)


@pytest.mark.parser
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(
    plain: SdxlModel, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of a LoRA of one module changed, lost and doubled."""
    made = loras.make(plain.pipeline, chosen=lambda part, name: name == TO_Q)
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    whole = bytearray(loras.save(loras.as_peft(made), file).read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(header, len(whole)) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                whole[at] = data.draw(st.integers(0, 255))
            case 1:
                del whole[at : at + data.draw(st.integers(1, 20))]
            case _:
                whole[at:at] = whole[at : at + data.draw(st.integers(1, 20))]
    file.write_bytes(whole)
    try:
        read_lora("ink", file, plain.pipeline)
    except ModelError as error:
        assert "\n" not in str(error)
