import copy

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from kernels_warmup.attention import set_attention, transformer_blocks
from kernels_warmup.compile import Recipe, compile_model
from kernels_warmup.rewrites import (
    TextOnce,
    TimeProjection,
    all_finite,
    channels_last,
    set_time_once,
    set_vae_attention,
    to_pixels,
)
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


@pytest.fixture(autouse=True)
def _no_grad():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


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
    # Two computations of so few channels in bfloat16 differ by tens of percent in where they round.
    assert relative_error(models.unet(**narrow)[0], exact) < 1.25 * eager
    assert relative_error(models.vae.decode(latents.bfloat16()).sample, exact_image) < (
        1.25 * eager_image
    )


def test_the_steps_embedding_is_projected_by_one_product() -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    set_time_once(unet)
    after = unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    parts = [module for module in unet.modules() if isinstance(module, TimeProjection)]
    assert len(parts) == 11
    # Held once: every block's weights are a view of the product's.
    assert {part.weight.untyped_storage().data_ptr() for part in parts} == {
        unet.time_embed_act.weight.untyped_storage().data_ptr()
    }
    products = []
    real = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "linear",
            lambda given, weight, bias=None: (
                products.append(len(weight)) or real(given, weight, bias)
            ),
        )
        inputs = step_inputs(2)
        result = unet(**inputs)[0]
    assert products.count(sum(part.out_features for part in parts)) == 1
    assert relative_error(result, plain(**inputs)[0]) < ROUNDING


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
        for _ in range(5):
            models.unet(**inputs)
    assert len(products) == 2  # one for each attention width
    reads = []
    for block in transformer_blocks(models.unet):
        block.attn2.to_k.register_forward_hook(lambda *_: reads.append(1))
    models.unet(**inputs)
    assert not reads


def test_text_buffers_keep_their_address_for_a_captured_graph() -> None:
    unet = tiny_unet()
    set_attention(unet, "auto")
    text = TextOnce(unet)

    def prepare(batch: int, seed: int) -> int:
        inputs = step_inputs(batch, seed=seed)
        text.prepare_conditioning(inputs["encoder_hidden_states"], inputs["added_cond_kwargs"])
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


def test_a_time_embedding_that_is_not_sdxls_is_refused_and_left_as_it_was() -> None:
    def refuses(change) -> None:  # type: ignore[no-untyped-def]
        unet = tiny_unet()
        change(unet, unet.mid_block.resnets[1])
        with pytest.raises(ValueError, match="not SDXL's time embedding"):
            set_time_once(unet)
        assert not any(isinstance(module, TimeProjection) for module in unet.modules())

    refuses(lambda unet, _: setattr(unet, "time_embed_act", torch.nn.SiLU()))
    refuses(lambda _, resnet: setattr(resnet, "time_emb_proj", None))
    refuses(lambda _, resnet: setattr(resnet, "time_embedding_norm", "scale_shift"))
    refuses(lambda _, resnet: setattr(resnet, "skip_time_act", True))
    refuses(lambda _, resnet: setattr(resnet, "nonlinearity", torch.nn.GELU()))


def test_pixels_are_diffusers_own() -> None:
    image = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(7))
    image[0, 0, 0, :3] = torch.tensor([-1.0, 1.0, 1 / 255])
    pixels = to_pixels(image)
    expected = VaeImageProcessor().postprocess(image, output_type="pil")
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    for got, want in zip(pixels.numpy(), expected, strict=True):
        np.testing.assert_array_equal(got, np.asarray(want))


def test_one_bad_value_is_seen() -> None:
    latents = torch.zeros(1, 4, 8, 8)
    assert bool(all_finite(latents))
    latents[0, 3, 7, 7] = float("nan")
    assert not bool(all_finite(latents))
    latents[0, 3, 7, 7] = float("-inf")
    assert not bool(all_finite(latents))
