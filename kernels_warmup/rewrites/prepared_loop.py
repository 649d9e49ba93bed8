"""diffusers' SDXL pipeline, asked once for what it works out anew before every loop.

The call, the loop and their results stay diffusers' own. Overridden are four answers that depend on
the model, the step count or the size alone, and that keep the GPU waiting between the prompt and
the first step:

- the device: found by walking every module of every part, 10 ms of host time for SDXL;
- timesteps and sigmas: copied to the device and back, which waits for all that is enqueued;
- the size condition: a copy that waits likewise;
- what the scheduler's step takes: read off its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
)

SCHEDULERS = (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
"""Those whose timesteps are remembered. Others may keep a history of the run beside them, and go on
working theirs out for every run."""

SET_BY_TIMESTEPS = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "custom_timesteps",
    "_step_index",
    "_begin_index",
)
"""What `set_timesteps` of one of these schedulers leaves behind. Steps count in the last two, and
write into none of the tensors, so that runs can share them."""


class PreparedPipeline(StableDiffusionXLPipeline):  # type: ignore[misc]
    """Made by `prepare_loop`; its parts stay where they are from then on."""

    _runs_on: torch.device
    _step_takes: frozenset[str]
    _time_ids: dict[object, torch.Tensor]

    @property
    def _execution_device(self) -> torch.device:
        return self._runs_on

    def _get_add_time_ids(self, *sizes: Any, **options: Any) -> torch.Tensor:
        key = (sizes, tuple(sorted(options.items(), key=lambda option: option[0])))
        if key not in self._time_ids:
            worked_out = super()._get_add_time_ids(*sizes, **options)
            self._time_ids[key] = worked_out.to(self._runs_on)
        return self._time_ids[key]

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        given = {"eta": eta, "generator": generator}
        return {name: value for name, value in given.items() if name in self._step_takes}

    def time_ids(self, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The size condition of one image as a call makes it, (1, 6) on the device."""
        size = (height, width)
        return self._get_add_time_ids(
            size,
            (0, 0),
            size,
            dtype=dtype,
            text_encoder_projection_dim=int(self.text_encoder_2.config.projection_dim),
        )


def prepare_loop(pipeline: StableDiffusionXLPipeline) -> PreparedPipeline:
    """A pipeline of the same parts but for the scheduler, which is a new one of the same settings.

    The parts are on their device already. The given pipeline is left as it is.
    """
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    prepared = PreparedPipeline(
        **pipeline.components | {"scheduler": scheduler},
        force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    prepared.set_progress_bar_config(disable=True)
    prepared._runs_on = next(pipeline.unet.parameters()).device
    prepared._step_takes = frozenset(inspect.signature(scheduler.step).parameters)
    prepared._time_ids = {}
    if type(scheduler) in SCHEDULERS:
        _remember_timesteps(scheduler)
    return prepared


def _remember_timesteps(scheduler: Any) -> None:
    work_out = scheduler.set_timesteps
    known: dict[tuple[int, str], Mapping[str, Any]] = {}

    def set_timesteps(
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        **others: Any,
    ) -> None:
        if num_inference_steps is None or others:
            work_out(num_inference_steps, device=device, **others)
            return
        key = (num_inference_steps, str(device))
        if key in known:
            vars(scheduler).update(known[key])
            return
        work_out(num_inference_steps, device=device)
        state = cast(Mapping[str, Any], vars(scheduler))
        known[key] = {name: state[name] for name in SET_BY_TIMESTEPS if name in state}

    scheduler.set_timesteps = set_timesteps
