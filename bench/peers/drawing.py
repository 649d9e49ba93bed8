"""What the peers draw with: diffusers' own pipeline, and one call of it for a batch.

Imported in a peer's process. torch is imported inside functions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from bench.harness.work import GUIDANCE


class Drawing(BaseModel):
    """A request: the documented example's input, and the seed."""

    prompt: str
    num_inference_steps: int = 20
    seed: int | None = None


@dataclass(frozen=True)
class PeerSettings:
    """How a peer's server draws, and how many images at once.

    Attributes:
        model: as SDXL_MODEL.
        dtype: as SDXL_DTYPE.
        shape: WIDTHxHEIGHT; empty: the model's default.
        max_batch: images of one batch.
        longest_wait_seconds: how long a request may wait and run.
    """

    model: str
    dtype: str
    shape: str
    max_batch: int
    longest_wait_seconds: int

    def to_environment(self) -> dict[str, str]:
        """The settings as environment variables: a peer's own process imports the server."""
        return {f"PEER_{name.upper()}": str(value) for name, value in vars(self).items()}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> PeerSettings:
        """The inverse of `to_environment`. Raises KeyError if a variable is missing."""
        return cls(
            model=environment["PEER_MODEL"],
            dtype=environment["PEER_DTYPE"],
            shape=environment["PEER_SHAPE"],
            max_batch=int(environment["PEER_MAX_BATCH"]),
            longest_wait_seconds=int(environment["PEER_LONGEST_WAIT_SECONDS"]),
        )


class Pipeline:
    """diffusers' pipeline of a checkpoint. Used by one thread at a time."""

    def __init__(self, settings: PeerSettings, dtype: str) -> None:
        """Load it. `dtype` as SDXL_DTYPE."""
        from kernels_warmup.shapes import CompiledShape
        from serve.model.loading import load_model

        self.pipeline = load_model(settings.model, None, "auto", dtype).pipeline
        if self.pipeline.vae.dtype != self.pipeline.unet.dtype:
            # `load_model` loads a decoder that overflows in float16 as bfloat16. The documented
            # example converts it instead.
            self.pipeline.vae.to(self.pipeline.unet.dtype)
        self._size: dict[str, int] = {}
        if settings.shape:
            shape = CompiledShape.parse(settings.shape)
            self._size = {"height": shape.height, "width": shape.width}

    def draw(self, drawings: Sequence[Drawing]) -> list[Any]:
        """Draw all of them, as PIL images in the same order.

        One call of the pipeline takes one number of steps: drawings that differ in it are drawn by
        several calls.
        """
        import torch

        images: list[Any] = [None] * len(drawings)
        for steps in dict.fromkeys(drawing.num_inference_steps for drawing in drawings):
            places = [i for i, each in enumerate(drawings) if each.num_inference_steps == steps]
            generators = []
            for place in places:
                generator = torch.Generator("cpu")
                seed = drawings[place].seed
                generators.append(generator)
                if seed is None:
                    generator.seed()
                else:
                    generator.manual_seed(seed)
            drawn = self.pipeline(
                [drawings[place].prompt for place in places],
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                # A generator for each image: it is drawn as it would be alone.
                generator=generators,
                **self._size,
            ).images
            for place, image in zip(places, drawn, strict=True):
                images[place] = image
        return images


def answer(image: Any) -> dict[str, Any]:
    """The documented example's answer: the image as PNG in a data URI."""
    from bench.harness.drive import png_data_uri

    return {"image": {"url": png_data_uri(image), "width": image.width, "height": image.height}}
