"""The numerical error of a change: one UNet forward on seeded inputs, against a reference.

The reference is the same weights computed in float32. One forward shows the error of the change
itself. Latents after 30 steps do not: small differences may grow chaotically on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from kernels_warmup.rewrites.text_once import BUFFERED_TEXT, BufferedText
from kernels_warmup.rewrites.zero_text import ZERO_TEXT
from kernels_warmup.shapes import CompiledShape

TIMESTEPS = (981.0, 601.0, 21.0)
"""An early, a middle and a late one of the schedule's 1,000."""


@dataclass(frozen=True)
class StepInputs:
    """Seeded inputs of a guided UNet forward.

    Attributes:
        latents: (images, 4, height, width); both halves of the guidance start from them.
        text: (2 x images, 77, text width), the unconditional half first.
        added: `text_embeds` (2 x images, pooled width) and `time_ids` (2 x images, 6).
    """

    latents: torch.Tensor
    text: torch.Tensor
    added: dict[str, torch.Tensor]

    @classmethod
    def draw(
        cls, unet: Any, shape: CompiledShape, images: int, device: torch.device, dtype: torch.dtype
    ) -> StepInputs:
        """Draw them for a UNet and an image size; the same arguments give the same inputs."""
        draw = torch.Generator().manual_seed(20)
        pooled = unet.config.projection_class_embeddings_input_dim
        pooled -= 6 * unet.config.addition_time_embed_dim
        sides = [shape.height, shape.width, 0, 0, shape.height, shape.width]

        def random_tensor(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw).to(device, dtype)

        return cls(
            random_tensor(images, 4, *shape.latent),
            random_tensor(2 * images, 77, unet.config.cross_attention_dim),
            {
                "text_embeds": random_tensor(2 * images, pooled),
                "time_ids": torch.tensor([sides] * (2 * images), device=device, dtype=dtype),
            },
        )

    def without_negative(self) -> StepInputs:
        """The same with a text of zeros in the unconditional half, as without a negative prompt."""

        def zeroed(tensor: torch.Tensor) -> torch.Tensor:
            unconditional, conditional = tensor.chunk(2)
            return torch.cat([torch.zeros_like(unconditional), conditional])

        added = self.added | {"text_embeds": zeroed(self.added["text_embeds"])}
        return StepInputs(self.latents, zeroed(self.text), added)

    def cast(self, dtype: torch.dtype) -> StepInputs:
        return StepInputs(
            self.latents.to(dtype),
            self.text.to(dtype),
            {name: tensor.to(dtype) for name, tensor in self.added.items()},
        )


def forward_once(
    forward: Callable[..., Any],
    inputs: StepInputs,
    *,
    zero_text: bool = False,
    buffered: BufferedText | None = None,
    timestep: float = TIMESTEPS[1],
) -> torch.Tensor:
    """One guided UNet forward: the predicted noise, (2 x images, 4, height, width).

    zero_text: run the UNet's function for runs without a negative prompt; the inputs must be
        `without_negative`, and the UNet must have that function (`takes_zero_text`).
    buffered: the inputs' text, where the UNet's buffers hold it already.
    timestep: 0 to 999.
    """
    about_the_text: dict[str, object] = {ZERO_TEXT: True} if zero_text else {}
    if buffered is not None:
        about_the_text[BUFFERED_TEXT] = buffered
    options = {"cross_attention_kwargs": about_the_text} if about_the_text else {}
    sample = torch.cat([inputs.latents] * 2)
    result = forward(
        sample,
        torch.tensor(timestep, device=sample.device),
        encoder_hidden_states=inputs.text,
        added_cond_kwargs=inputs.added,
        return_dict=False,
        **options,
    )
    return cast(torch.Tensor, result[0])


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the reference's norm, to four digits; NaN stays NaN."""
    difference = (result.double() - reference.double()).norm()
    return float(f"{float(difference / reference.double().norm()):.4g}")
