"""When the denoising loop starts and each step ends, seen from the calls that diffusers makes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watch_scheduler(
    scheduler: Any,
    on_loop_begins: Callable[[], object],
    on_step_enqueued: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Watch one pipeline call through its scheduler.

    The pipeline calls `set_begin_index` just before its loop, and `step` at the end of each step.
    Both are replaced on this scheduler object while the context is open, and are what they were
    before afterwards.

    Args:
        on_loop_begins: called after `set_begin_index`.
        on_step_enqueued: called after each `step`; None leaves `step` alone.
    """
    replaced: dict[str, Any] = {
        "set_begin_index": _set_begin_index(scheduler, on_loop_begins),
    }
    if on_step_enqueued is not None:
        replaced["step"] = _step(scheduler, on_step_enqueued)
    before = {name: value for name, value in vars(scheduler).items() if name in replaced}
    vars(scheduler).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            delattr(scheduler, name)
        vars(scheduler).update(before)


def _set_begin_index(scheduler: Any, on_loop_begins: Callable[[], object]) -> Callable[..., None]:
    # DDIM has no such method. The pipeline calls one where it finds one, so it finds this one.
    original = getattr(scheduler, "set_begin_index", None)

    def set_begin_index(begin_index: int = 0) -> None:
        if original is not None:
            original(begin_index)
        on_loop_begins()

    return set_begin_index


def _step(scheduler: Any, on_step_enqueued: Callable[[], object]) -> Callable[..., Any]:
    original = scheduler.step

    # With the signature kept: the pipeline reads from it which arguments `step` takes.
    @functools.wraps(original)
    def step(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        on_step_enqueued()
        return result

    return step
