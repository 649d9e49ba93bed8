"""From an empty process to a warm model: load, restore, prepare, warm each shape, verify.

`Startup.load` returns a `LoadedModel`; nothing else of the start is read by anyone, except through
`Readiness`. What a request does is in `runtime.py`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from kernels_warmup.cache.compile_cache import CacheResult, CompileCache
from kernels_warmup.cache.key import cache_key
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import (
    FROM_PICTURE,
    GUIDED,
    GUIDED_BY_NOTHING,
    UNGUIDED,
    RunKind,
    RunOnce,
    Warmup,
    WarmupReport,
)
from metrics.catalogue import GenerationMetrics, RunFlops
from metrics.clock import WallAnchor, make_clock
from metrics.recorder import Recorder
from metrics.records import Failure, PhaseTiming, WarmupTiming
from serve.engine.gpu_thread import GpuThread
from serve.engine.loaded_model import LoadedModel
from serve.engine.planning import serves_guidance
from serve.engine.readiness import Readiness, State
from serve.errors import Draining, ModelError, RequestError
from serve.settings import ServeSettings
from serve.telemetry.setup import build_budget

if TYPE_CHECKING:
    from kernels_warmup.compile import CompiledModel
    from kernels_warmup.recipes import Mode
    from serve.model.loras.files import Lora
    from serve.model.loras.in_place import LorasInPlace
    from serve.model.sdxl import SdxlModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

Prepare = Callable[["SdxlModel"], "CompiledModel | None"]
"""Makes a loaded model fast, in place, on the GPU thread; None: it runs as it was loaded."""


class Startup:
    """One process's start: `load`, then `warm`. Progress is written to `readiness`; at the end one
    trace of the start is recorded.

    Every piece of work is one turn of the GPU thread, so that requests can be served between two
    pieces with `SDXL_READY_EARLY`.

    Args:
        prepare: makes the loaded model fast; None: as the settings say.
        kinds: the kinds of run that each shape is warmed with; None: every kind that is served.
        own_process: the process serves this model until it ends.
    """

    def __init__(
        self,
        settings: ServeSettings,
        readiness: Readiness,
        metrics: GenerationMetrics,
        recorder: Recorder,
        gpu: GpuThread,
        prepare: Prepare | None = None,
        kinds: Sequence[RunKind] | None = None,
        own_process: bool = False,
    ) -> None:
        self._settings = settings
        self._readiness = readiness
        self._metrics = metrics
        self._recorder = recorder
        self._gpu = gpu
        self._prepare = prepare or self._prepare_as_set
        self._kinds = kinds
        self._own_process = own_process
        self._on_progress: Callable[[str], None] = lambda _: None
        self._anchor = WallAnchor.now()
        self._phases: list[PhaseTiming] = []
        self._open_phase: tuple[str, int] | None = None
        """The phase in progress, and its start."""
        self._attributes: dict[str, str | int | float | bool] = {}
        self._recorded = True  # there is nothing to record before `load`
        self._recording = threading.Lock()
        self._cache: CompileCache | None = None

    async def load(self, on_progress: Callable[[str], None]) -> LoadedModel:
        """Load the model, restore compiled artifacts and prepare the model to run.

        Raises:
            ModelError: the model cannot be loaded, or not prepared as the settings ask.
        """
        self._anchor, self._recorded = WallAnchor.now(), False
        self._on_progress = on_progress
        with self._failure_recorded():
            return await self._on_gpu_thread(self._load)

    async def warm(
        self, loaded: LoadedModel, run_once: RunOnce, on_ready: Callable[[], None]
    ) -> None:
        """Warm every shape, verify that nothing is left to compile, and count the FLOPs.

        Args:
            run_once: runs the production path once at a shape, on the GPU thread.
            on_ready: called on the event loop when the first request may come: at the end, or with
                `SDXL_READY_EARLY` after the first shape.
        """
        with self._failure_recorded():
            warmup = Warmup(run_once, loaded.kinds, self._progress, self._anchor)
            for shape in loaded.shapes:
                await self._on_gpu_thread(partial(self._warm, loaded, warmup, shape))
                if self._settings.ready_early and warmup.warm_shapes:
                    self._become_ready(loaded, warmup, on_ready)
            await self._on_gpu_thread(partial(self._verify, loaded, warmup))
            for shape in warmup.warm_shapes:
                await self._on_gpu_thread(partial(self._count_flops, loaded, shape))
            self._become_ready(loaded, warmup, on_ready)
        self._record(None)
        self._keep_in_background()

    def close(self) -> None:
        """The process ends. A start that was cut off is recorded now."""
        message = "the process was ended before it was warm"
        self._record(Failure(Draining.error_type, Draining.__name__, message, self._now_ns()))
        if self._cache is not None:
            self._cache.close()

    @contextmanager
    def _failure_recorded(self) -> Iterator[None]:
        """Record a failed start. A cancelled one is left to `close`."""
        try:
            yield
        except Exception as error:
            failure = Failure(
                error_type="warmup_failed",
                exception_type=type(error).__name__,
                message=f"start-up failed with {type(error).__name__}",
                at_ns=self._now_ns(),
            )
            readiness = self._readiness
            if readiness.state is State.STARTING:
                readiness.state = State.FAILED
                readiness.reason = f"{type(error).__name__} while in phase {readiness.phase}"
            self._record(failure)
            if self._cache is not None:
                # The restored artifacts may be the reason; the next start must not load them.
                self._metrics.compile_cache(self._cache.discard().result)
            raise

    # On the GPU thread

    async def _on_gpu_thread(self, work: Callable[[], T]) -> T:
        def piece() -> T:
            if self._readiness.state is State.DRAINING:
                raise asyncio.CancelledError
            return work()

        # Compiling shows no sign of life for minutes.
        return await asyncio.wrap_future(self._gpu.submit(piece, may_be_silent=True))

    def _load(self) -> LoadedModel:
        readiness = self._readiness
        self._progress("load_model")
        self._begin_phase("load_model")
        model = self._load_model()
        loras = self._read_loras(model)
        self._end_phase(dict(self._attributes))

        self._begin_phase("prepare")
        restored = self._restore(model)
        compiled = self._prepare(model)
        model.text = None if compiled is None else compiled.text
        in_place = self._put_in_place(loras, model)
        self._report_preparation(compiled, restored)
        self._end_phase(dict(readiness.compile))

        kinds, sizes = self._runs_to_warm(model, compiled)
        readiness.planned_shapes = self._settings.shapes or _default_shapes(model)
        return LoadedModel(
            model,
            make_clock(str(model.device)),
            compiled,
            shapes=readiness.planned_shapes,
            kinds=kinds,
            batch_sizes=sizes,
            loras=in_place,
        )

    def _load_model(self) -> SdxlModel:
        """Load the model and what is checked or configured with it, and report which it is."""
        from serve.model.loading import load_model
        from serve.model.prompt_tokens import PromptRules
        from serve.model.safety_checker import load_safety_checker
        from serve.model.schedulers import Schedule

        settings, readiness = self._settings, self._readiness
        model = load_model(
            settings.model,
            settings.model_revision,
            settings.device,
            settings.dtype,
            Schedule(settings.scheduler, settings.timesteps),
        )
        model.prompt_rules = PromptRules(
            settings.prompt_chunks, weighted=settings.prompt_syntax == "weighted"
        )
        if settings.safety_checker is not None:
            model.safety_checker = load_safety_checker(settings.safety_checker, model.device)
        readiness.model, readiness.device = model.name, str(model.device)
        self._attributes |= {"model.name": model.name, "device": str(model.device)}
        if model.commit is not None:
            readiness.model_commit = self._attributes["model.commit"] = model.commit
        self._check_scheduler(model)
        model.fit_preview()
        return model

    def _check_scheduler(self, model: SdxlModel) -> None:
        from serve.model.schedulers import describe, misfit

        scheduler = model.pipeline.scheduler
        self._readiness.scheduler = describe(scheduler)
        wrong = misfit(model.name, scheduler, self._settings)
        if wrong is not None:
            self._readiness.scheduler["wrong"] = wrong
            logger.warning("pictures may be bad: %s", wrong)

    def _read_loras(self, model: SdxlModel) -> list[Lora]:
        """Read the LoRAs that requests may use, and check that they fit the model."""
        if not self._settings.loras:
            return []
        self._progress("load_loras")
        from serve.model.loras.files import read_lora
        from serve.model.loras.naming import Names
        from serve.model.loras.sources import find_file

        names = Names(model.pipeline)
        return [
            read_lora(each.name, find_file(each.name, each.source), model.pipeline, names)
            for each in self._settings.loras
        ]

    def _put_in_place(self, loras: list[Lora], model: SdxlModel) -> LorasInPlace | None:
        """After the rewrites, which decide where a weight is read, and before any graph."""
        if not loras:
            return None
        from serve.model.loras.in_place import LorasInPlace

        in_place = LorasInPlace(loras, model.pipeline)
        self._readiness.loras = in_place.names
        self._readiness.lora_bytes = in_place.bytes_kept
        return in_place

    def _runs_to_warm(
        self, model: SdxlModel, compiled: CompiledModel | None
    ) -> tuple[tuple[RunKind, ...], tuple[int, ...]]:
        """The kinds of run that each shape is warmed with, and the numbers of images that a run may
        have."""
        if self._kinds is not None:
            return tuple(self._kinds), tuple(sorted({kind.images for kind in self._kinds}))
        has_graphs = compiled is not None and compiled.has_graphs
        sizes = self._batch_sizes(model, has_graphs)
        kinds = self._kinds_to_warm(compiled)
        if has_graphs:
            # One chunk last: an estimate begins with the last runs of the warm-up, and most prompts
            # have one chunk.
            chunks = range(self._settings.prompt_chunks, 0, -1)
            kinds = [
                replace(kind, images=size, chunks=count)
                for size in sizes
                for count in chunks
                for kind in kinds
            ]
        return (*kinds, FROM_PICTURE), sizes

    def _batch_sizes(self, model: SdxlModel, has_graphs: bool) -> tuple[int, ...]:
        """The numbers of images that a run may have. Each costs graphs of its own, where there are
        graphs; elsewhere the same code runs any number."""
        largest = self._settings.max_batch or _default_max_batch(model, has_graphs)
        if not has_graphs:
            return tuple(range(1, largest + 1))
        powers = [2**exponent for exponent in range(largest.bit_length())]
        return tuple(dict.fromkeys((*powers, largest)))

    def _kinds_to_warm(self, compiled: CompiledModel | None) -> Sequence[RunKind]:
        """The kinds of run with one image."""
        if not serves_guidance(self._settings):
            return (UNGUIDED,)
        recipe = None if compiled is None else compiled.recipe
        if recipe is not None and recipe.zero_text and recipe.has_graphs:
            # Runs with an empty negative prompt have a graph of their own.
            return (GUIDED, GUIDED_BY_NOTHING, UNGUIDED)
        return (GUIDED, UNGUIDED)

    def _restore(self, model: SdxlModel) -> CacheResult | None:
        """Restore compiled artifacts of an earlier start, before anything is compiled."""
        settings = self._settings
        if settings.cache_dir is None or not self._compiles(model):
            return None
        self._progress("restore")
        # The shapes are not part of the key: inductor finds a graph by its contents, so one archive
        # can hold all shapes that were ever warm under these settings.
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

    def _report_preparation(
        self, compiled: CompiledModel | None, restored: CacheResult | None
    ) -> None:
        report = self._readiness.compile
        report["mode"] = "off" if compiled is None else compiled.mode
        if compiled is not None:
            report["attention"] = compiled.attention
            quantized = compiled.quantized
            if quantized is not None:
                report["quantize"] = quantized.quantization
                report["quantized_layers"] = quantized.layers
                report["quantization_error"] = quantized.error
                logger.info(
                    "%s: %d layers quantised; relative error of one UNet forward %.2g",
                    quantized.quantization,
                    quantized.layers,
                    quantized.error,
                )
        if restored is not None:
            report["cache"] = restored.result
            report["cache_bytes"] = restored.bytes

    def _warm(self, loaded: LoadedModel, warmup: Warmup, shape: CompiledShape) -> None:
        self._begin_phase(f"compile {shape}")
        with loaded.compiling_allowed():
            warmup.warm(shape)
        self._add_batch_sizes(loaded, warmup)
        self._report_warmup(warmup.report())

    def _add_batch_sizes(self, loaded: LoadedModel, warmup: Warmup) -> None:
        """Give the shapes that became warm their batch sizes.

        A shape that has some keeps them: the runtime may have taken those away that ran out of
        memory. It does so on the GPU thread too, so neither loses what the other writes.
        """
        known = self._readiness.batch_sizes
        added = {
            shape: warmup.warm_sizes(shape) if loaded.has_graphs else loaded.batch_sizes
            for shape in warmup.warm_shapes
            if shape not in known
        }
        self._readiness.batch_sizes = {**known, **added}

    def _verify(self, loaded: LoadedModel, warmup: Warmup) -> None:
        self._begin_phase("verify")
        try:
            with loaded.compiling_allowed():
                warmup.verify()
        except RequestError as error:
            # Its type says what was wrong; the run has logged whatever was behind it.
            raise ModelError(f"the model cannot draw at any size: {error.message}") from error
        report = warmup.report()
        self._report_warmup(report)
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

    def _count_flops(self, loaded: LoadedModel, shape: CompiledShape) -> None:
        """Count the FLOPs of a run at this shape; utilisation is a share of them.

        On the GPU thread, because torch counts through hooks that every module of the process runs
        meanwhile.
        """
        self._progress(f"count_flops {shape}")
        self._begin_phase(f"count_flops {shape}")
        try:
            from kernels_warmup.flops import count_encode, count_run

            pipeline = loaded.model.pipeline
            flops = count_run(pipeline, shape)
            vae_encode = count_encode(pipeline.vae.config, shape)
        except Exception as error:  # noqa: BLE001 - images are generated without it
            logger.warning("the FLOPs at %s are not counted: %s", shape, type(error).__name__)
            self._open_phase = None
        else:
            # A scheduler of second order evaluates the UNet twice a step, and once in the last: a
            # small part of a run, which is not subtracted.
            step = flops.step * pipeline.scheduler.order
            self._metrics.set_flops(
                str(shape), RunFlops(flops.text_encode, step, flops.vae_decode, vae_encode)
            )
            self._end_phase({"shape": str(shape)})

    # Reporting

    def _progress(self, phase: str) -> None:
        if self._readiness.state is State.STARTING:
            self._readiness.phase = phase
        self._on_progress(phase)

    def _now_ns(self) -> int:
        return self._anchor.to_unix(WallAnchor.now().monotonic_ns)

    def _begin_phase(self, name: str) -> None:
        self._open_phase = name, self._now_ns()

    def _end_phase(self, attributes: dict[str, str | int | float | bool]) -> None:
        assert self._open_phase is not None
        name, started_ns = self._open_phase
        self._phases.append(PhaseTiming(name, started_ns, self._now_ns(), attributes))
        self._open_phase = None
        self._report_phases()

    def _report_warmup(self, report: WarmupReport) -> None:
        before = [p for p in self._phases if p.name in ("load_model", "prepare", "collect_garbage")]
        self._phases = [*before, *report.phases]
        self._open_phase = None
        compile_report = self._readiness.compile
        compile_report["graphs"] = report.compiled.graphs
        compile_report["graphs_from_cache"] = report.compiled.cache_hits
        self._readiness.left_out = {str(shape): error for shape, error in report.failed}
        self._report_phases()

    def _report_phases(self) -> None:
        for phase in self._phases:
            self._readiness.phases_ms[phase.name] = phase.duration_ns / 1e6
            kind = phase.name.split(" ")[0]
            self._metrics.set_warmup_phase(kind, _total_seconds(self._phases, kind))

    def _become_ready(
        self, loaded: LoadedModel, warmup: Warmup, on_ready: Callable[[], None]
    ) -> None:
        """Serve the shapes that are warm by now."""
        if self._own_process and self._readiness.state is State.STARTING:
            self._leave_out_of_collections()
        shapes = self._readiness.shapes = warmup.warm_shapes
        largest = loaded.batch_sizes[-1]
        self._metrics.set_warm_shapes([str(shape) for shape in shapes], max_batch=largest)
        self._metrics.set_budget(build_budget(self._settings, shapes[0], self._readiness.device))
        if self._readiness.state is State.STARTING:
            self._readiness.state = State.READY
            self._readiness.phase = "ready"
            self._metrics.set_ready(True)
            on_ready()

    def _leave_out_of_collections(self) -> None:
        """Keep Python's garbage collector from walking what the start built, half a million objects
        that stay until the process ends.

        A full collection of them stops every thread for 0.2 s, and they come at any time: in
        requests, and several at the interpreter's end. Once, before the first request: what later
        shapes of `SDXL_READY_EARLY` add is left to the collector.
        """
        self._begin_phase("collect_garbage")
        gc.collect()  # what is frozen is never collected
        gc.freeze()
        self._end_phase({"objects": gc.get_freeze_count()})

    def _record(self, failure: Failure | None) -> None:
        """Record the start's trace once: at the end of the start, or of the process if that comes
        first."""
        with self._recording:
            recorded, self._recorded = self._recorded, True
        if not recorded:
            phases = list(self._phases)
            if failure is not None and (in_progress := self._open_phase) is not None:
                phases.append(PhaseTiming(*in_progress, self._now_ns()))
            timing = WarmupTiming(self._anchor.unix_ns, self._now_ns(), tuple(phases), failure)
            self._recorder.record_warmup(timing, self._attributes)

    def _keep_in_background(self) -> None:
        """Archive the compiled artifacts.

        On a daemon thread: it takes seconds and nothing waits for it. A process that ends meanwhile
        leaves the previous archive as it was.
        """
        cache = self._cache
        if cache is None or self._readiness.left_out:
            return  # a failed compile may have left broken artifacts

        def keep() -> None:
            stored = cache.store()
            self._metrics.compile_cache(stored.result)
            self._readiness.compile["cache_store"] = stored.result

        threading.Thread(target=keep, name="compile-cache", daemon=True).start()


def _default_shapes(model: SdxlModel) -> tuple[CompiledShape, ...]:
    """All of the demo's shapes, which take a second; of a full-size model the first, which takes
    minutes to compile."""
    return model.trained_shapes if model.name == "demo" else model.trained_shapes[:1]


def _default_max_batch(model: SdxlModel, has_graphs: bool) -> int:
    """Of the demo model on a CPU a run of eight images takes as long as three runs of one. On a GPU
    batches wait for their measurement."""
    return 8 if model.name == "demo" and model.device.type == "cpu" and not has_graphs else 1


def _total_seconds(phases: Sequence[PhaseTiming], kind: str) -> float:
    return math.fsum(p.duration_ns / 1e9 for p in phases if p.name.split(" ")[0] == kind)
