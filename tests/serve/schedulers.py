"""The schedulers that are served, each as a checkpoint may bring it."""

from __future__ import annotations

import diffusers

from serve.model.sdxl_base import SCHEDULER_CONFIG

TRAILING = SCHEDULER_CONFIG | {"timestep_spacing": "trailing"}
SERVED = {
    "euler": diffusers.EulerDiscreteScheduler(**SCHEDULER_CONFIG),
    "euler trailing": diffusers.EulerDiscreteScheduler(**TRAILING),
    "euler ancestral": diffusers.EulerAncestralDiscreteScheduler.from_config(TRAILING),
    "lcm": diffusers.LCMScheduler.from_config(TRAILING),
    "ddim": diffusers.DDIMScheduler.from_config(TRAILING),
    # It keeps a history of the run, so its timesteps are not cached. It is served all the same.
    "dpm++": diffusers.DPMSolverMultistepScheduler.from_config(SCHEDULER_CONFIG),
}
