import copy
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

from kernels_warmup import quantize
from kernels_warmup.attention import set_attention, transformer_blocks
from kernels_warmup.compile import compile_model
from kernels_warmup.quantize import CHOSEN, SKIPPED, quantize_unet, why_unusable
from kernels_warmup.recipes import Recipe
from serve.model.sdxl_base import UNET_CONFIG
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_models, tiny_unet

# torchao and torch warn about each other when they are first imported together.
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


def test_int8_reports_the_error_of_one_forward() -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    report = quantize_unet(unet, "int8")
    assert report is not None
    assert report.quantization == "int8"
    inputs = step_inputs(2)
    seen = relative_error(unet(**inputs)[0], plain(**inputs)[0])
    assert 1e-4 < seen < 0.05
    # Measured on other inputs, so only the order of magnitude is equal.
    assert seen / 3 < report.error < seen * 3


def test_quantising_leaves_inductors_settings_unchanged() -> None:
    """torchao would change them for the whole process."""
    assert inductor.coordinate_descent_tuning is False
    before = compiler_configuration()
    assert len(before["inductor"]) > 100
    assert len(before["dynamo"]) > 30
    assert quantize_unet(tiny_unet(), "int8") is not None
    assert compiler_configuration() == before


def test_torchao_by_default_changes_inductors_settings() -> None:
    """Shows that the test above is still needed."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    before = compiler_configuration()
    with inductor.patch(coordinate_descent_tuning=False):
        quantize_(torch.nn.Linear(16, 16), Int8DynamicActivationInt8WeightConfig())
        assert compiler_configuration() != before
    inductor.load_config(pickle.dumps(before["inductor"]))
    assert compiler_configuration() == before


def compiler_configuration() -> dict[str, dict[str, Any]]:
    return {"inductor": inductor.get_config_copy(), "dynamo": dynamo.get_config_copy()}


def test_the_large_products_are_replaced_and_the_skipped_are_not() -> None:
    unet = tiny_unet()
    set_attention(unet, "auto")
    report = quantize_unet(unet, "int8")
    names = quantized_names(unet)
    assert report is not None
    assert report.layers == len(names) == 3 * len(transformer_blocks(unet))
    assert names == set(quantize.quantized_names(unet))


def test_of_sdxl_base_the_feed_forwards_and_the_fused_projections_are_quantised() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **{name: value for name, value in UNET_CONFIG.items() if not name.startswith("_")}
        )
        set_attention(unet, "auto")
    chosen = quantize.quantized_names(unet)
    ends = Counter(next(p for p, _ in CHOSEN if re.search(p, name)) for name in chosen)
    assert list(ends.values()) == [70, 70, 70]
    assert len(chosen) == 210
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear)}
    for name in layers:
        reasons = [p for p, _ in SKIPPED if re.search(p, name)]
        assert len(reasons) == (name not in chosen), name
    square = re.compile(r"(attn2\.to_q|to_out\.0|proj_in|proj_out)$")
    assert sum(bool(square.search(name)) for name in layers) == 3 * 70 + 2 * 11
    # Of 2.57 billion weights in all.
    assert sum(layers[name].weight.numel() for name in chosen) == 1_536_000_000


def test_without_fused_projections_the_feed_forwards_are_left() -> None:
    unet = tiny_unet()
    assert len(quantize.quantized_names(unet)) == 2 * len(transformer_blocks(unet))


def test_it_works_together_with_every_rewrite() -> None:
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


def test_none_changes_nothing_and_an_unusable_quantisation_is_refused() -> None:
    unet = tiny_unet()
    assert quantize_unet(unet, "none") is None
    assert not quantized_names(unet)
    with pytest.raises(
        ValueError, match="'int3' is not a quantisation; choose one of none, int8, fp8"
    ):
        quantize_unet(unet, "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp8 needs an Ada or Hopper GPU or a later one; this is"):
        quantize_unet(unet, "fp8")
    assert not quantized_names(unet)


def test_without_torchao_the_reason_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    assert why_unusable("int8", CPU) == (
        "quantisation 'int8' needs torchao, which fails: ModuleNotFoundError"
    )
