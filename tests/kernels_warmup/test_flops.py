from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kernels_warmup.flops import (
    count_decode,
    count_encode,
    count_run,
    count_step,
    count_text_encoder,
)
from kernels_warmup.shapes import SDXL_SHAPES, CompiledShape
from serve.model.sdxl_base import UNET_CONFIG, VAE_CONFIG
from tests.kernels_warmup.tiny import tiny_unet, tiny_vae

DEFAULT = SDXL_SHAPES[0]


def test_a_step_of_sdxl_base_is_13_52_teraflop() -> None:
    guided = count_step(UNET_CONFIG, DEFAULT)
    assert guided == pytest.approx(13.52e12, rel=1e-3)


def test_decoding_a_default_image_is_10_47_teraflop() -> None:
    assert count_decode(VAE_CONFIG, DEFAULT) == pytest.approx(10.47e12, rel=1e-3)


def test_encoding_a_picture_takes_about_half_as_much_and_follows_the_images() -> None:
    one = count_encode(VAE_CONFIG, DEFAULT)
    assert 0.3 < one / count_decode(VAE_CONFIG, DEFAULT) < 0.6
    assert count_encode(VAE_CONFIG, DEFAULT, images=2) == 2 * one


def test_the_text_encoders_are_0_22_teraflop() -> None:
    small = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    large = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        encoders = CLIPTextModel(small), CLIPTextModelWithProjection(large)
    counted = sum(count_text_encoder(encoder) for encoder in encoders)
    assert counted == pytest.approx(0.22e12, rel=0.05)


def test_a_run_adds_up_and_follows_images_and_guidance() -> None:
    pipeline = SimpleNamespace(
        unet=tiny_unet(), vae=tiny_vae(), text_encoder=None, text_encoder_2=None
    )
    shape = CompiledShape(128, 128)
    one = count_run(pipeline, shape)
    assert one.total(20) == one.text_encode + 20 * one.step + one.vae_decode
    four = count_run(pipeline, shape, images=4)
    assert four.step == pytest.approx(4 * one.step)
    assert four.vae_decode == 4 * one.vae_decode
    unguided = count_run(pipeline, shape, guidance=False)
    assert unguided.step == one.step / 2
    assert unguided.vae_decode == one.vae_decode
    turned = count_run(pipeline, CompiledShape(128, 128))
    assert turned == one
