import copy

import pytest
import torch

from kernels_warmup.attention import transformer_blocks
from kernels_warmup.compile import compile_model
from kernels_warmup.recipes import Recipe
from kernels_warmup.rewrites.text_once import TextOnce
from kernels_warmup.rewrites.vae_attention import set_vae_attention
from tests.kernels_warmup.tiny import (
    relative_error,
    step_inputs,
    tiny_models,
    tiny_unet,
    tiny_vae,
)

ROUNDING = 1e-5

EAGER = Recipe(scope="none", replay="none")
EVERYTHING = Recipe(
    scope="none",
    replay="none",
    group_norm=True,
    upsample="phases",
    zero_text=True,
    time_once=True,
)


@pytest.mark.parametrize("recipe", [EAGER, EVERYTHING], ids=["default's", "max's"])
@pytest.mark.parametrize("batch", [1, 2, 4], ids=["no guidance", "guidance", "two images"])
def test_every_rewrite_together_gives_the_unmodified_result(batch: int, recipe: Recipe) -> None:
    models = tiny_models()
    plain = copy.deepcopy(models)
    compile_model(models, "default", recipe=recipe)
    inputs = step_inputs(batch)
    assert relative_error(models.unet(**inputs)[0], plain.unet(**inputs)[0]) < ROUNDING
    latents = torch.randn(batch, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    expected = plain.vae.decode(latents).sample
    assert relative_error(models.vae.decode(latents).sample, expected) < ROUNDING


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_rewrite_together_is_no_further_from_float32_in_bfloat16(seed: int) -> None:
    models = tiny_models(seed)
    inputs = step_inputs(2, seed=seed)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    for model in (models.unet, models.vae):
        model.bfloat16()
    narrow = {
        name: given.bfloat16() if torch.is_tensor(given) and given.ndim else given
        for name, given in inputs.items()
    }
    narrow["added_cond_kwargs"] = {
        name: given.bfloat16() for name, given in inputs["added_cond_kwargs"].items()
    }
    wide = {
        name: given.float() if torch.is_tensor(given) else given for name, given in narrow.items()
    }
    wide["added_cond_kwargs"] = {
        name: given.float() for name, given in narrow["added_cond_kwargs"].items()
    }
    exact = copy.deepcopy(models.unet).float()(**wide)[0]
    exact_image = copy.deepcopy(models.vae).float().decode(latents.bfloat16().float()).sample
    eager = relative_error(models.unet(**narrow)[0], exact)
    eager_image = relative_error(models.vae.decode(latents.bfloat16()).sample, exact_image)
    compile_model(models, "default", recipe=EVERYTHING)
    # With so few channels, the errors of two bfloat16 computations differ by tens of percent.
    assert relative_error(models.unet(**narrow)[0], exact) < 1.25 * eager
    assert relative_error(models.vae.decode(latents.bfloat16()).sample, exact_image) < (
        1.25 * eager_image
    )


def test_another_model_is_refused_by_name() -> None:
    vae = tiny_vae()
    vae.decoder.mid_block.attentions[0].heads = 2
    with pytest.raises(ValueError, match="not SDXL's VAE"):
        set_vae_attention(vae)
    unet = tiny_unet()
    unet.register_to_config(addition_embed_type="text")
    with pytest.raises(ValueError, match="not SDXL's conditioning"):
        TextOnce(unet)
    unet = tiny_unet()
    attn = transformer_blocks(unet)[0].attn2
    attn.to_k = torch.nn.Linear(48, 64, bias=True)
    with pytest.raises(ValueError, match="have a bias"):
        TextOnce(unet)
