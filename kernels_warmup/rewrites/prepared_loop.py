"""diffusers' SDXL pipeline without the work that it repeats before every loop.

The call, the loop and their results are diffusers' own. Four results are computed once and reused,
because they depend on the model, the step count or the image size alone, and computing them keeps
the GPU waiting between the prompt and the first step:

- the device: diffusers finds it by walking every module of every part, 10 ms of host time;
- timesteps and sigmas: copied to the device and back, which waits for all enqueued work;
- the size condition: a copy that waits in the same way;
- the arguments of the scheduler's step: read from its signature.

And some schedulers read in every step the value of its timestep. They get timesteps in host memory,
because on the device each reading would wait for all enqueued work.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
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
"""The schedulers whose timesteps are reused. Others may keep a history of the run beside their
timesteps, so they compute them for every run."""

READ_TIMESTEPS = (DDIMScheduler, LCMScheduler)
"""Those of them whose step reads the values of its own and of the next timestep."""

SET_BY_TIMESTEPS = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "custom_timesteps",
    "_step_index",
    "_begin_index",
)
"""The attributes that `set_timesteps` of these schedulers sets. Steps count in the last two and do
not write into the tensors, so runs can share them."""


class PreparedPipeline(StableDiffusionXLPipeline):  # type: ignore[misc]
    """A pipeline that `prepare_loop` made. Its parts must not move to another device afterwards."""

    _device_of_parts: torch.device
    _step_arguments: frozenset[str]
    _time_ids: dict[object, torch.Tensor]

    @property
    def _execution_device(self) -> torch.device:
        return self._device_of_parts

    def _get_add_time_ids(self, *sizes: Any, **options: Any) -> torch.Tensor:
        key = (sizes, tuple(sorted(options.items(), key=lambda option: option[0])))
        if key not in self._time_ids:
            computed = super()._get_add_time_ids(*sizes, **options)
            self._time_ids[key] = computed.to(self._device_of_parts)
        return self._time_ids[key]

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        given = {"eta": eta, "generator": generator}
        return {name: value for name, value in given.items() if name in self._step_arguments}

    def end_guidance(self, unet_options: dict[str, Any] | None) -> None:
        """Run the remaining steps of the loop without guidance. Called from the step callback.

        Both are read by every step. The callback also returns the text without its negative half.

        Args:
            unet_options: the `cross_attention_kwargs` of the remaining steps.
        """
        self._guidance_scale = 1.0
        self._cross_attention_kwargs = unet_options

    def time_ids(self, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The size condition of one image as diffusers computes it, (1, 6) on the device."""
        size = (height, width)
        return self._get_add_time_ids(
            size,
            (0, 0),
            size,
            dtype=dtype,
            text_encoder_projection_dim=int(self.text_encoder_2.config.projection_dim),
        )


def prepare_loop(pipeline: StableDiffusionXLPipeline) -> PreparedPipeline:
    """A pipeline of the same parts, with a new scheduler of the same settings.

    The parts must be on their device already. The given pipeline is not changed.
    """
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    prepared = PreparedPipeline(
        **pipeline.components | {"scheduler": scheduler},
        force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    prepared.set_progress_bar_config(disable=True)
    prepared._device_of_parts = next(pipeline.unet.parameters()).device
    prepared._step_arguments = frozenset(inspect.signature(scheduler.step).parameters)
    prepared._time_ids = {}
    if type(scheduler) in SCHEDULERS:
        _remember_timesteps(scheduler)
    if type(scheduler) in READ_TIMESTEPS:
        _step_with_host_timesteps(scheduler)
    return prepared


def _remember_timesteps(scheduler: Any) -> None:
    compute = scheduler.set_timesteps
    known: dict[object, Mapping[str, Any]] = {}

    # With the signature kept: the pipeline reads from it whether a scheduler takes timesteps.
    @functools.wraps(compute)
    def set_timesteps(
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        **others: Any,
    ) -> None:
        key = (num_inference_steps, tuple(timesteps or ()), str(device))
        if key in known and not others:
            vars(scheduler).update(known[key])
            return
        given = others if timesteps is None else others | {"timesteps": list(timesteps)}
        compute(num_inference_steps, device=device, **given)
        if type(scheduler) in READ_TIMESTEPS:
            scheduler.host_timesteps = scheduler.timesteps.cpu()
        if not others:
            state = cast(Mapping[str, Any], vars(scheduler))
            names = (*SET_BY_TIMESTEPS, "host_timesteps")
            known[key] = {name: state[name] for name in names if name in state}

    scheduler.set_timesteps = set_timesteps


def _step_with_host_timesteps(scheduler: Any) -> None:
    """Let the scheduler's step read timesteps in host memory. The UNet gets those on the device."""
    step = scheduler.step

    @functools.wraps(step)
    def host_step(
        model_output: torch.Tensor, timestep: torch.Tensor, *arguments: Any, **options: Any
    ) -> Any:
        scheduler.timesteps = scheduler.host_timesteps
        # A step's timestep is a view of all of them: its place says which it is.
        on_host = scheduler.host_timesteps[timestep.storage_offset()]
        return step(model_output, on_host, *arguments, **options)

    scheduler.step = host_step
