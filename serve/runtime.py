"""One process's service: built from the settings, started once, then the story of each request.

`Runtime.generate` reads top to bottom like a request: checked, admitted, queued, run on the thread
that owns the model, encoded, uploaded. Everything on an event loop here is bookkeeping; work that
takes milliseconds happens on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import platform
import secrets
import threading
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry

from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import WarmupReport, warm_up
from metrics.catalogue import GenerationMetrics
from metrics.clock import Clock, WallAnchor, make_clock
from metrics.gpu import Gpu, GpuWatch
from metrics.recorder import Recorder
from metrics.timeline import (
    Failure,
    GenerationFacts,
    PhaseTiming,
    RunTimeline,
    WarmupTiming,
)
from metrics.tracing import Tracing
from serve.admission import Admission
from serve.call import Call
from serve.errors import (
    ERROR_TYPES,
    OUTCOMES,
    ClientGone,
    DeadlineExceeded,
    DeviceLost,
    Draining,
    FieldProblem,
    GenerationFailed,
    InvalidRequest,
    NonFiniteOutput,
    NotReady,
    OutOfMemory,
    RequestError,
)
from serve.gpu_thread import GpuThread, StepPacer
from serve.images import CONTENT_TYPES, Upload, data_uri, encode_image
from serve.schema import (
    MAX_SEED,
    GeneratedImage,
    TextToImageRequest,
    TextToImageResponse,
    Timings,
)
from serve.settings import ServeSettings
from serve.telemetry import build_tracing

if TYPE_CHECKING:
    from kernels_warmup.compile import CompiledModel
    from serve.model import SdxlModel

logger = logging.getLogger(__name__)

ENDPOINTS = ("/", "/stream")
"""The endpoints that generate: traced, counted, and the values of the `endpoint` label."""

WARMUP_STEPS = 2
SILENCE_LIMIT_SECONDS = 120.0
"""A run that shows no sign of life for this long has hung: even the slowest step and decode that
this service is meant for (a full-size model on a CPU) stay well below it."""

Prepare = Callable[["SdxlModel"], "CompiledModel | None"]
"""Makes a loaded model fast, in place, on the thread that owns it; None: as it was loaded."""

OnStep = Callable[[int, float, Any], None]
"""Told `(index, gpu_ms, preview pixels or None)` of a step that has ended; on the GPU thread."""


class State(StrEnum):
    """Where the process is in its life."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Plan:
    """A valid request with everything decided that it left open."""

    request: TextToImageRequest
    shape: CompiledShape
    seed: int
    run_id: str


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

    def as_json(self) -> dict[str, Any]:
        return {
            "state": self.state.value,
            "phase": self.phase,
            "reason": self.reason,
            "model": self.model,
            "device": self.device,
            "shapes": [str(shape) for shape in self.shapes],
            "warmup_ms": self.phases_ms,
        }


@dataclass(frozen=True, slots=True)
class _Start:
    """A start-up under way: what its trace will tell."""

    anchor: WallAnchor
    phases: list[PhaseTiming] = field(default_factory=list)
    attributes: dict[str, str | int | float | bool] = field(default_factory=dict)


class Runtime:
    """The model's thread, admission and telemetry of one process.

    Made by `build_runtime`; `start` loads and warms, `generate` serves, `close` ends.
    """

    def __init__(
        self,
        settings: ServeSettings,
        tracing: Tracing,
        metrics: GenerationMetrics,
        recorder: Recorder,
        upload: Upload,
        make_run_clock: Callable[[str], Clock] = make_clock,
        prepare: Prepare | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        self.settings = settings
        self.tracing = tracing
        self.metrics = metrics
        self.recorder = recorder
        self.readiness = Readiness()
        self.admission = Admission(settings.max_waiting, metrics.set_waiting)
        self._gpu = GpuThread()
        self._upload = upload
        self._make_run_clock = make_run_clock
        self._prepare = prepare or self._compile
        self._watch = GpuWatch(gpu)
        self._device_lost = False
        self.work_left_behind = False
        self.ready = asyncio.Event()
        self._start: _Start | None = None
        self._start_lock = threading.Lock()
        # Set by `_load_and_warm`, on the thread that owns the model.
        self._model: SdxlModel | None = None
        self._clock: Clock | None = None

    # Starting

    async def start(self, on_progress: Callable[[str], None] = lambda _: None) -> None:
        """Load the model and warm every shape; returns when ready.

        Raises:
            ModelError: the model cannot be loaded.
        """

        def progress(phase: str) -> None:
            self.readiness.phase = phase
            on_progress(phase)

        try:
            await asyncio.wrap_future(self._gpu.submit(lambda: self._load_and_warm(progress)))
        except Exception as error:
            self.readiness.state = State.FAILED
            self.readiness.reason = f"{type(error).__name__} while in phase {self.readiness.phase}"
            raise
        if self.readiness.state is State.STARTING:
            self.readiness.state = State.READY
            self.readiness.phase = "ready"
            self.metrics.set_ready(True)
            self.ready.set()

    def _load_and_warm(self, on_progress: Callable[[str], None]) -> None:
        start = self._start = _Start(WallAnchor.now())
        anchor, phases, attributes = start.anchor, start.phases, start.attributes
        failure: Failure | None = None
        try:
            on_progress("load_model")
            model = self._load_model()
            attributes.update({"model.name": model.name, "device": str(model.device)})
            loaded = WallAnchor.now()
            phases.append(
                PhaseTiming(
                    "load_model", anchor.unix_ns, anchor.to_unix(loaded.monotonic_ns), attributes
                )
            )
            report = self._warm(model, on_progress)
            phases += report.phases
            self._became_warm(model, report)
        except Exception as error:
            failure = Failure(
                error_type="warmup_failed",
                exception_type=type(error).__name__,
                message=f"start-up failed with {type(error).__name__}",
                at_ns=anchor.to_unix(WallAnchor.now().monotonic_ns),
            )
            raise
        finally:
            self._record_start(failure)
            for phase in phases:
                self.readiness.phases_ms[phase.name] = phase.duration_ns / 1e6
                self.metrics.set_warmup_phase(
                    phase.name.split(" ")[0], _total_seconds(phases, phase.name.split(" ")[0])
                )

    def _record_start(self, failure: Failure | None) -> None:
        """Tell the start-up's trace, once: its end, or the process's end when that comes first."""
        with self._start_lock:
            start, self._start = self._start, None
        if start is not None:
            end_ns = start.anchor.to_unix(WallAnchor.now().monotonic_ns)
            timing = WarmupTiming(start.anchor.unix_ns, end_ns, tuple(start.phases), failure)
            self.recorder.record_warmup(timing, start.attributes)

    def _load_model(self) -> SdxlModel:
        from serve.model import load_model

        settings = self.settings
        model = load_model(settings.model, settings.model_revision, settings.device, settings.dtype)
        self._model = model
        self._clock = self._make_run_clock(str(model.device))
        self.readiness.model = model.name
        self.readiness.device = str(model.device)
        return model

    def _warm(self, model: SdxlModel, on_progress: Callable[[str], None]) -> WarmupReport:
        model.fit_preview()
        compiled = self._prepare(model)
        shapes = self.settings.shapes or _default_shapes(model)

        def run_once(shape: CompiledShape, guided: bool) -> None:
            request = TextToImageRequest(
                prompt="warm-up",
                num_inference_steps=WARMUP_STEPS,
                guidance_scale=5.0 if guided else 1.0,
            )
            plan = Plan(request, shape, seed=0, run_id=uuid.uuid4().hex)
            self._run(plan, self._throwaway_call(), None)
            self._gpu.sign_of_life()

        report = warm_up(run_once, shapes, on_progress)
        if compiled is not None:
            compiled.freeze()
        return report

    def _compile(self, model: SdxlModel) -> CompiledModel | None:
        mode = self.settings.compile
        if mode == "auto":
            mode = "default" if model.device.type == "cuda" else "off"
        if mode == "off":
            return None
        from kernels_warmup.compile import compile_model

        return compile_model(model.pipeline, mode=mode)

    def _throwaway_call(self) -> Call:
        """What a warm-up run is accounted to; it is never recorded."""
        return Call("/", "POST", self.tracing.identify())

    def _became_warm(self, model: SdxlModel, report: WarmupReport) -> None:
        self.readiness.shapes = report.warm
        self.metrics.set_warm_shapes([str(shape) for shape in report.warm])
        logger.info(
            "warm: %s on %s, shapes %s, %d graphs",
            model.name,
            model.device,
            ", ".join(str(shape) for shape in report.warm),
            report.graphs,
        )

    # Serving

    async def generate(
        self,
        request: TextToImageRequest,
        call: Call,
        on_queued: Callable[[int], None] = lambda _: None,
        on_step: OnStep | None = None,
    ) -> TextToImageResponse:
        """One request, from validated to answered.

        Args:
            on_queued: told how many requests wait, once this one is admitted.
            on_step: told of each step that has ended, on the GPU thread; previews are drawn only
                where somebody is told.

        Raises:
            RequestError: a row of the failure table.
        """
        plan = self._plan(request, call)
        with self._deadline(request, call), self.admission.admit(call.cancellation):
            on_queued(self.admission.waiting)
            call.timeline.begin("queue")
            pixels, truncated = await self._run_on_gpu(plan, call, on_step)

        with call.stage("image_encode"):
            data = await asyncio.to_thread(encode_image, pixels, request.format)
        with call.stage("upload"):
            url = await self._put(data, plan)

        return self._response(plan, call, url, truncated)

    def _plan(self, request: TextToImageRequest, call: Call) -> Plan:
        """Decide the size and the seed. Raises unless this process is ready for the request."""
        readiness = self.readiness
        if readiness.state is State.STARTING:
            raise NotReady(f"The model is not warm yet ({readiness.phase}).")
        if readiness.state is State.DRAINING:
            raise Draining
        if readiness.state is State.FAILED:
            raise NotReady(f"The model could not be started: {readiness.reason}.")
        if not self.healthy:
            raise DeviceLost  # behind a run that has hung, nobody's turn comes
        shape = self._shape(request)
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        call.facts = GenerationFacts(
            model_name=readiness.model,
            prompt_length=len(request.prompt),
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            width=shape.width,
            height=shape.height,
            seed=seed,
            prompt=request.prompt if self.settings.trace_prompts else None,
        )
        return Plan(request, shape, seed, run_id=uuid.uuid4().hex)

    def _shape(self, request: TextToImageRequest) -> CompiledShape:
        default = self.readiness.shapes[0]
        width = default.width if request.width is None else request.width
        height = default.height if request.height is None else request.height
        for shape in self.readiness.shapes:
            if (shape.width, shape.height) == (width, height):
                return shape
        allowed = ", ".join(str(shape) for shape in self.readiness.shapes)
        field_name = "width" if request.width is not None else "height"
        raise InvalidRequest(
            [FieldProblem(("body", field_name), f"the size must be one of {allowed}", "shape")]
        )

    @contextlib.contextmanager
    def _deadline(self, request: TextToImageRequest, call: Call) -> Any:
        """Call the request off when its deadline, counted from its arrival, has passed."""
        seconds = self.settings.deadline_seconds
        if request.deadline_seconds is not None:
            seconds = min(seconds, request.deadline_seconds)
        timer = asyncio.get_running_loop().call_later(
            max(0.0, seconds - call.timeline.elapsed_seconds()),
            call.cancellation.cancel,
            DeadlineExceeded(seconds),
        )
        try:
            yield
        finally:
            timer.cancel()

    async def _run_on_gpu(self, plan: Plan, call: Call, on_step: OnStep | None) -> tuple[Any, bool]:
        """Queue the run and wait for its pixels; a cancelled request that still waits leaves."""
        future = self._gpu.submit(lambda: self._run(plan, call, on_step))
        call.cancellation.when_cancelled(future.cancel)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if call.cancellation.reason is None:
                # Not the request but its task was cancelled: nobody waits for the run any more.
                draining = self.readiness.state is State.DRAINING
                call.cancellation.cancel(Draining() if draining else ClientGone())
                raise
            call.fail(call.cancellation.reason)
            call.cancellation.raise_if_cancelled()
            raise
        finally:
            if call.run is not None:
                self.admission.run_took(call.run.duration_ns / 1e9)

    async def _put(self, data: bytes, plan: Plan) -> str:
        try:
            return await asyncio.to_thread(self._upload, data, plan.request.format)
        except Exception as error:  # noqa: BLE001 - any storage's client may raise anything
            # A storage outage must not cost an image that is already drawn.
            logger.warning("upload failed with %s; answering inline", type(error).__name__)
            self.metrics.upload_fell_back()
            return data_uri(data, plan.request.format)

    def _response(self, plan: Plan, call: Call, url: str, truncated: bool) -> TextToImageResponse:
        run = call.run
        assert run is not None  # a run that gave pixels has a timing
        if truncated:
            self.metrics.prompt_truncated()

        def run_ms(name: str) -> float | None:
            stage = run.stage(name)
            return None if stage is None else stage.duration_ns / 1e6

        return TextToImageResponse(
            image=GeneratedImage(
                url=url,
                width=plan.shape.width,
                height=plan.shape.height,
                content_type=CONTENT_TYPES[plan.request.format],
            ),
            seed=plan.seed,
            timings=Timings(
                receive_ms=call.timeline.stage_ms("receive"),
                queue_ms=call.timeline.stage_ms("queue"),
                text_encode_ms=run_ms("text_encode"),
                denoise_ms=run_ms("denoise"),
                steps_ms=[step.duration_ns / 1e6 for step in run.steps],
                vae_decode_ms=run_ms("vae_decode"),
                image_encode_ms=call.timeline.stage_ms("image_encode"),
                upload_ms=call.timeline.stage_ms("upload"),
                clock=run.clock,
            ),
            trace_id=call.identity.trace_id_hex,
            prompt_truncated=truncated,
        )

    # On the thread that owns the model

    def _run(self, plan: Plan, call: Call, on_step: OnStep | None) -> tuple[Any, bool]:
        """One run; returns (height, width, 3) uint8 pixels and whether the prompt was cut."""
        call.timeline.end()  # waiting is over
        call.cancellation.work_started = True
        model, clock = self._model, self._clock
        assert model is not None
        assert clock is not None
        request = plan.request
        previews = _Previews(model, wanted=request.preview and on_step is not None)
        timeline: RunTimeline | None = None
        self._watch.begin()

        def on_step_ended(index: int, duration_ns: int) -> None:
            if on_step is not None:
                on_step(index, duration_ns / 1e6, previews.take(index))

        def on_step_enqueued(index: int, latents: Any) -> None:
            previews.enqueue(index, latents)
            pacer.step_enqueued()

        try:
            call.cancellation.raise_if_cancelled()
            timeline = RunTimeline(
                clock,
                call.timeline.anchor,
                run_id=plan.run_id,
                shape=str(plan.shape),
                guidance=request.guided,
            )
            pacer = StepPacer(timeline, call.cancellation, on_step_ended, self._gpu.sign_of_life)
            with timeline.stage("text_encode"):
                conditioning = model.encode_prompt(
                    request.prompt, request.negative_prompt, request.guided
                )
            self._watch.look()  # the GPU has the text to encode
            with timeline.stage("denoise"):
                latents = model.denoise(
                    conditioning,
                    shape=plan.shape,
                    num_inference_steps=request.num_inference_steps,
                    guidance_scale=request.guidance_scale,
                    seed=plan.seed,
                    on_loop_begins=timeline.loop_begins,
                    on_step_enqueued=on_step_enqueued,
                    watch_latents=previews.wanted,
                )
            with timeline.stage("vae_decode"):
                image = model.decode(latents)
            self._watch.look()  # all is enqueued, and the GPU as busy as it gets
            pacer.drain()
            # Waits for the copy to the host.
            call.run = timeline.finish(conditions=self._watch.seen())
            if not bool(image.finite):
                raise NonFiniteOutput
            call.cancellation.raise_if_cancelled()
            return image.pixels.numpy(), conditioning.truncated
        except Exception as error:
            failure = self._explain(error)
            if timeline is not None and call.run is None:
                call.run = timeline.finish(failed=True, conditions=self._watch.seen())
            # The stage that ended last is the one that failed.
            last = call.run.stages[-1].end_ns if call.run is not None and call.run.stages else None
            call.fail(failure, at_ns=last)
            if failure is error:
                raise
            raise failure from None

    def _explain(self, error: Exception) -> RequestError:
        """The row of the failure table that an exception of a run is.

        The exception's own text stays out of it and of the log: a tokenizer's or a library's
        message may quote the prompt.
        """
        if isinstance(error, RequestError):
            return error
        import torch

        logger.error(
            "a run failed with %s\n%s",
            type(error).__name__,
            "".join(traceback.format_tb(error.__traceback__)),
        )
        assert self._model is not None
        if self._model.device.type == "cuda":
            try:
                torch.cuda.synchronize(self._model.device)
            except RuntimeError:
                # The context is gone for good: every later call on it fails the same way.
                self._device_lost = True
                lost = DeviceLost()
                lost.cause_type = type(error).__name__
                return lost
        failure: RequestError = GenerationFailed(type(error).__name__)
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            # What the ended frames hold would otherwise stay allocated, and the cache with it.
            traceback.clear_frames(error.__traceback__)
            torch.cuda.empty_cache()
            failure = OutOfMemory()
        failure.cause_type = type(error).__name__
        return failure

    # Ending

    @property
    def failed(self) -> bool:
        """Whether the start has failed or the device was lost."""
        return self._device_lost or bool(self.readiness.reason)

    @property
    def healthy(self) -> bool:
        """False once the device is lost, the start has failed or a run has hung."""
        if self._device_lost or self.readiness.state is State.FAILED:
            return False
        if self.readiness.state is State.STARTING:
            return True  # compiling is silent for minutes; the platform's start-up limit rules
        return self._gpu.silent_seconds() < SILENCE_LIMIT_SECONDS

    def begin_drain(self) -> None:
        """Start no new work; what runs may finish. May be called more than once."""
        if self.readiness.state is not State.FAILED:
            self.readiness.state = State.DRAINING
        self.readiness.phase = "draining"
        self.metrics.set_ready(False)
        self.admission.drain()

    def close(self, budget_seconds: float) -> int:
        """Export what is left, for at most `budget_seconds`; returns how many spans were lost."""
        self.begin_drain()
        # A compile cannot be interrupted and may take minutes, a hung run for ever.
        self.work_left_behind = not self._gpu.stop(timeout_seconds=0.1)
        now_ns = WallAnchor.now().unix_ns
        ended = "the process was ended before it was warm"
        self._record_start(Failure(Draining.error_type, Draining.__name__, ended, now_ns))
        lost = self.recorder.close(budget_seconds)
        self.work_left_behind |= self.recorder.left_behind
        return lost


class _Previews:
    """Small pictures of a run's latents, copied to the host behind each step's work."""

    def __init__(self, model: SdxlModel, wanted: bool) -> None:
        self._model = model
        self.wanted = wanted
        self._pending: dict[int, Any] = {}

    def enqueue(self, index: int, latents: Any) -> None:
        if self.wanted:
            self._pending[index] = self._model.preview(latents)

    def take(self, index: int) -> Any:
        """The picture of a step that has ended on the device, or None."""
        pending = self._pending.pop(index, None)
        return None if pending is None else pending.numpy()


def build_runtime(
    settings: ServeSettings,
    registry: CollectorRegistry = REGISTRY,
    upload: Upload = data_uri,
    prepare: Prepare | None = None,
) -> Runtime:
    """Everything but the model, wired together.

    Args:
        registry: where the metrics are declared; the process-wide one unless a test says otherwise.
        upload: puts images somewhere; the default answers them inline.
        prepare: makes the loaded model fast in another way than the settings say, as the bench
            does to compare ways.
    """
    metrics = GenerationMetrics(
        registry,
        endpoints=ENDPOINTS,
        outcomes=OUTCOMES,
        error_types=ERROR_TYPES,
        build={
            "version": version("stepspan"),
            "python": platform.python_version(),
            "torch": version("torch"),
            "diffusers": version("diffusers"),
        },
    )
    gpu = Gpu.open(settings.device)
    tracing = build_tracing(settings, metrics, gpu)
    recorder = Recorder(tracing, metrics, settings.trace_steps)
    return Runtime(settings, tracing, metrics, recorder, upload, prepare=prepare, gpu=gpu)


def _default_shapes(model: SdxlModel) -> tuple[CompiledShape, ...]:
    """The demo is warm in a second at all its sizes; a full-size model compiles one for minutes."""
    return model.trained_shapes if model.name == "demo" else model.trained_shapes[:1]


def _total_seconds(phases: list[PhaseTiming], kind: str) -> float:
    return math.fsum(p.duration_ns / 1e9 for p in phases if p.name.split(" ")[0] == kind)
