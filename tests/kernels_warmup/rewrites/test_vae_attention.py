import copy

import pytest
import torch

from kernels_warmup.compile import channels_last
from kernels_warmup.rewrites.vae_attention import set_vae_attention
from tests.kernels_warmup.tiny import (
    relative_error,
    tiny_vae,
)

ROUNDING = 1e-5


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_the_vae_attention_gives_the_unmodified_result(batch: int, memory: str) -> None:
    vae = tiny_vae()
    latents = torch.randn(batch, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    expected = vae.decode(latents).sample
    set_vae_attention(vae)
    if memory == "channels last":
        channels_last(vae)
    assert relative_error(vae.decode(latents).sample, expected) < ROUNDING


def test_bfloat16_scores_are_kept_in_float32() -> None:
    vae = tiny_vae()
    attn = vae.decoder.mid_block.attentions[0]
    attn.to_q.weight.mul_(30)  # peaked scores, which bfloat16 would round to a wrong softmax
    features = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(6))
    expected = attn(features)
    set_vae_attention(vae)
    narrow = copy.deepcopy(attn).to(torch.bfloat16)
    assert relative_error(narrow(features.to(torch.bfloat16)).float(), expected) < 0.02
