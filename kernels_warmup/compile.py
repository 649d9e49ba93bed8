"""Turns a loaded SDXL pipeline into one that runs compiled. Only this module configures inductor.

`compile_model` changes the pipeline's UNet, VAE decoder and text encoders in place, so diffusers'
own pipeline still calls its own classes. It compiles nothing itself: each input shape compiles
at its first call. Warm-up makes those calls, and then freezes the model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from kernels_warmup.attention import Backend, resolve, set_attention
from kernels_warmup.cuda_graphs import Fallbacks, PerShape, TensorFunction
from kernels_warmup.forwards import (
    DecoderForward,
    TextEncoderForward,
    UNetForward,
    decode_function,
    encode_function,
    step_function,
    step_function_without_negative,
)
from kernels_warmup.quantize import Quantization, Quantized, quantize_unet
from kernels_warmup.recipes import MODES, RECIPES, WAYS, Mode, Recipe
from kernels_warmup.rewrites.group_norm import set_decoder_norms, set_unet_norms
from kernels_warmup.rewrites.text_once import TextOnce
from kernels_warmup.rewrites.time_once import set_time_once
from kernels_warmup.rewrites.upsampling import set_upsampling
from kernels_warmup.rewrites.vae_attention import set_vae_attention
from kernels_warmup.rewrites.zero_text import set_blocks
from kernels_warmup.triton import why_unusable as why_kernels_unusable

logger = logging.getLogger(__name__)


class Models(Protocol):
    """The parts of a diffusers SDXL pipeline that are compiled or captured."""

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any


@dataclass
class CompiledModel:
    """What `compile_model` did, and the guard against compiling while requests are served."""

    mode: Mode
    recipe: Recipe
    attention: Backend
    quantized: Quantized | None
    text: TextOnce | None
    functions: tuple[PerShape, ...]

    def freeze(self) -> None:
        """Forbid compiling and capturing: a call that needs either runs eagerly instead.

        Compiling in the middle of a request would take minutes. An eager step takes tens of
        milliseconds, and `fallbacks` counts it.
        """
        for function in self.functions:
            function.frozen = True

    def thaw(self) -> None:
        """Allow compiling again, to warm one more shape while no request runs."""
        for function in self.functions:
            function.frozen = False

    @property
    def has_graphs(self) -> bool:
        """Whether any of its functions makes graphs, each for one input shape."""
        return any(function.has_graphs for function in self.functions)

    @property
    def fallbacks(self) -> Fallbacks:
        """How many calls have run eagerly so far because the model is frozen."""
        return Fallbacks(
            cold=sum(function.fallbacks.cold for function in self.functions),
            recompiles=sum(function.fallbacks.recompiles for function in self.functions),
        )


def compile_model(
    pipeline: Models,
    mode: Mode = "default",
    *,
    attention: Backend = "auto",
    quantize: Quantization = "none",
    recipe: Recipe | None = None,
    decoder_recipe: Recipe | None = None,
) -> CompiledModel:
    """Prepare a loaded pipeline, already on its device and in its type, to run compiled.

    Call it once per pipeline, and from then on run the pipeline on one thread only. The modes:
    `off` leaves the modules unchanged; `rewritten` changes how they compute and compiles nothing;
    `regional` compiles each repeated block once (seconds); `default` compiles the whole UNet and
    decoder, one graph per shape; `max` also tunes them, which takes minutes. On a CPU nothing is
    captured and inductor keeps its own settings.

    Args:
        recipe: replaces the mode's own recipe.
        decoder_recipe: the VAE decoder's, if it differs from the UNet's.

    Raises:
        ValueError: the mode is unknown, the attention or quantisation cannot run here, the model
            is not SDXL's, or the recipe contradicts itself.
    """
    if mode not in MODES:
        raise ValueError(f"{mode!r} is not a compile mode; choose one of {', '.join(MODES)}")
    recipe = recipe or RECIPES[mode]
    decoder_recipe = decoder_recipe or recipe
    device = pipeline.unet.device
    backend = resolve(attention, device, pipeline.unet.dtype)
    if recipe == decoder_recipe == RECIPES["off"]:
        if attention != "auto":
            set_attention(pipeline.unet, backend, fuse_qkv=False)
        quantized = quantize_unet(pipeline.unet, quantize)
        return CompiledModel(mode, recipe, backend, quantized, None, ())
    if device.type == "cuda":
        # cuDNN finds the fastest convolution by timing, once per shape, during warm-up.
        torch.backends.cudnn.benchmark = True
    # All graphs share one pool: they run one after the other, and their outputs stay alive.
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    unet = compile_unet(pipeline.unet, recipe, backend, quantize, pool)
    decode = compile_decoder(pipeline.vae, decoder_recipe, pool)
    encoders = capture_text_encoders(pipeline, recipe, pool) if recipe.text_encoders else ()
    functions = (*unet.functions, decode, *encoders)
    return CompiledModel(mode, recipe, backend, unet.quantized, unet.text, functions)


def compile_unet(
    unet: Any,
    recipe: Recipe,
    attention: Backend,
    quantize: Quantization = "none",
    pool: Any = None,
) -> UNetForward:
    """Rewrite the UNet in place, replace its `forward` by a compiled one, and return that.

    Raises:
        ValueError: the UNet is not SDXL's, or the recipe contradicts itself.
    """
    _require_consistent(recipe)
    if recipe.channels_last:
        channels_last(unet)
    set_attention(unet, attention, fuse_qkv=recipe.fuse_qkv)
    # Before TextOnce: quantising measures its error by calling the UNet's forward, which needs
    # the text buffers to be filled once they exist.
    quantized = quantize_unet(unet, quantize, static=recipe.fp8_static)
    if recipe.time_once:
        set_time_once(unet)
    if recipe.group_norm:
        set_unet_norms(unet)
    set_upsampling(unet, recipe.upsample)
    if recipe.zero_text:
        set_blocks(unet)
    text = TextOnce(unet) if recipe.text_once else None
    _set_kernels(unet, recipe, attention, quantized)
    functions = [step_function(unet, text)]
    if recipe.zero_text:
        functions.append(step_function_without_negative(unet))
    if recipe.scope == "blocks":
        _compile_blocks(unet, recipe, unet.device)
    elif recipe.scope == "whole":
        functions = [_compiled(function, recipe, unet.device) for function in functions]
    step, *more = [PerShape(function, recipe, unet.device, pool) for function in functions]
    unet.forward = UNetForward(step, text, quantized, more[0] if more else None)
    return cast(UNetForward, unet.forward)


def compile_decoder(vae: Any, recipe: Recipe, pool: Any = None) -> PerShape:
    """Rewrite the VAE in place, replace its decoder's `forward` by a compiled one, and return the
    compiled function."""
    if recipe.channels_last:
        channels_last(vae)
    if recipe.vae_attention:
        set_vae_attention(vae)
    if recipe.group_norm:
        set_decoder_norms(vae.decoder)
    set_upsampling(vae.decoder, recipe.upsample)
    decode = decode_function(vae)
    if recipe.scope == "blocks":
        _compile_blocks(vae.decoder, recipe, vae.device)
    elif recipe.scope == "whole":
        decode = _compiled(decode, recipe, vae.device)
    per_shape = PerShape(decode, recipe, vae.device, pool)
    vae.decoder.forward = DecoderForward(per_shape)
    return per_shape


def capture_text_encoders(
    pipeline: Models, recipe: Recipe, pool: Any = None
) -> tuple[PerShape, PerShape]:
    """Replace the `forward` of both text encoders by a captured one; neither is compiled, which
    would gain little more."""

    def capture(encoder: Any) -> PerShape:
        captured = replace(recipe, replay="captured")
        per_shape = PerShape(encode_function(encoder), captured, encoder.device, pool)
        encoder.forward = TextEncoderForward(per_shape)
        return per_shape

    return capture(pipeline.text_encoder), capture(pipeline.text_encoder_2)


def channels_last(module: nn.Module) -> None:
    """Store convolution weights in the memory order that the tensor cores' kernels read."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def inductor_options(recipe: Recipe, device: torch.device) -> dict[str, bool | int | str]:
    """The options for `torch.compile`; none on a CPU, where the tuned templates do not exist."""
    if device.type != "cuda":
        return {}
    trees = {"triton.cudagraphs": True} if recipe.replay == "trees" else {}
    return {**recipe.options, **trees}


def _require_consistent(recipe: Recipe) -> None:
    if recipe.zero_text and not recipe.text_once:
        raise ValueError("zero_text needs text_once, which holds the keys and values of the text")
    if recipe.residual_products and (not recipe.layer_norm or recipe.scope == "blocks"):
        raise ValueError("residual_products needs layer_norm, and no compiling block by block")
    if recipe.fp8_norms and not recipe.layer_norm:
        raise ValueError("fp8_norms needs layer_norm, whose kernel writes the fp8")


def _set_kernels(
    unet: Any, recipe: Recipe, attention: Backend, quantized: Quantized | None
) -> None:
    """Install the recipe's Triton kernels if they can run here; only then is Triton imported."""
    if not any(way.triton and getattr(recipe, name) for name, way in WAYS.items()):
        return
    reason = why_kernels_unusable(unet.device, unet.dtype)
    if reason is not None:
        logger.info("the transformer blocks keep their own operators: %s", reason)
        return
    from kernels_warmup.triton import install

    if recipe.layer_norm:
        install.set_layer_norm(unet, across_blocks=recipe.scope != "blocks")
    if recipe.fp8_norms:
        install.set_fp8_norms(unet)
    # A quantised product cannot add its result to a sum.
    if recipe.residual_products and quantized is None:
        from kernels_warmup.triton.residuals import set_residual_products

        set_residual_products(unet)
    if recipe.self_attention:
        install.set_self_attention(unet, attention)
    if recipe.cross_attention:
        install.set_cross_attention(unet, attention)
    # The kernel multiplies in the model's own type.
    if recipe.geglu and quantized is None:
        install.set_geglu(unet)


def _compiled(function: TensorFunction, recipe: Recipe, device: torch.device) -> TensorFunction:
    options = inductor_options(recipe, device)
    # fullgraph: an unnoticed graph break would make the GPU wait for the host in every step.
    # dynamic=False: the kernels of a warm shape are built for its exact sizes.
    return torch.compile(function, fullgraph=True, dynamic=False, options=cast(Any, options))


def _compile_blocks(module: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Compile the repeated blocks. Equal blocks share a graph, so 70 take as long as two."""
    options = inductor_options(recipe, device)
    for block in module.modules():
        if isinstance(block, BasicTransformerBlock | ResnetBlock2D):
            block.compile(fullgraph=True, dynamic=False, options=options)
