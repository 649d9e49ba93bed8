"""From an empty process to a warm model: load, restore, prepare, warm shape by shape, verify, keep.

Every piece is one turn of the thread that owns the model, so that with `SDXL_READY_EARLY` requests
are served in between. What a request does is `runtime.py`'s business.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from kernels_warmup.cache.compile_cache import CacheResult, CompileCache
from kernels_warmup.cache.key import cache_key
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import (
    GUIDED,
    GUIDED_BY_NOTHING,
    UNGUIDED,
    RunKind,
    RunOnce,
    Warmup,
    WarmupReport,
)
from metrics.catalogue import GenerationMetrics, RunFlops
from metrics.clock import Clock, WallAnchor
from metrics.recorder import Recorder
from metrics.records import Failure, PhaseTiming, WarmupTiming
from serve.engine.gpu_thread import GpuThread
from serve.errors import Draining, ModelError
from serve.settings import ServeSettings
from serve.telemetry.setup import build_budget

if TYPE_CHECKING:
    from kernels_warmup.compile import CompiledModel
    from kernels_warmup.recipes import Mode
    from serve.model.sdxl import SdxlModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

Prepare = Callable[["SdxlModel"], "CompiledModel | None"]
"""Makes a loaded model fast, in place, on the thread that owns it; None: as it was loaded."""


class State(StrEnum):
    """Where the process is in its life."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(slots=True)
class Readiness:
    """What `/ready` tells."""

    state: State = State.STARTING
    phase: str = "not started"
    reason: str = ""
    model: str = ""
    device: str = ""
    shapes: tuple[CompiledShape, ...] = ()
    phases_ms: dict[str, float] = field(default_factory=dict)
    compile: dict[str, str | int | float] = field(default_factory=dict)
    """How the model was made fast, and what that took."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Shapes that could not be warmed, and the type of the error each failed with."""

    def as_json(self) -> dict[str, Any]:
        return {
            "state": self.state.value,
            "phase": self.phase,
            "reason": self.reason,
            "model": self.model,
            "device": self.device,
            "shapes": [str(shape) for shape in self.shapes],
            "left_out": self.left_out,
            "warmup_ms": self.phases_ms,
            "compile": self.compile,
        }


class Startup:
    """One process's start, told as it goes in `readiness` and once as a trace.

    Args:
        prepare: makes the loaded model fast; None: as the settings say.
        run_once: runs the production path once at a shape, on the model's thread.
        kinds: the kinds of run that each shape is warmed with; None: every kind that is served.
        on_ready: called on the event loop when the first request may come.
    """

    def __init__(
        self,
        settings: ServeSettings,
        readiness: Readiness,
        metrics: GenerationMetrics,
        recorder: Recorder,
        gpu: GpuThread,
        make_clock: Callable[[str], Clock],
        prepare: Prepare | None,
        run_once: RunOnce,
        kinds: Sequence[RunKind] | None,
        on_ready: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._readiness = readiness
        self._metrics = metrics
        self._recorder = recorder
        self._gpu = gpu
        self._make_clock = make_clock
        self._prepare = prepare or self._prepare_as_set
        self._run_once = run_once
        self._kinds = kinds
        self._on_ready = on_ready
        self._on_progress: Callable[[str], None] = lambda _: None
        self._anchor = WallAnchor.now()
        self._phases: list[PhaseTiming] = []
        self._attributes: dict[str, str | int | float | bool] = {}
        self._told = True
        self._telling = threading.Lock()
        self._cache: CompileCache | None = None
        self.busy = False
        """A piece of the start is on the model's thread: compiling is silent for minutes."""
        # Set on the model's thread by the first piece.
        self.model: SdxlModel | None = None
        self.clock: Clock | None = None
        self.compiled: CompiledModel | None = None

    @property
    def guided(self) -> bool:
        """Whether guidance is served: a checkpoint made for none needs no graph of it."""
        return self._settings.guidance_scale > 1

    @property
    def kinds(self) -> tuple[RunKind, ...]:
        """The runs each shape is warmed with; without a negative prompt only where those have a
        graph of their own."""
        if self._kinds is not None:
            return tuple(self._kinds)
        if not self.guided:
            return (UNGUIDED,)
        recipe = None if self.compiled is None else self.compiled.recipe
        if recipe is not None and recipe.zero_text and recipe.has_graphs:
            return (GUIDED, GUIDED_BY_NOTHING, UNGUIDED)
        return (GUIDED, UNGUIDED)

    async def run(self, on_progress: Callable[[str], None]) -> None:
        """All of it. Goes on after `on_ready` where the process may be ready early. Cancelled, it
        leaves its trace to `end`.

        Raises:
            ModelError: the model cannot be loaded, or not made fast as the settings ask.
        """
        self._anchor, self._told = WallAnchor.now(), False
        self._on_progress = on_progress
        try:
            shapes = await self._piece(self._load)
            warmup = Warmup(self._run_once, self.kinds, self._progress)
            for shape in shapes:
                await self._piece(lambda shape=shape: self._warm(warmup, shape))  # type: ignore[misc]
                if self._settings.ready_early and warmup.warm_shapes:
                    self._become_ready(warmup)
            await self._piece(lambda: self._verify(warmup))
            for shape in warmup.warm_shapes:
                await self._piece(lambda shape=shape: self._count_flops(shape))  # type: ignore[misc]
            self._become_ready(warmup)
        except Exception as error:
            failure = Failure(
                error_type="warmup_failed",
                exception_type=type(error).__name__,
                message=f"start-up failed with {type(error).__name__}",
                at_ns=self._now_ns(),
            )
            if self._readiness.state is State.STARTING:
                self._readiness.state = State.FAILED
                self._readiness.reason = (
                    f"{type(error).__name__} while in phase {self._readiness.phase}"
                )
            self._tell(failure)
            if self._cache is not None:
                # Should what was restored be the reason, the next start must not meet it again.
                self._metrics.compile_cache(self._cache.discard().result)
            raise
        self._tell(None)
        self._keep_in_background()

    def end(self, work_left_behind: bool) -> None:
        """The process ends: tell the trace of a start that did not get to tell it itself, and give
        the model's memory back unless something still runs on it."""
        message = "the process was ended before it was warm"
        self._tell(Failure(Draining.error_type, Draining.__name__, message, self._now_ns()))
        if self._cache is not None:
            self._cache.close()
        if not work_left_behind:
            self.model = self.compiled = None

    # On the thread that owns the model

    async def _piece(self, work: Callable[[], T]) -> T:
        def piece() -> T:
            if self._readiness.state is State.DRAINING:
                raise asyncio.CancelledError
            self.busy = True
            try:
                return work()
            finally:
                self.busy = False

        return await asyncio.wrap_future(self._gpu.submit(piece))

    def _load(self) -> tuple[CompiledShape, ...]:
        """The model, prepared to run; returns the shapes to warm."""
        self._progress("load_model")
        started_ns = self._now_ns()
        from serve.model.sdxl import load_model

        settings, readiness = self._settings, self._readiness
        model = load_model(settings.model, settings.model_revision, settings.device, settings.dtype)
        self.model = model
        self.clock = self._make_clock(str(model.device))
        readiness.model, readiness.device = model.name, str(model.device)
        self._attributes |= {"model.name": model.name, "device": str(model.device)}
        model.fit_preview()
        self._end_phase("load_model", started_ns, dict(self._attributes))

        started_ns = self._now_ns()
        restored = self._restore(model)
        self.compiled = self._prepare(model)
        model.text = None if self.compiled is None else self.compiled.text
        self._say_how(restored)
        self._end_phase("prepare", started_ns, dict(readiness.compile))
        return settings.shapes or _default_shapes(model)

    def _restore(self, model: SdxlModel) -> CacheResult | None:
        """Compiled artifacts of an earlier start, before anything is compiled."""
        settings = self._settings
        if settings.cache_dir is None or not self._compiles(model):
            return None
        self._progress("restore")
        # Not the shapes: inductor finds each graph by what is in it, so that one archive may hold
        # whatever shapes were ever warm under the other settings.
        key = cache_key(
            str(model.device),
            {
                "model": settings.model or model.name,
                "revision": settings.model_revision or "",
                "dtype": str(model.dtype),
                "compile": self._mode(model),
                "attention": settings.attention,
                "quantize": settings.quantize,
            },
        )
        self._cache = CompileCache(settings.cache_dir, key)
        restored = self._cache.restore()
        self._metrics.compile_cache(restored.result)
        return restored

    def _mode(self, model: SdxlModel) -> Mode:
        from kernels_warmup.recipes import mode_for

        return mode_for(self._settings.compile, model.device)

    def _compiles(self, model: SdxlModel) -> bool:
        from kernels_warmup.recipes import RECIPES

        return RECIPES[self._mode(model)].scope != "none"

    def _prepare_as_set(self, model: SdxlModel) -> CompiledModel | None:
        settings, mode = self._settings, self._mode(model)
        if (mode, settings.attention, settings.quantize) == ("off", "auto", "none"):
            return None
        self._progress("prepare")
        from kernels_warmup import attention, quantize
        from kernels_warmup.compile import compile_model

        unusable = {
            f"SDXL_ATTENTION={settings.attention}": attention.why_unusable(
                settings.attention, model.device, model.dtype
            ),
            f"SDXL_QUANTIZE={settings.quantize}": quantize.why_unusable(
                settings.quantize, model.device, model.dtype
            ),
        }
        for setting, reason in unusable.items():
            if reason is not None:
                raise ModelError(f"{setting} cannot be used here: {reason}.")
        return compile_model(
            model.pipeline, mode, attention=settings.attention, quantize=settings.quantize
        )

    def _say_how(self, restored: CacheResult | None) -> None:
        how = self._readiness.compile
        how["mode"] = "off" if self.compiled is None else self.compiled.mode
        if self.compiled is not None:
            how["attention"] = self.compiled.attention
            quantized = self.compiled.quantized
            if quantized is not None:
                how["quantize"] = quantized.quantization
                how["quantized_layers"] = quantized.layers
                how["quantization_error"] = quantized.error
                logger.info(
                    "%s: %d layers quantised; one UNet forward differs by %.2g from before",
                    quantized.quantization,
                    quantized.layers,
                    quantized.error,
                )
        if restored is not None:
            how["cache"] = restored.result
            how["cache_bytes"] = restored.bytes

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Lifts the guard; requests may follow at once, and none of them may compile."""
        if self.compiled is not None:
            self.compiled.thaw()
        try:
            yield
        finally:
            if self.compiled is not None:
                self.compiled.freeze()

    def _warm(self, warmup: Warmup, shape: CompiledShape) -> None:
        with self._compiling():
            warmup.warm(shape)
        self._tell_warmup(warmup.report())

    def _verify(self, warmup: Warmup) -> None:
        with self._compiling():
            warmup.verify()
        report = warmup.report()
        self._tell_warmup(report)
        self._metrics.graph_breaks(report.compiled.graph_breaks)
        logger.info(
            "warm: %s on %s, shapes %s; %d graphs, %d of them from the cache, in %.1f s",
            self._readiness.model,
            self._readiness.device,
            ", ".join(str(shape) for shape in report.warm),
            report.compiled.graphs,
            report.compiled.cache_hits,
            math.fsum(phase.duration_ns for phase in report.phases) / 1e9,
        )

    def _count_flops(self, shape: CompiledShape) -> None:
        """What a run at this shape is worth: utilisation is a share of it.

        A piece like the others, because torch counts through hooks that every module of the process
        runs while it does.
        """
        assert self.model is not None
        self._progress(f"count_flops {shape}")
        started_ns = self._now_ns()
        try:
            from kernels_warmup.flops import count_run

            flops = count_run(self.model.pipeline, shape)
        except Exception as error:  # noqa: BLE001 - images are drawn without it
            logger.warning("the FLOPs at %s are not counted: %s", shape, type(error).__name__)
        else:
            self._metrics.set_flops(
                str(shape), RunFlops(flops.text_encode, flops.step, flops.vae_decode)
            )
            self._end_phase(f"count_flops {shape}", started_ns, {"shape": str(shape)})

    # Telling

    def _progress(self, phase: str) -> None:
        if self._readiness.state is State.STARTING:
            self._readiness.phase = phase
        self._on_progress(phase)

    def _now_ns(self) -> int:
        return self._anchor.to_unix(WallAnchor.now().monotonic_ns)

    def _end_phase(
        self, name: str, started_ns: int, attributes: dict[str, str | int | float | bool]
    ) -> None:
        self._phases.append(PhaseTiming(name, started_ns, self._now_ns(), attributes))
        self._tell_phases()

    def _tell_warmup(self, report: WarmupReport) -> None:
        before = [p for p in self._phases if p.name in ("load_model", "prepare")]
        self._phases = [*before, *report.phases]
        how = self._readiness.compile
        how["graphs"] = report.compiled.graphs
        how["graphs_from_cache"] = report.compiled.cache_hits
        self._readiness.left_out = {str(shape): error for shape, error in report.failed}
        self._tell_phases()

    def _tell_phases(self) -> None:
        for phase in self._phases:
            self._readiness.phases_ms[phase.name] = phase.duration_ns / 1e6
            kind = phase.name.split(" ")[0]
            self._metrics.set_warmup_phase(kind, _total_seconds(self._phases, kind))

    def _become_ready(self, warmup: Warmup) -> None:
        """Serve the shapes that are warm by now."""
        self._readiness.shapes = warmup.warm_shapes
        self._metrics.set_warm_shapes([str(shape) for shape in warmup.warm_shapes])
        self._metrics.set_budget(
            build_budget(self._settings, warmup.warm_shapes[0], self._readiness.device)
        )
        if self._readiness.state is State.STARTING:
            self._readiness.state = State.READY
            self._readiness.phase = "ready"
            self._metrics.set_ready(True)
            self._on_ready()

    def _tell(self, failure: Failure | None) -> None:
        """The start's trace, once: at its own end, or at the process's when that comes first."""
        with self._telling:
            told, self._told = self._told, True
        if not told:
            timing = WarmupTiming(
                self._anchor.unix_ns, self._now_ns(), tuple(self._phases), failure
            )
            self._recorder.record_warmup(timing, self._attributes)

    def _keep_in_background(self) -> None:
        """Archive what was compiled. On a daemon thread: it takes seconds, nobody waits for it, and
        a start that is cut off leaves the last archive as it was."""
        cache = self._cache
        if cache is None or self._readiness.left_out:
            return  # what a failed compile left behind is not worth keeping

        def keep() -> None:
            stored = cache.store()
            self._metrics.compile_cache(stored.result)
            self._readiness.compile["cache_store"] = stored.result

        threading.Thread(target=keep, name="compile-cache", daemon=True).start()


def _default_shapes(model: SdxlModel) -> tuple[CompiledShape, ...]:
    """The demo is warm in a second at all its sizes; a full-size model compiles one for minutes."""
    return model.trained_shapes if model.name == "demo" else model.trained_shapes[:1]


def _total_seconds(phases: Sequence[PhaseTiming], kind: str) -> float:
    return math.fsum(p.duration_ns / 1e9 for p in phases if p.name.split(" ")[0] == kind)
