"""The demo model's architecture: every part of SDXL, each small.

`build_pipeline(seed)` returns it with random weights; `python -m bench.demo_model.architecture`
saves it in the diffusers layout. `bench.demo_model.train` trains it.
"""

import argparse
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from bench.demo_model.scenes import vocabulary
from serve.demo_model import checkpoint_path
from serve.model.sdxl_base import SCHEDULER_CONFIG

MAX_TOKENS = 77
LATENT_SIZE = 16
TEXT_WIDTH_1 = 64
TEXT_WIDTH_2 = 96
TIME_ID_WIDTH = 32
_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_pipeline(seed: int) -> StableDiffusionXLPipeline:
    """A complete SDXL pipeline, float32 on the CPU, its weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        return StableDiffusionXLPipeline(
            vae=build_vae(),
            text_encoder=CLIPTextModel(_text_config(tokenizer, TEXT_WIDTH_1, "quick_gelu")).eval(),
            text_encoder_2=CLIPTextModelWithProjection(
                _text_config(tokenizer, TEXT_WIDTH_2, "gelu")
            ).eval(),
            tokenizer=tokenizer,
            tokenizer_2=build_tokenizer(),
            unet=build_unet(),
            scheduler=build_scheduler(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )


def build_vae() -> AutoencoderKL:
    """From pixels to 4 latent channels at an eighth of the size, and back."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 80),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=LATENT_SIZE * 8,
        scaling_factor=1.0,
        # Its values stay in float16's range, so no part has to run in float32.
        force_upcast=False,
    )
    # Start with narrow posteriors: noise as strong as the signal would hinder learning.
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5.0
    return vae.eval()


def build_unet() -> UNet2DConditionModel:
    """The denoiser: text and size conditioned as in SDXL (`text_time`)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 128),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH_1 + TEXT_WIDTH_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH_2 + 6 * TIME_ID_WIDTH,
    ).eval()


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL base's own scheduler configuration."""
    return EulerDiscreteScheduler(**SCHEDULER_CONFIG)


def _text_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer. A scene's word is one token; other text becomes bytes."""
    letters = sorted(ByteLevel.alphabet())
    merges = _merges(vocabulary())
    tokens = [*letters, *(letter + _WORD_END for letter in letters)]
    tokens += [left + right for left, right in merges]
    tokens += [_START, _END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_TOKENS,
    )


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is a single token."""
    spelt = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in spelt for pair in pairwise(word))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [_join(word, best) for word in spelt]


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def save(pipeline: StableDiffusionXLPipeline, directory: Path) -> None:
    """Write the diffusers layout in float16 safetensors. The pipeline itself becomes float16."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            # diffusers overrides `to` and warns of modules to keep in float32; there are none.
            torch.nn.Module.to(component, torch.float16)
    pipeline.save_pretrained(directory, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Save the demo model with random weights.")
    parser.add_argument("--out", type=Path, default=checkpoint_path())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save(build_pipeline(arguments.seed), arguments.out)


if __name__ == "__main__":
    main()
