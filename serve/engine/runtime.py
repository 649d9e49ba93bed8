"""One process's service: built from the settings, started once, then the story of each request.

`Runtime.generate` reads top to bottom like a request: checked, admitted, queued, run on the thread
that owns the model, encoded, uploaded. Everything on an event loop here is bookkeeping; work that
takes milliseconds happens on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import secrets
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import REGISTRY, CollectorRegistry

from kernels_warmup.shapes import ALLOWED_SIDES, CompiledShape
from kernels_warmup.warmup import RunKind
from metrics.catalogue import GenerationMetrics
from metrics.clock import Clock, make_clock
from metrics.gpu import Gpu, GpuWatch
from metrics.gpu_metrics import GpuMetrics
from metrics.push import MetricsPush
from metrics.recorder import Recorder
from metrics.records import GenerationFacts
from metrics.timeline import RunTimeline
from metrics.tracing import Tracing
from serve import __version__
from serve.engine.admission import Admission, Cancellations
from serve.engine.call import Call
from serve.engine.gpu_thread import GpuThread, StepPacer
from serve.engine.images import CONTENT_TYPES, Upload, data_uri, encode_image
from serve.engine.startup import Prepare, Readiness, Startup, State
from serve.errors import (
    ERROR_TYPES,
    OUTCOMES,
    REJECTIONS,
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
from serve.schema import (
    MAX_SEED,
    GeneratedImage,
    TextToImageRequest,
    TextToImageResponse,
    Timings,
)
from serve.settings import ServeSettings
from serve.telemetry.profiling import Profiling
from serve.telemetry.setup import (
    bucket_families,
    build_gpu_metrics,
    build_push,
    build_resource,
    build_tracing,
)

if TYPE_CHECKING:
    from kernels_warmup.cuda_graphs import Fallbacks
    from serve.model.sdxl import SdxlModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENDPOINTS = ("/", "/stream")
"""The endpoints that generate: traced, counted, and the values of the `endpoint` label."""

WARMUP_STEPS = 2
SILENCE_LIMIT_SECONDS = 120.0
"""A run that shows no sign of life for this long has hung: even the slowest step and decode that
this service is meant for (a full-size model on a CPU) stay well below it."""

PROFILE_SECONDS = 0.2
"""How long the process's end waits for a profile that is being written. A large one takes seconds,
which it does not have."""

OnStep = Callable[[int, float, Any], None]
"""Told `(index, gpu_ms, preview pixels or None)` of a step that has ended; on the GPU thread."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A valid request with everything decided that it left open."""

    request: TextToImageRequest
    shape: CompiledShape
    num_inference_steps: int
    guidance_scale: float
    seed: int
    run_id: str

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs, which doubles the batch of the UNet."""
        return self.guidance_scale > 1


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a run: what it wants, where its time is kept, who is told of its steps."""

    plan: Plan
    call: Call
    on_step: OnStep | None = None


Drawn = tuple[Any, bool]
"""(height, width, 3) uint8 pixels, and whether the prompt was cut."""


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
        kinds: Sequence[RunKind] | None = None,
        gpu: Gpu | None = None,
        gpu_metrics: GpuMetrics | None = None,
        push: MetricsPush | None = None,
    ) -> None:
        self.settings = settings
        self.tracing = tracing
        self.metrics = metrics
        self.recorder = recorder
        self.readiness = Readiness()
        self.admission = Admission(settings.max_waiting, metrics.set_waiting)
        self.profiling = Profiling(settings.profile_dir, settings.nvtx)
        self._gpu = GpuThread()
        self._upload = upload
        self._watch = GpuWatch(gpu)
        self._gpu_metrics = gpu_metrics
        self._push = push
        self._device_lost = False
        self.work_left_behind = False
        self.ready = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._startup = Startup(
            settings,
            self.readiness,
            metrics,
            recorder,
            self._gpu,
            make_run_clock,
            prepare,
            self._run_once,
            kinds,
            on_ready=self.ready.set,
        )

    # Starting

    async def start(self, on_progress: Callable[[str], None] = lambda _: None) -> None:
        """Load the model and warm its shapes; returns when ready.

        With `SDXL_READY_EARLY` that is after the first shape; the others follow, each in its turn
        between requests.

        Raises:
            ModelError: the model cannot be loaded, or not made fast as the settings ask.
        """
        if self._gpu_metrics is not None:
            self._gpu_metrics.start()
        if self._push is not None:
            self._push.start()
        starting = self._starting = asyncio.create_task(self._startup.run(on_progress))
        ready = asyncio.create_task(self.ready.wait())
        try:
            await asyncio.wait({starting, ready}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            starting.cancel()
            raise
        finally:
            ready.cancel()
        if starting.done():
            starting.result()
        else:
            starting.add_done_callback(_log_late_failure)

    def _run_once(self, shape: CompiledShape, kind: RunKind) -> None:
        """Warm-up's run: the production path, accounted to nobody."""
        # With guidance two texts are encoded and without one, as many as one without a negative
        # prompt needs: both are warm, and no run is spent on it.
        plan = Plan(
            TextToImageRequest(prompt="warm-up", negative_prompt="cold" if kind.negative else ""),
            shape,
            num_inference_steps=WARMUP_STEPS,
            guidance_scale=max(self.settings.guidance_scale, 2.0) if kind.guided else 1.0,
            seed=0,
            run_id=uuid.uuid4().hex,
        )
        calls = [Call("/", "POST", self.tracing.identify()) for _ in range(kind.images)]
        for outcome in self._run_together([Asked(plan, call) for call in calls]):
            if isinstance(outcome, RequestError):
                raise outcome
        self._gpu.sign_of_life()

    @property
    def _model(self) -> SdxlModel | None:
        return self._startup.model

    @property
    def _clock(self) -> Clock | None:
        return self._startup.clock

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
            drawn = await self._run_on_gpu(plan, call, on_step)
        return await self._answer(plan, call, drawn)

    async def generate_together(
        self, requests: Sequence[TextToImageRequest], calls: Sequence[Call]
    ) -> list[TextToImageResponse]:
        """Several requests of one shape, step count and guidance in one run, in their order.

        Raises:
            ValueError: they cannot share a run.
            RequestError: the first failure among them.
        """
        plans = [self._plan(request, call) for request, call in zip(requests, calls, strict=True)]
        alike = {(p.shape, p.num_inference_steps, p.guidance_scale) for p in plans}
        if len(alike) != 1:
            raise ValueError("one run has one shape, one number of steps and one guidance scale")
        asked = [Asked(plan, call) for plan, call in zip(plans, calls, strict=True)]
        with contextlib.ExitStack() as admitted:
            for index, (request, call) in enumerate(zip(requests, calls, strict=True)):
                call.first_of_run = index == 0
                admitted.enter_context(self._deadline(request, call))
                admitted.enter_context(self.admission.admit(call.cancellation))
                call.timeline.begin("queue")
            work = partial(self._run_together, asked)
            outcomes = await asyncio.wrap_future(
                self._gpu.submit(lambda: self.profiling.run(work, plans[0].run_id, calls))
            )

        async def answer(one: Asked, outcome: Drawn | RequestError) -> TextToImageResponse:
            if isinstance(outcome, RequestError):
                raise outcome
            return await self._answer(one.plan, one.call, outcome)

        return await asyncio.gather(*map(answer, asked, outcomes))

    async def _answer(self, plan: Plan, call: Call, drawn: Drawn) -> TextToImageResponse:
        """What was drawn, encoded and put where the caller finds it."""
        pixels, truncated = drawn
        with call.stage("image_encode"):
            data = await asyncio.to_thread(encode_image, pixels, plan.request.format)
        call.image_bytes = len(data)
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
        steps = request.num_inference_steps or self.settings.steps
        guidance_scale = self._guidance_scale(request)
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        call.facts = GenerationFacts(
            model_name=readiness.model,
            prompt_length=len(request.prompt),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            width=shape.width,
            height=shape.height,
            seed=seed,
            prompt=request.prompt if self.settings.trace_prompts else None,
        )
        return Plan(request, shape, steps, guidance_scale, seed, run_id=uuid.uuid4().hex)

    def _shape(self, request: TextToImageRequest) -> CompiledShape:
        default = self.readiness.shapes[0]
        width = default.width if request.width is None else request.width
        height = default.height if request.height is None else request.height
        for shape in self.readiness.shapes:
            if (shape.width, shape.height) == (width, height):
                return shape
        allowed = f"one of {', '.join(str(shape) for shape in self.readiness.shapes)}"
        if self.settings.serve_cold_shapes:
            assert self._model is not None
            most = max(s.pixels for s in (*self.readiness.shapes, *self._model.trained_shapes))
            allowed += f", or any of at most {most} pixels with {ALLOWED_SIDES}"
            with contextlib.suppress(ValueError):
                shape = CompiledShape(width, height)
                if shape.pixels <= most:
                    return shape
        field_name = "width" if request.width is not None else "height"
        raise InvalidRequest(
            [FieldProblem(("body", field_name), f"the size must be {allowed}", "shape")]
        )

    def _guidance_scale(self, request: TextToImageRequest) -> float:
        scale = request.guidance_scale
        if scale is None:
            return self.settings.guidance_scale
        if scale > 1 and not self._startup.guided:
            message = "must be at most 1: this model runs without guidance"
            raise InvalidRequest([FieldProblem(("body", "guidance_scale"), message, "guidance")])
        return scale

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
        work = partial(self._run, plan, call, on_step)
        future = self._gpu.submit(lambda: self.profiling.run(work, plan.run_id, [call]))
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

    def on_model(self, work: Callable[[SdxlModel], T]) -> Future[T]:
        """Do something else with the loaded model on its thread, behind what is queued."""

        def run() -> T:
            assert self._model is not None
            return work(self._model)

        return self._gpu.submit(run)

    def _run(self, plan: Plan, call: Call, on_step: OnStep | None) -> Drawn:
        """A run of one request."""
        (outcome,) = self._run_together([Asked(plan, call, on_step)])
        if isinstance(outcome, RequestError):
            raise outcome
        return outcome

    def _run_together(self, asked: Sequence[Asked]) -> list[Drawn | RequestError]:
        """One run; what each of its requests has come to, where the run itself does not fail."""
        calls = [one.call for one in asked]
        for call in calls:
            call.timeline.end()  # waiting is over
            call.cancellation.work_started = True
        model, clock = self._model, self._clock
        assert model is not None
        assert clock is not None
        plan = asked[0].plan
        wanted = [one.plan.request for one in asked]
        previews = _Previews(
            model,
            [one.on_step is not None and r.preview for one, r in zip(asked, wanted, strict=True)],
        )
        timeline: RunTimeline | None = None
        fallbacks = self._fallbacks()
        self._watch.begin()

        def on_step_ended(index: int, duration_ns: int) -> None:
            for image, one in enumerate(asked):
                if one.on_step is not None:
                    one.on_step(index, duration_ns / 1e6, previews.take(index, image))

        def on_step_enqueued(index: int, latents: Any) -> None:
            previews.enqueue(index, latents)
            pacer.step_enqueued()

        try:
            cancellations = Cancellations([call.cancellation for call in calls])
            cancellations.raise_if_cancelled()
            timeline = RunTimeline(
                clock,
                calls[0].timeline.anchor,
                run_id=plan.run_id,
                shape=str(plan.shape),
                guidance=plan.guided,
                batch_size=len(asked),
                ranges=self.profiling.ranges(plan.num_inference_steps),
            )
            pacer = StepPacer(timeline, cancellations, on_step_ended, self._gpu.sign_of_life)
            with timeline.stage("text_encode"):
                conditioning = model.encode_prompts(
                    [r.prompt for r in wanted],
                    [r.negative_prompt for r in wanted],
                    plan.guided,
                    plan.shape,
                )
            self._watch.request_reading()  # the GPU has the text to encode
            with timeline.stage("denoise"):
                latents = model.denoise(
                    conditioning,
                    shape=plan.shape,
                    num_inference_steps=plan.num_inference_steps,
                    guidance_scale=plan.guidance_scale,
                    seeds=[one.plan.seed for one in asked],
                    on_loop_begins=timeline.loop_begins,
                    on_step_enqueued=on_step_enqueued,
                    watch_latents=previews.wanted,
                )
            with timeline.stage("vae_decode"):
                images = model.decode(latents)
            self._watch.request_reading()  # all is enqueued, and the GPU as busy as it gets
            pacer.drain()
            # Waits for the copy to the host.
            run = timeline.finish(
                eager_fallback=self._count_fallbacks(plan, fallbacks),
                conditions=self._watch.readings(),
            )
            for call in calls:
                call.run = run
        except Exception as error:
            failure = self._explain(error)
            run_until_then = None
            if timeline is not None:
                run_until_then = timeline.finish(failed=True, conditions=self._watch.readings())
            for call in calls:
                call.run = run_until_then
                _fail_at_last_stage(call, failure)
            if failure is error:
                raise
            raise failure from None

        def outcome(image: int, call: Call) -> Drawn | RequestError:
            failure = call.cancellation.reason
            if not bool(images.finite[image]):
                failure = NonFiniteOutput()
            if failure is None:
                return images.pixels[image].numpy(), conditioning.truncated[image]
            _fail_at_last_stage(call, failure)
            return failure

        return [outcome(image, call) for image, call in enumerate(calls)]

    def _fallbacks(self) -> Fallbacks | None:
        compiled = self._startup.compiled
        return None if compiled is None else compiled.fallbacks

    def _count_fallbacks(self, plan: Plan, before: Fallbacks | None) -> bool:
        """Count a run that the guard kept from compiling; returns whether any of it ran eagerly."""
        if not self._startup.busy and plan.shape not in self.readiness.shapes:
            self.metrics.cold_shape_served()
        after = self._fallbacks()
        if before is None or after is None or after == before:
            return False
        if after.recompiles > before.recompiles:
            self.metrics.recompiled()
        return True

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
        if self.readiness.state is State.STARTING or self._startup.busy:
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
        self._startup.end(self.work_left_behind)
        if self._gpu_metrics is not None:
            self._gpu_metrics.stop()
        # Spans and metrics leave side by side: a dead backend takes all the time it is given.
        deadline = time.monotonic() + budget_seconds
        push = self._push
        lost = self.recorder.close(budget_seconds, push.begin_end if push else lambda: None)
        if push is not None:
            push.end(max(0.0, deadline - time.monotonic()))
        self.work_left_behind |= self.recorder.left_behind
        self.work_left_behind |= not self.profiling.close(PROFILE_SECONDS)
        return lost


class _Previews:
    """Small pictures of a run's latents, copied to the host behind each step's work."""

    def __init__(self, model: SdxlModel, of_images: Sequence[bool]) -> None:
        self._model = model
        self._images = [image for image, wanted in enumerate(of_images) if wanted]
        self.wanted = bool(self._images)
        self._pending: dict[tuple[int, int], Any] = {}

    def enqueue(self, index: int, latents: Any) -> None:
        for image in self._images:
            self._pending[index, image] = self._model.preview(latents[image])

    def take(self, index: int, image: int) -> Any:
        """The picture of a step that has ended on the device, or None."""
        pending = self._pending.pop((index, image), None)
        return None if pending is None else pending.numpy()


def build_runtime(
    settings: ServeSettings,
    registry: CollectorRegistry = REGISTRY,
    upload: Upload = data_uri,
    prepare: Prepare | None = None,
    kinds: Sequence[RunKind] | None = None,
) -> Runtime:
    """Everything but the model, wired together.

    Args:
        registry: where the metrics are declared; the process-wide one unless a test says otherwise.
        upload: puts images somewhere; the default answers them inline.
        prepare: makes the loaded model fast in another way than the settings say, as the bench
            does to compare ways.
        kinds: the kinds of run to warm, where not all that can be served will be asked for.
    """
    metrics = GenerationMetrics(
        registry,
        endpoints=ENDPOINTS,
        outcomes=OUTCOMES,
        error_types=ERROR_TYPES,
        rejections=REJECTIONS,
        bucket_families=bucket_families(settings),
        build={
            "version": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "diffusers": version("diffusers"),
        },
    )
    gpu = Gpu.open(settings.device)
    resource = build_resource(settings, gpu)
    tracing = build_tracing(settings, metrics, resource)
    recorder = Recorder(tracing, metrics, settings.trace_steps)
    return Runtime(
        settings,
        tracing,
        metrics,
        recorder,
        upload,
        prepare=prepare,
        kinds=kinds,
        gpu=gpu,
        gpu_metrics=build_gpu_metrics(settings, metrics, gpu),
        push=build_push(settings, metrics, resource),
    )


def _fail_at_last_stage(call: Call, failure: RequestError) -> None:
    """The stage that ended last is the one that failed."""
    last = call.run.stages[-1].end_ns if call.run is not None and call.run.stages else None
    call.fail(failure, at_ns=last)


def _log_late_failure(starting: asyncio.Task[None]) -> None:
    """What fails after the process became ready costs the shapes that are not warm, no more."""
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.error("not every shape could be warmed: %s", type(error).__name__, exc_info=error)
