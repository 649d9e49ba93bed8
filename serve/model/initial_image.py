"""Image to image: the denoising loop begins with a picture under noise, at a later step.

The loop stays that of text to image, with the same graphs. As in diffusers' image-to-image
pipeline, the scheduler's first steps are left out, and the picture's latents get the noise of the
first step that runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from kernels_warmup.rewrites.prepared_loop import PreparedPipeline


@dataclass(frozen=True, slots=True)
class InitialLatents:
    """What the loop of an image-to-image run begins with.

    Attributes:
        latents: (images, channels, height / 8, width / 8) on the device, scaled for the UNet.
        first_step: the index of the first step that runs; the steps before it are left out.
    """

    latents: torch.Tensor
    first_step: int


class LaterStart:
    """Lets a prepared pipeline begin at a later step."""

    def __init__(self, pipeline: PreparedPipeline) -> None:
        self._pipeline = pipeline
        self._shares: dict[object, tuple[float, float]] = {}

    @contextmanager
    def begin_with(self, initial: InitialLatents, noise: torch.Tensor) -> Iterator[None]:
        """While the context is open, a call of the pipeline begins with `initial` under `noise`.

        The pipeline reads the scheduler's timesteps when it has set them, and loops over what it
        has read: so they are cut to the steps that run, until the loop begins. Some schedulers read
        all of them in each step. Nothing here waits for the device.

        Args:
            noise: of the latents' shape, with variance 1.
        """
        scheduler: Any = self._pipeline.scheduler
        first = initial.first_step * scheduler.order
        of_scheduler: dict[str, Any] = vars(scheduler)
        of_pipeline = cast(dict[str, Any], vars(self._pipeline))
        before = {name: of_scheduler.get(name) for name in ("set_timesteps", "set_begin_index")}
        compute_timesteps = scheduler.set_timesteps
        begin_at = getattr(scheduler, "set_begin_index", None)  # DDIM has none
        timesteps: list[torch.Tensor] = []
        shares: list[tuple[float, float]] = []

        @functools.wraps(compute_timesteps)  # the pipeline reads which arguments it takes
        def set_timesteps(
            num_inference_steps: int | None = None, device: Any = None, **options: Any
        ) -> None:
            compute_timesteps(num_inference_steps, device=device, **options)
            shares.append(self._shares_at(first, num_inference_steps, options))
            timesteps.append(scheduler.timesteps)
            scheduler.timesteps = scheduler.timesteps[first:]

        def prepare_latents(*_: Any, **__: Any) -> torch.Tensor:
            of_picture, of_noise = shares[0]
            return initial.latents * of_picture + noise * of_noise

        def set_begin_index(_begin_index: int = 0) -> None:
            scheduler.timesteps = timesteps[0]
            if begin_at is not None:
                begin_at(first)

        of_scheduler.update(set_timesteps=set_timesteps, set_begin_index=set_begin_index)
        of_pipeline["prepare_latents"] = prepare_latents
        try:
            yield
        finally:
            del of_pipeline["prepare_latents"]
            for name, attribute in before.items():
                del of_scheduler[name]
                if attribute is not None:
                    of_scheduler[name] = attribute

    def _shares_at(
        self, first: int, num_inference_steps: int | None, options: dict[str, Any]
    ) -> tuple[float, float]:
        """The factors of the picture and of the noise in what step `first` reads.

        `add_noise` of every scheduler is linear in both. It is called on the host, with a scheduler
        of its own, because on the device it would wait; and once, because that takes milliseconds.
        """
        key = (first, num_inference_steps, str(options))
        if key not in self._shares:
            scheduler: Any = type(self._pipeline.scheduler).from_config(
                self._pipeline.scheduler.config
            )
            scheduler.set_timesteps(num_inference_steps, device="cpu", **options)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            at = scheduler.timesteps[first : first + 1]
            one, zero = torch.ones(1, 1), torch.zeros(1, 1)
            self._shares[key] = (
                float(scheduler.add_noise(one, zero, at)),
                float(scheduler.add_noise(zero, one, at)),
            )
        return self._shares[key]
