"""The scheduler and the timesteps that an operator chose, and whether they fit the checkpoint.

`SDXL_SCHEDULER` chooses among the schedulers that cost no wait in the denoising loop. Few-step
checkpoints were trained for one scheduler and one spacing of timesteps, and draw badly with others.
Derivatives of them often ship the wrong ones, so these are checked.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from serve.errors import ModelError
from serve.settings import SchedulerName, ServeSettings

_TRAILING: Mapping[str, Any] = MappingProxyType({"timestep_spacing": "trailing"})
_DDIM: Mapping[str, Any] = MappingProxyType({"clip_sample": False})
"""Not DDIM's own default, which is for pixels: latents are not bounded."""

KINDS: Mapping[SchedulerName, tuple[type, Mapping[str, Any]]] = MappingProxyType(
    {
        "euler": (EulerDiscreteScheduler, {}),
        "euler-trailing": (EulerDiscreteScheduler, _TRAILING),
        "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
        "euler-ancestral-trailing": (EulerAncestralDiscreteScheduler, _TRAILING),
        "ddim": (DDIMScheduler, _DDIM),
        "ddim-trailing": (DDIMScheduler, {**_DDIM, **_TRAILING}),
        "lcm": (LCMScheduler, {}),
    }
)
"""Each scheduler's class, and what differs from the checkpoint's own settings."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a model's steps are spaced.

    Attributes:
        scheduler: None: the checkpoint's own.
        timesteps: the timesteps of every run, descending; None: the scheduler computes them from
            the number of steps.
    """

    scheduler: SchedulerName | None = None
    timesteps: tuple[int, ...] | None = None

    def apply(self, pipeline: Any) -> None:
        """Give the pipeline its scheduler.

        Raises:
            ModelError: the model's scheduler cannot run at these timesteps.
        """
        if self.scheduler is not None:
            kind, changes = KINDS[self.scheduler]
            settings = {**pipeline.scheduler.config, **changes}
            known = inspect.signature(kind).parameters  # diffusers would warn of others
            pipeline.scheduler = kind(**{n: v for n, v in settings.items() if n in known})
        if self.timesteps is not None:
            # It would warn of timesteps beside its own. An operator has chosen these.
            logging.getLogger(LCMScheduler.__module__).setLevel(logging.ERROR)
            _require_timesteps(pipeline.scheduler, self.timesteps)


OWN_SCHEDULE = Schedule()


def most_steps(scheduler: Any) -> int | None:
    """The most steps of a run; None: as many as a request may have.

    LCM and TCD choose theirs among those that the model was distilled with, and raise for more.
    """
    if "original_inference_steps" not in inspect.signature(scheduler.set_timesteps).parameters:
        return None
    return int(scheduler.config.original_inference_steps)


def _require_timesteps(scheduler: Any, timesteps: tuple[int, ...]) -> None:
    given = ",".join(map(str, timesteps))
    kind = type(scheduler).__name__
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ModelError(
            f"SDXL_TIMESTEPS={given}: this model's {kind} takes no timesteps; "
            "SDXL_SCHEDULER=euler and SDXL_SCHEDULER=lcm do."
        )
    last = scheduler.config.num_train_timesteps - 1
    if timesteps[0] > last:
        raise ModelError(f"SDXL_TIMESTEPS={given}: this model has the timesteps 0 to {last}.")
    try:
        scheduler.set_timesteps(timesteps=list(timesteps))
    except ValueError:
        # Of the settings of Euler that space the timesteps themselves, as Karras' do.
        raise ModelError(
            f"SDXL_TIMESTEPS={given}: this model's {kind} spaces its timesteps by a rule of its "
            "own; SDXL_SCHEDULER=lcm does not."
        ) from None


# Few-step checkpoints ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Family:
    """What checkpoints of one kind of distillation need.

    Attributes:
        in_name: matches the names of its checkpoints, in lower case.
        kinds: names of the schedulers that fit; the first is the usual one.
        trailing: whether the timesteps must be spaced from the last one.
        settings: the settings that make it right.
        fixed_timesteps: whether it was trained at fixed timesteps.
    """

    name: str
    in_name: str
    kinds: tuple[str, ...]
    trailing: bool
    settings: str
    fixed_timesteps: bool = False


FAMILIES = (
    _Family(
        "SDXL-Lightning",
        r"lightning",
        ("EulerDiscreteScheduler",),
        True,
        "SDXL_SCHEDULER=euler-trailing",
    ),
    _Family(
        "SDXL-Turbo",
        r"turbo",
        ("EulerAncestralDiscreteScheduler",),
        True,
        "SDXL_SCHEDULER=euler-ancestral-trailing",
    ),
    _Family(
        "Hyper-SD",
        r"hyper[-_]?sd",
        ("DDIMScheduler",),
        True,
        "SDXL_SCHEDULER=ddim-trailing",
    ),
    _Family(
        "DMD2",
        r"(?<![a-z])dmd2?(?![a-z])",
        ("LCMScheduler",),
        False,
        "SDXL_SCHEDULER=lcm and SDXL_TIMESTEPS=999,749,499,249",
        fixed_timesteps=True,
    ),
    _Family(
        "LCM",
        r"(?<![a-z])lcm(?![a-z])|latent-consistency",
        ("LCMScheduler", "TCDScheduler"),
        False,
        "SDXL_SCHEDULER=lcm",
    ),
)
"""Few-step checkpoints by what their authors document: scheduler, spacing, timesteps."""

FEW_STEPS = 8
"""A model that runs without guidance in at most this many steps is a few-step checkpoint."""


def describe(scheduler: Any) -> dict[str, str]:
    """The scheduler's class and, where it has one, its spacing, as `/ready` reports them."""
    spacing = scheduler.config.get("timestep_spacing")
    # LCM has the setting and does not read it.
    spaced = {} if spacing is None or isinstance(scheduler, LCMScheduler) else {"spacing": spacing}
    return {"kind": type(scheduler).__name__, **spaced}


def misfit(model_name: str, scheduler: Any, settings: ServeSettings) -> str | None:
    """What is wrong with the scheduler for this checkpoint, and what to set; None: nothing is known
    to be wrong.

    Args:
        model_name: the last part of the repository's or the directory's name.
    """
    kind, spacing = type(scheduler).__name__, scheduler.config.get("timestep_spacing")
    family = next((each for each in FAMILIES if re.search(each.in_name, model_name.lower())), None)
    if family is not None:
        return _misfit_of(family, kind, spacing, settings)
    few = settings.default_steps <= FEW_STEPS and settings.guidance_scale <= 1
    euler = kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    if few and euler and spacing != "trailing" and settings.timesteps is None:
        name = "euler" if kind == "EulerDiscreteScheduler" else "euler-ancestral"
        return (
            f"a checkpoint for {settings.default_steps} steps without guidance needs trailing "
            f"timesteps, and this model's {kind} has {spacing} ones: set "
            f"SDXL_SCHEDULER={name}-trailing."
        )
    return None


def _misfit_of(
    family: _Family, kind: str, spacing: str | None, settings: ServeSettings
) -> str | None:
    needs = f"a checkpoint of the family {family.name} needs"
    if kind not in family.kinds:
        return f"{needs} {family.kinds[0]}, and this model has {kind}: set {family.settings}."
    if family.trailing and spacing != "trailing" and settings.timesteps is None:
        return (
            f"{needs} trailing timesteps, and this model's {kind} has {spacing} ones: set "
            f"{family.settings}."
        )
    if family.fixed_timesteps and settings.timesteps is None:
        return f"{needs} fixed timesteps, and none are set: set {family.settings}."
    return None
