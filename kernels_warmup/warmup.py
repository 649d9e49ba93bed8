"""Running every warm shape once before the first request, and proving that nothing is left to do.

Knows neither models nor HTTP: what to run is a callable.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernels_warmup.shapes import CompiledShape
from metrics.clock import WallAnchor
from metrics.timeline import PhaseTiming

logger = logging.getLogger(__name__)

# Read off torch's own counter where its compiler has been loaded; loading it takes seconds.
_COMPILER_COUNTERS = "torch._dynamo.utils"

RunOnce = Callable[[CompiledShape, bool], None]
"""Runs the production path once at a shape, with guidance on or off."""


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What the warm-up did.

    Attributes:
        phases: one `compile {shape}` per shape and one `verify`, Unix nanoseconds.
        warm: the shapes that may be served, in the order asked for.
        failed: shapes left out, with the type of the error each failed with.
        graphs: how many graphs were compiled.
        recompiled: how many more the verifying pass compiled; anything but 0 is a fault.
    """

    phases: tuple[PhaseTiming, ...]
    warm: tuple[CompiledShape, ...]
    failed: tuple[tuple[CompiledShape, str], ...]
    graphs: int
    recompiled: int


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process so far."""
    utils = sys.modules.get(_COMPILER_COUNTERS)
    return 0 if utils is None else int(utils.counters["stats"]["unique_graphs"])


def warm_up(
    run_once: RunOnce,
    shapes: Sequence[CompiledShape],
    on_progress: Callable[[str], None] = lambda _: None,
) -> WarmupReport:
    """Run every shape with guidance on and off, then all of them again expecting no compilation.

    A shape that fails is left out with the reason and the others serve; if none is left, the last
    error is raised.

    Args:
        on_progress: told the phase that begins.
    """
    anchor = WallAnchor.now()
    phases: list[PhaseTiming] = []
    warm: list[CompiledShape] = []
    failed: list[tuple[CompiledShape, str]] = []
    last_error: Exception | None = None
    graphs_before = graphs_compiled()

    for shape in shapes:
        name = f"compile {shape}"
        on_progress(name)
        start = time.perf_counter_ns()
        graphs_at_start = graphs_compiled()
        try:
            for guided in (True, False):
                run_once(shape, guided)
            warm.append(shape)
        except Exception as error:
            # Whatever one shape fails with (memory, a compiler's bug), the others may serve.
            last_error = error
            failed.append((shape, type(error).__name__))
            logger.exception("%s could not be warmed and will not be served", shape)
        phases.append(
            PhaseTiming(
                name,
                anchor.to_unix(start),
                anchor.to_unix(time.perf_counter_ns()),
                {"shape": str(shape), "graphs": graphs_compiled() - graphs_at_start},
            )
        )
    if not warm and last_error is not None:
        raise last_error

    on_progress("verify")
    graphs = graphs_compiled()
    start = time.perf_counter_ns()
    for shape in warm:
        for guided in (True, False):
            run_once(shape, guided)
    recompiled = graphs_compiled() - graphs
    phases.append(
        PhaseTiming(
            "verify",
            anchor.to_unix(start),
            anchor.to_unix(time.perf_counter_ns()),
            {"recompiled": recompiled},
        )
    )
    if recompiled:
        logger.error("the verifying pass compiled %d graphs; requests may stall", recompiled)
    return WarmupReport(
        phases=tuple(phases),
        warm=tuple(warm),
        failed=tuple(failed),
        graphs=graphs - graphs_before,
        recompiled=recompiled,
    )
