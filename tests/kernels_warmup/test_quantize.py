import copy

import pytest
import torch

from kernels_warmup.attention import set_attention, transformer_blocks
from kernels_warmup.quantize import Fp8Linear, quantize_unet, to_fp8_rows
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_unet


def test_rows_come_back_within_a_sixteenth() -> None:
    rows = (
        torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-4, 4, 7)[:, None]
    )
    rows[3] = 0
    quantized, scale = to_fp8_rows(rows)
    assert quantized.dtype == torch.float8_e4m3fn
    back = quantized.float() * scale
    assert back.isfinite().all()
    assert bool(((back - rows).abs() <= rows.abs().amax(1, keepdim=True) / 16).all())
    assert back[3].abs().max() == 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_within_fp8s_error(bias: bool) -> None:
    torch.manual_seed(2)
    linear = torch.nn.Linear(96, 80, bias=bias)
    features = torch.randn(2, 5, 96)
    with torch.no_grad():
        error = relative_error(Fp8Linear(linear)(features), linear(features))
    assert 1e-3 < error < 0.05


def test_only_the_large_products_are_replaced() -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    set_attention(unet, "auto")
    blocks, transformers = len(transformer_blocks(unet)), 7
    assert quantize_unet(unet, "fp8") == 6 * blocks + 2 * transformers
    kept = {name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {"time_embedding.linear_1", "add_embedding.linear_2"} <= kept
    assert any(name.endswith("attn2.to_k") for name in kept)
    assert any(name.endswith("time_emb_proj") for name in kept)
    inputs = step_inputs(2)
    with torch.no_grad():
        assert 1e-3 < relative_error(unet(**inputs)[0], plain(**inputs)[0]) < 0.2


def test_none_changes_nothing_and_nonsense_is_refused() -> None:
    unet = tiny_unet()
    assert quantize_unet(unet, "none") == 0
    with pytest.raises(ValueError, match="'int3' is not a quantisation: one of none, fp8 is"):
        quantize_unet(unet, "int3")  # type: ignore[arg-type]
