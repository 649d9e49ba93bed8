"""Running every warm shape once before the first request, and proving that nothing is left to do.

Knows neither models nor HTTP: what to run is a callable. It goes shape by shape, so that whoever
owns the model's thread may serve in between.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kernels_warmup.shapes import CompiledShape
from metrics.clock import WallAnchor
from metrics.records import PhaseTiming

logger = logging.getLogger(__name__)

# Read off torch's own counters where its compiler has been loaded; loading it takes seconds.
_COMPILER_COUNTERS = "torch._dynamo.utils"


@dataclass(frozen=True, slots=True)
class RunKind:
    """What else of a request than its size decides which graphs its run needs.

    Attributes:
        guided: with guidance, which doubles the UNet's batch.
        negative: with a negative prompt that says something; a text more to encode, and where it
            says nothing the UNet may have less to compute.
        images: images in the run, which multiply every batch.
    """

    guided: bool
    negative: bool = False
    images: int = 1


UNGUIDED = RunKind(guided=False)
GUIDED = RunKind(guided=True, negative=True)
GUIDED_BY_NOTHING = RunKind(guided=True)
"""With guidance away from an empty prompt: the usual request."""

RunOnce = Callable[[CompiledShape, RunKind], None]
"""Runs the production path once at a shape."""


@dataclass(frozen=True, slots=True)
class CompilerCounts:
    """What torch's compiler has done in this process so far.

    Attributes:
        graphs: graphs made, from scratch or from a cache.
        graph_breaks: places where it gave up and went on in Python.
        cache_hits, cache_misses: graphs whose code was found, or had to be generated.
    """

    graphs: int = 0
    graph_breaks: int = 0
    cache_hits: int = 0
    cache_misses: int = 0

    def __sub__(self, earlier: CompilerCounts) -> CompilerCounts:
        return CompilerCounts(
            self.graphs - earlier.graphs,
            self.graph_breaks - earlier.graph_breaks,
            self.cache_hits - earlier.cache_hits,
            self.cache_misses - earlier.cache_misses,
        )


def compiler_counts() -> CompilerCounts:
    """The counts now; all zero where the compiler was never loaded."""
    utils = sys.modules.get(_COMPILER_COUNTERS)
    if utils is None:
        return CompilerCounts()
    counters: Mapping[str, Mapping[str, int]] = utils.counters

    def count(family: str, name: str) -> int:
        return int(counters.get(family, {}).get(name, 0))

    return CompilerCounts(
        graphs=count("stats", "unique_graphs"),
        graph_breaks=sum(counters.get("graph_break", {}).values()),
        cache_hits=count("inductor", "fxgraph_cache_hit"),
        cache_misses=count("inductor", "fxgraph_cache_miss"),
    )


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What the warm-up did.

    Attributes:
        phases: one `compile {shape}` per shape and one `verify`, Unix nanoseconds.
        warm: the shapes that may be served, in the order asked for.
        failed: shapes left out, with the type of the error each failed with.
        compiled: what the compiler did for the shapes.
        recompiled: how many more graphs the verifying pass made; anything but 0 is a fault.
    """

    phases: tuple[PhaseTiming, ...]
    warm: tuple[CompiledShape, ...]
    failed: tuple[tuple[CompiledShape, str], ...]
    compiled: CompilerCounts
    recompiled: int


class Warmup:
    """One start-up's warm-up, a shape at a time; used by one thread at a time.

    Args:
        kinds: the runs that each shape is warmed with.
        on_progress: told the phase that begins.
    """

    def __init__(
        self,
        run_once: RunOnce,
        kinds: Sequence[RunKind] = (GUIDED, UNGUIDED),
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run_once = run_once
        self._kinds = kinds
        self._on_progress = on_progress
        self._anchor = WallAnchor.now()
        self._before = compiler_counts()
        self._phases: list[PhaseTiming] = []
        self._warm: list[CompiledShape] = []
        self._failed: list[tuple[CompiledShape, str]] = []
        self._last_error: Exception | None = None
        self._recompiled = 0

    @property
    def warm_shapes(self) -> tuple[CompiledShape, ...]:
        return tuple(self._warm)

    def warm(self, shape: CompiledShape) -> bool:
        """Run a shape for the first time. One that fails is left out, with the reason in the log;
        returns whether it is warm."""
        name = f"compile {shape}"
        self._on_progress(name)
        start, before = time.perf_counter_ns(), compiler_counts()
        error: Exception | None = None
        try:
            self._run_all(shape)
            self._warm.append(shape)
        except Exception as raised:
            # Whatever one shape fails with (memory, a compiler's bug), the others may serve.
            error = self._last_error = raised
            self._failed.append((shape, type(raised).__name__))
            logger.exception("%s could not be warmed and will not be served", shape)
        done = compiler_counts() - before
        attributes: dict[str, str | int | float | bool] = {
            "shape": str(shape),
            "graphs": done.graphs,
            "cache_hits": done.cache_hits,
            "cache_misses": done.cache_misses,
        }
        if error is not None:
            attributes["error.type"] = type(error).__name__
        self._end_phase(name, start, attributes)
        return error is None

    def verify(self) -> None:
        """Run every warm shape again, expecting no compilation.

        Raises the last shape's error where none is warm.
        """
        if not self._warm and self._last_error is not None:
            raise self._last_error
        self._on_progress("verify")
        start, before = time.perf_counter_ns(), compiler_counts()
        for shape in self._warm:
            self._run_all(shape)
        self._recompiled = (compiler_counts() - before).graphs
        self._end_phase("verify", start, {"recompiled": self._recompiled})
        if self._recompiled:
            logger.error(
                "the verifying pass compiled %d graphs; requests may be slow", self._recompiled
            )

    def report(self) -> WarmupReport:
        return WarmupReport(
            phases=tuple(self._phases),
            warm=self.warm_shapes,
            failed=tuple(self._failed),
            compiled=compiler_counts() - self._before,
            recompiled=self._recompiled,
        )

    def _run_all(self, shape: CompiledShape) -> None:
        for kind in self._kinds:
            self._run_once(shape, kind)

    def _end_phase(
        self, name: str, start: int, attributes: Mapping[str, str | int | float | bool]
    ) -> None:
        end = time.perf_counter_ns()
        to_unix = self._anchor.to_unix
        self._phases.append(PhaseTiming(name, to_unix(start), to_unix(end), attributes))
