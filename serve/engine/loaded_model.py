"""The loaded model and what was decided about it at start-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import RunKind
from metrics.clock import Clock

if TYPE_CHECKING:
    from kernels_warmup.compile import CompiledModel
    from kernels_warmup.cuda_graphs import Fallbacks
    from serve.model.loras.in_place import LorasInPlace
    from serve.model.sdxl import SdxlModel


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Made by the start-up, owned by the runtime, used on the GPU thread.

    Attributes:
        clock: times the model's runs on its device.
        compiled: the compiled functions and the guard over them; None if the model runs as loaded.
        shapes: the shapes to warm. Which of them are warm already is in `Readiness.shapes`.
        kinds: the kinds of run that each shape is warmed with.
        batch_sizes: the numbers of images that a run may have, ascending. With graphs, those of
            them that are warm at a shape are in `Readiness.batch_sizes`.
        loras: those that a run may have; None: it is served without any.
    """

    model: SdxlModel
    clock: Clock
    compiled: CompiledModel | None
    shapes: tuple[CompiledShape, ...]
    kinds: tuple[RunKind, ...]
    batch_sizes: tuple[int, ...]
    loras: LorasInPlace | None = None

    @property
    def has_graphs(self) -> bool:
        """Whether a run needs graphs, compiled or captured, for its shape and number of images."""
        return self.compiled is not None and self.compiled.has_graphs

    @property
    def fallbacks(self) -> Fallbacks | None:
        """How many calls ran eagerly because the guard kept them from compiling."""
        return None if self.compiled is None else self.compiled.fallbacks

    @property
    def recompiles(self) -> int:
        """How many of these calls would have compiled a warm shape again."""
        return 0 if self.fallbacks is None else self.fallbacks.recompiles

    @contextmanager
    def compiling_allowed(self) -> Iterator[None]:
        """Lift the guard for a warm-up. No request may run while it is lifted."""
        if self.compiled is None:
            yield
            return
        self.compiled.thaw()
        try:
            yield
        finally:
            self.compiled.freeze()
