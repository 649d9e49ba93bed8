import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kernels_warmup import quantize
from kernels_warmup.attention import set_attention
from kernels_warmup.compile import compile_model
from kernels_warmup.fp8 import (
    FP8,
    LARGEST,
    MARGIN,
    Fp8Linear,
    calibrate,
    round_by,
    round_rows,
    set_fp8,
)
from kernels_warmup.quantize import quantize_unet, quantized_names, why_unusable
from kernels_warmup.recipes import Recipe
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_models, tiny_unet


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows fp8 on a CPU: PyTorch computes the same products here.

    A product of one scale becomes one of equal scales by row, which is the same and takes a CPU a
    thousandth of the time. The test of one linear layer has PyTorch's own.
    """
    monkeypatch.setattr(quantize, "why_unusable", lambda *_: None)
    product = torch._scaled_mm

    def by_row(left: Any, right: Any, *, scale_a: Any, scale_b: Any, **options: Any) -> Any:
        rows, columns = left.shape[0], right.shape[1]
        scale_a = scale_a.expand(rows, 1).contiguous()
        scale_b = scale_b.expand(1, columns).contiguous()
        return product(left, right, scale_a=scale_a, scale_b=scale_b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", by_row)


def draw(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_a_row_is_rounded_by_its_own_largest_value() -> None:
    rows = draw(3, 4, 64) * torch.tensor([1e-6, 1.0, 1e4]).view(3, 1, 1)
    rows[0, 0] = 0
    values, scales = round_rows(rows)
    assert values.dtype == FP8
    assert scales.shape == (3, 4, 1)
    assert scales.dtype == torch.float32
    # Three binary digits after the first: half a unit in the last is 1/16 of the number.
    wide = values.float()
    error = (wide * scales - rows).abs() / rows.abs().clamp(min=1e-30)
    assert error[wide.abs() > 2**-6].max() <= 1 / 16
    largest = wide.abs().amax(-1)
    assert largest[0, 0] == 0
    assert (largest.flatten()[1:] == LARGEST).all()


def test_values_too_large_for_a_static_scale_saturate() -> None:
    values, scale = round_by(torch.tensor([1.0, -3.0, 1e6, float("nan")]), torch.tensor(1 / 448))
    assert scale.dim() == 0
    assert values.float()[:3].tolist() == [448, -448, 448]
    assert values.float()[3].isnan()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
def test_a_linear_layer_multiplies_the_rounded_values(static: bool, bias: bool) -> None:
    linear = nn.Linear(64, 48, bias=bias)
    plain = copy.deepcopy(linear)
    model = nn.Sequential(linear)
    inputs = draw(2, 5, 64)
    scales = calibrate(model, ["0"], lambda: model(inputs)) if static else None
    set_fp8(model, ["0"], scales)
    assert type(linear) is Fp8Linear
    assert linear.weight.dtype == FP8
    assert linear.weight_scale.shape == (() if static else (1, 48))
    rounded = round_rows(inputs) if scales is None else round_by(inputs, scales["0"])
    weight = linear.weight.float() * (
        linear.weight_scale.t() if not static else linear.weight_scale
    )
    expected = nn.functional.linear(rounded.values.float() * rounded.scales, weight, linear.bias)
    result = linear(inputs)
    assert result.dtype == torch.float32
    assert relative_error(result, expected) < 1e-5
    # Input that was rounded already, as by our kernels, gives the same.
    assert torch.equal(linear(rounded), result)
    assert 0.005 < relative_error(result, plain(inputs)) < 0.05


def test_calibration_leaves_a_margin_above_the_largest_value() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    inputs = [draw(3, 16), draw(3, 16, seed=2) * 7]
    scales = calibrate(model, ["0"], lambda: [model(each) for each in inputs])
    assert float(scales["0"]) == pytest.approx(MARGIN * float(inputs[1].abs().max()) / LARGEST)
    assert not model[0]._forward_pre_hooks
    with pytest.raises(ValueError, match="calibration did not reach 1"):
        calibrate(model, ["0", "1"], lambda: model[0](inputs[0]))


@pytest.mark.usefixtures("on_this_cpu")
@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantising_reports_the_error_of_one_forward(static: bool, dtype: torch.dtype) -> None:
    unet = tiny_unet().to(dtype=dtype)
    set_attention(unet, "auto")
    names = quantized_names(unet)
    plain = copy.deepcopy(unet)
    report = quantize_unet(unet, "fp8", static=static)
    assert report is not None
    assert report.layers == len(names) == 33
    assert {n for n, m in unet.named_modules() if isinstance(m, Fp8Linear)} == set(names)
    assert unet.dtype == dtype
    inputs = cast(step_inputs(2), dtype)
    seen = relative_error(unet(**inputs)[0], plain(**inputs)[0])
    assert 0.003 < seen < 0.03
    # Measured on other inputs, so only the order of magnitude is equal.
    assert seen / 2 < report.error < seen * 2


@pytest.mark.usefixtures("on_this_cpu")
@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
def test_it_works_together_with_every_rewrite(static: bool) -> None:
    models = tiny_models()
    plain = copy.deepcopy(models.unet)
    recipe = Recipe(
        scope="none",
        replay="none",
        group_norm=True,
        upsample="phases",
        zero_text=True,
        time_once=True,
        layer_norm=True,
        fp8_norms=True,
        fp8_static=static,
    )
    compiled = compile_model(models, quantize="fp8", recipe=recipe)
    assert compiled.quantized is not None
    assert compiled.quantized.layers == 33
    scales = {
        module.input_scale is None
        for module in models.unet.modules()
        if isinstance(module, Fp8Linear)
    }
    assert scales == {not static}
    inputs = step_inputs(2)
    assert 0.003 < relative_error(models.unet(**inputs)[0], plain(**inputs)[0]) < 0.03


@pytest.mark.filterwarnings("ignore")  # warnings from inside torch's compiler
@pytest.mark.usefixtures("on_this_cpu")
@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
def test_a_transformer_is_one_graph(static: bool) -> None:
    unet = tiny_unet()
    set_attention(unet, "auto")
    assert quantize_unet(unet, "fp8", static=static) is not None
    transformer = unet.mid_block.attentions[0]
    hidden, text = draw(2, 128, 4, 4), draw(2, 7, 48, seed=2)
    compiled = torch.compile(transformer, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = transformer(hidden, text, return_dict=False)[0]
    assert relative_error(compiled(hidden, text, return_dict=False)[0], expected) < 1e-3
    torch.compiler.reset()


def test_norms_as_fp8_need_the_kernel_that_writes_them() -> None:
    with pytest.raises(ValueError, match="fp8_norms needs layer_norm"):
        compile_model(tiny_models(), recipe=Recipe(fp8_norms=True))


def test_other_types_than_bfloat16_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cuda = torch.device("cuda")
    assert why_unusable("fp8", cuda, torch.bfloat16) is None
    assert why_unusable("fp8", cuda) is None
    for dtype in (torch.float16, torch.float32):
        assert str(dtype) in str(why_unusable("fp8", cuda, dtype))


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    added = {name: tensor.to(dtype) for name, tensor in inputs["added_cond_kwargs"].items()}
    both = {name: inputs[name].to(dtype) for name in ("sample", "encoder_hidden_states")}
    return inputs | both | {"added_cond_kwargs": added}
