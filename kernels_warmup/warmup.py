"""Runs every warm shape before the first request, then again to verify that nothing compiles.

Knows neither models nor HTTP: the caller passes a function that runs one request. It works shape by
shape, so that the model's thread can serve requests in between.
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

# The module of the compiler's own counters. Never imported here: that takes seconds.
_COMPILER_COUNTERS = "torch._dynamo.utils"


@dataclass(frozen=True, slots=True)
class RunKind:
    """What decides, besides the image size, which graphs a run needs.

    Attributes:
        guided: with guidance, which doubles the UNet's batch.
        negative: with a negative prompt that is not empty. It is one more text to encode; without
            it the UNet may have less to compute.
        images: images in the run, which multiply every batch.
        chunks: chunks of 75 tokens of every prompt, which multiply the text that a step reads.
        from_picture: the run begins with a picture, so it encodes one.
    """

    guided: bool
    negative: bool = False
    images: int = 1
    chunks: int = 1
    from_picture: bool = False


UNGUIDED = RunKind(guided=False)
GUIDED = RunKind(guided=True, negative=True)
GUIDED_BY_NOTHING = RunKind(guided=True)
"""With guidance and an empty negative prompt: the usual request."""
FROM_PICTURE = RunKind(guided=False, from_picture=True)
"""The picture's encoder has no graph of its own, but its first run at a size takes longer."""

RunOnce = Callable[[CompiledShape, RunKind], None]
"""Runs the same code as a request, once, at a shape."""


@dataclass(frozen=True, slots=True)
class CompilerCounts:
    """What torch's compiler has done in this process so far.

    Attributes:
        graphs: graphs compiled or loaded from a cache.
        graph_breaks: places where it stopped tracing and continued in Python.
        cache_hits: graphs whose code was in the cache.
        cache_misses: graphs whose code had to be generated.
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
    """The current counts; all zero if the compiler has never been loaded."""
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
        warm: the shapes that may be served, in the order of warming.
        failed: the other shapes, each with the type of its error.
        compiled: what the compiler did for all shapes.
        recompiled: graphs that the verifying pass compiled; anything but 0 is a fault.
    """

    phases: tuple[PhaseTiming, ...]
    warm: tuple[CompiledShape, ...]
    failed: tuple[tuple[CompiledShape, str], ...]
    compiled: CompilerCounts
    recompiled: int


class Warmup:
    """The warm-up of one start, one shape per call; not for several threads at once.

    Args:
        run_once: runs one request at a shape.
        kinds: the kinds of run to warm each shape with.
        on_progress: called with the name of each phase as it begins.
        anchor: that of the whole start, so that a stepped system clock, as on a machine that has
            just booted, moves no phase against the others. None: one of its own.
    """

    def __init__(
        self,
        run_once: RunOnce,
        kinds: Sequence[RunKind] = (GUIDED, UNGUIDED),
        on_progress: Callable[[str], None] = lambda _: None,
        anchor: WallAnchor | None = None,
    ) -> None:
        self._run_once = run_once
        self._kinds = kinds
        self._on_progress = on_progress
        self._anchor = anchor or WallAnchor.now()
        self._before = compiler_counts()
        self._phases: list[PhaseTiming] = []
        self._warm: dict[CompiledShape, list[RunKind]] = {}
        self._failed: list[tuple[CompiledShape, str]] = []
        self._last_error: Exception | None = None
        self._recompiled = 0

    @property
    def warm_shapes(self) -> tuple[CompiledShape, ...]:
        return tuple(self._warm)

    def warm_sizes(self, shape: CompiledShape) -> tuple[int, ...]:
        """The numbers of images that a run of a warm shape may have, ascending."""
        return tuple(sorted({kind.images for kind in self._warm[shape]}))

    def warm(self, shape: CompiledShape) -> bool:
        """Run a shape for the first time; returns whether it is warm now.

        A shape that fails is logged and left out. If it fails with several images only, these and
        larger numbers are left out.
        """
        name = f"compile {shape}"
        self._on_progress(name)
        start, before = time.perf_counter_ns(), compiler_counts()
        error: Exception | None = None
        try:
            self._warm[shape] = self._run_first(shape)
        except Exception as raised:
            # Any error (memory, a compiler's bug) may concern this shape alone.
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
        self._end_phase(name, start, attributes, None if error is None else type(error).__name__)
        return error is None

    def verify(self) -> None:
        """Run every warm shape again and count what compiles; nothing should.

        Raises:
            Exception: no shape is warm; it is the last shape's error.
        """
        if not self._warm and self._last_error is not None:
            raise self._last_error
        self._on_progress("verify")
        start, before = time.perf_counter_ns(), compiler_counts()
        for shape, kinds in self._warm.items():
            for kind in kinds:
                self._run_once(shape, kind)
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

    def _run_first(self, shape: CompiledShape) -> list[RunKind]:
        """Run every kind, those with few images first. Returns the kinds that ran."""
        sizes = sorted({kind.images for kind in self._kinds})
        ran: list[RunKind] = []
        for images in sizes:
            kinds = [kind for kind in self._kinds if kind.images == images]
            try:
                for kind in kinds:
                    self._run_once(shape, kind)
            except Exception:
                if images == sizes[0]:
                    raise
                # As for a shape: any error may concern this number of images alone.
                logger.exception("runs of %d images at %s could not be warmed", images, shape)
                break
            ran += kinds
        return ran

    def _end_phase(
        self,
        name: str,
        start: int,
        attributes: Mapping[str, str | int | float | bool],
        error_type: str | None = None,
    ) -> None:
        end = time.perf_counter_ns()
        to_unix = self._anchor.to_unix
        self._phases.append(PhaseTiming(name, to_unix(start), to_unix(end), attributes, error_type))
