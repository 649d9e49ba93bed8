"""The `forward` methods that replace those of the UNet, the VAE decoder and the text encoders.

`torch.compile` and CUDA graphs need functions from tensors to tensors. Diffusers calls modules with
keyword arguments, dictionaries and output objects. The first half of this module turns a module
into such a function; the second half, one class per module, translates between diffusers' call and
that function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from kernels_warmup.cuda_graphs import PerShape, TensorFunction
from kernels_warmup.quantize import Quantized
from kernels_warmup.rewrites.text_once import BUFFERED_TEXT, TextOnce
from kernels_warmup.rewrites.zero_text import ZERO_TEXT


def step_function(unet: Any, text: TextOnce | None) -> TensorFunction:
    """One UNet forward. With `text`, it reads the prompt from that object's buffers, and its only
    inputs are the latents and the timestep."""
    forward = unet.forward

    def step(
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return cast(
            torch.Tensor,
            forward(
                sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
            )[0],
        )

    def step_after_text(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return cast(
            torch.Tensor,
            forward(sample, timestep, None, added_cond_kwargs={}, return_dict=False)[0],
        )

    return step if text is None else step_after_text


def step_function_without_negative(unet: Any) -> TensorFunction:
    """One UNet forward of a guided run whose negative text is zero."""
    forward = unet.forward

    def step_without_negative(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return cast(
            torch.Tensor,
            forward(
                sample,
                timestep,
                None,
                added_cond_kwargs={},
                cross_attention_kwargs={ZERO_TEXT: True},
                return_dict=False,
            )[0],
        )

    return step_without_negative


def decode_function(vae: Any) -> TensorFunction:
    """One forward of the VAE's decoder."""
    forward = vae.decoder.forward

    def decode(sample: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, forward(sample))

    return decode


def encode_function(encoder: Any) -> TensorFunction:
    """One forward of a text encoder. It returns what SDXL reads: the encoder's first output, and
    the states before its last layer."""
    forward = encoder.forward

    def encode(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = forward(input_ids, output_hidden_states=True)
        return output[0], output.hidden_states[-2]

    return encode


class UNetForward:
    """Replaces the UNet's `forward`; every denoising step passes through it.

    Attributes:
        text: the prompt's buffers, filled before the first step; None without `text_once`.
        quantized: what quantising did to the UNet.
        takes_zero_text: whether `cross_attention_kwargs` may contain `ZERO_TEXT`.
        functions: the functions that it may run.
    """

    def __init__(
        self,
        step: PerShape,
        text: TextOnce | None,
        quantized: Quantized | None = None,
        step_without_negative: PerShape | None = None,
    ) -> None:
        self._step = step
        self._step_without_negative = step_without_negative
        self.text = text
        self.quantized = quantized
        self.takes_zero_text = step_without_negative is not None
        self.functions = (step,) if step_without_negative is None else (step, step_without_negative)

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: Mapping[str, torch.Tensor],
        cross_attention_kwargs: Mapping[str, object] | None = None,
        return_dict: bool = True,
        **unused: object,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Same signature as the UNet's own.

        `cross_attention_kwargs` may contain `ZERO_TEXT` and, with `text_once`, `BUFFERED_TEXT`.
        With the first the caller guarantees that the first half of the text is zero; its values are
        not checked. With the second the step reads that text from the buffers; without it the
        buffers are filled from `encoder_hidden_states` first.

        Raises:
            TypeError: an argument that the compiled UNet cannot honour.
            RuntimeError: the buffers no longer hold the text that the step is to read.
        """
        step = self._step
        attention_arguments = dict(cross_attention_kwargs or {})
        if ZERO_TEXT in attention_arguments and self._step_without_negative is not None:
            step = self._step_without_negative
            del attention_arguments[ZERO_TEXT]
        buffered: Any = None if self.text is None else attention_arguments.pop(BUFFERED_TEXT, None)
        refused = sorted(attention_arguments)
        refused += [name for name, value in unused.items() if value is not None]
        if refused:
            raise TypeError(f"the compiled UNet does not take {', '.join(refused)}")
        if self.text is not None:
            if buffered is None:
                buffered = self.text.prepare(encoder_hidden_states, added_cond_kwargs)
            else:
                self.text.attach(buffered)
            # No input shows how long the text in the buffers is.
            noise: torch.Tensor = step(sample, timestep, buffers=buffered.tokens)
        else:
            noise = step(
                sample,
                timestep,
                encoder_hidden_states,
                added_cond_kwargs["text_embeds"],
                added_cond_kwargs["time_ids"],
            )
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)


class DecoderForward:
    """Replaces the VAE decoder's `forward`."""

    def __init__(self, decode: PerShape) -> None:
        self._decode = decode

    def __call__(
        self, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        if latent_embeds is not None:
            raise TypeError("the compiled VAE decoder does not take latent_embeds")
        return cast(torch.Tensor, self._decode(sample))


class EncodedText(NamedTuple):
    """The part of a text encoder's output that SDXL reads, at the places where it reads it."""

    first: torch.Tensor
    """The pooled and projected text (texts, width) if the encoder has a projection, otherwise its
    last states (texts, tokens, width)."""
    hidden_states: tuple[torch.Tensor, None]
    """The states before the last layer (texts, tokens, width), then None for the last layer's."""


class TextEncoderForward:
    """Replaces a text encoder's `forward`."""

    def __init__(self, encode: PerShape) -> None:
        self._encode = encode

    def __call__(self, input_ids: torch.Tensor, *, output_hidden_states: bool) -> EncodedText:
        if not output_hidden_states:
            raise TypeError("the captured text encoder always returns its hidden states")
        first, before_last = self._encode(input_ids)
        return EncodedText(first, (before_last, None))
