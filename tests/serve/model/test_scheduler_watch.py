"""What a watched scheduler reports, and that it is restored afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from serve.model.scheduler_watch import watch_scheduler
from serve.model.sdxl_base import SCHEDULER_CONFIG


def loop(scheduler: Any, steps: int) -> torch.Tensor:
    """The calls that the pipeline makes of a scheduler."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    sample = torch.ones(1, 4, 8, 8)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.ones(1, 4, 8, 8), timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler])
def test_the_loops_start_and_each_step_are_reported(kind: Any) -> None:
    """DDIM has no `set_begin_index`."""
    scheduler = kind.from_config(SCHEDULER_CONFIG)
    expected = loop(scheduler, 3)
    seen: list[str] = []
    with watch_scheduler(scheduler, lambda: seen.append("begin"), lambda: seen.append("step")):
        watched = loop(scheduler, 3)
    assert seen == ["begin", "step", "step", "step"]
    assert torch.equal(watched, expected)
    loop(scheduler, 3)
    assert len(seen) == 4


@pytest.mark.parametrize("on_step", [None, lambda: None])
def test_the_scheduler_is_restored_after_a_failed_call(
    on_step: Callable[[], object] | None,
) -> None:
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULER_CONFIG)
    before = dict(vars(scheduler))
    watched: list[bool] = []

    def failing_call() -> None:
        with watch_scheduler(scheduler, lambda: None, on_step):
            watched.append("step" in vars(scheduler))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_call()
    assert watched == [on_step is not None]
    assert vars(scheduler) == before


def test_the_pipeline_still_sees_which_arguments_a_step_takes() -> None:
    """It passes `eta` and `generator` only to a `step` whose signature has them."""
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULER_CONFIG)
    expected = inspect.signature(scheduler.step)
    with watch_scheduler(scheduler, lambda: None, lambda: None):
        assert inspect.signature(scheduler.step) == expected
