"""One process's service: built from the settings, started once, then the story of each request.

`Runtime.generate` reads from top to bottom like a request: planned, admitted, queued, run on the
GPU, encoded, uploaded. On the event loop there is bookkeeping only; work that takes milliseconds
happens on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import REGISTRY, CollectorRegistry

from kernels_warmup.cache.trust import UntrustedFolder
from kernels_warmup.cache.working_directory import use_trusted_folders
from kernels_warmup.cpu_contention import ComputingThreads
from kernels_warmup.cpu_threads import choose_cpu_threads
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import RunKind
from metrics.catalogue import GenerationMetrics
from metrics.gpu import Gpu, GpuWatch
from metrics.gpu_metrics import GpuMetrics
from metrics.push import MetricsPush
from metrics.recorder import Recorder
from metrics.tracing import Tracing
from serve import __version__
from serve.engine.admission import Admission, Cancellations
from serve.engine.call import Call
from serve.engine.gpu_run import GpuRun, OnStep, Outcome, RunRequest
from serve.engine.gpu_thread import GpuThread
from serve.engine.images import CONTENT_TYPES, Upload, data_uri, encode_image
from serve.engine.loaded_model import LoadedModel
from serve.engine.planning import PlannedRequest, can_share_a_run, plan_request
from serve.engine.readiness import Readiness, State
from serve.engine.startup import Prepare, Startup
from serve.errors import (
    ERROR_TYPES,
    OUTCOMES,
    REJECTIONS,
    ClientGone,
    ConfigurationError,
    DeadlineExceeded,
    DeviceLost,
    Draining,
    NotReady,
    RequestError,
)
from serve.schema import GeneratedImage, TextToImageRequest, TextToImageResponse, Timings
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
    from serve.model.sdxl import SdxlModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENDPOINTS = ("/", "/stream")
"""The endpoints that generate: traced, counted, and the values of the `endpoint` label."""

WARMUP_STEPS = 2
SILENCE_LIMIT_SECONDS = 120.0
"""A run that shows no sign of life for this long hangs. The slowest step and decode of a full-size
model on a CPU stay well below it."""

PROFILE_SECONDS = 0.2
"""How long the end of the process waits for a profile that is being written. A large one takes
seconds, and the process does not have them."""


class Runtime:
    """The GPU thread, admission and telemetry of one process.

    Made by `build_runtime`. `start` loads and warms, `generate` serves, `close` ends.
    """

    def __init__(
        self,
        settings: ServeSettings,
        tracing: Tracing,
        metrics: GenerationMetrics,
        recorder: Recorder,
        profiling: Profiling,
        upload: Upload,
        readiness: Readiness,
        startup: Startup,
        gpu_thread: GpuThread,
        gpu_watch: GpuWatch,
        gpu_metrics: GpuMetrics | None = None,
        push: MetricsPush | None = None,
        cpu_threads: ComputingThreads | None = None,
    ) -> None:
        self.settings = settings
        self.tracing = tracing
        self.metrics = metrics
        self.recorder = recorder
        self.profiling = profiling
        self.readiness = readiness
        self.admission = Admission(settings.max_waiting, metrics.set_waiting)
        self.ready = asyncio.Event()
        self.work_left_behind = False
        self._upload = upload
        self._startup = startup
        self._starting: asyncio.Task[None] | None = None
        self._gpu = gpu_thread
        self._gpu_watch = gpu_watch
        self._gpu_metrics = gpu_metrics
        self._push = push
        self._cpu_threads = cpu_threads
        self._loaded: LoadedModel | None = None
        self._device_lost = False

    # Starting

    async def start(self, on_progress: Callable[[str], None] = lambda _: None) -> None:
        """Load the model and warm its shapes; returns when ready.

        With `SDXL_READY_EARLY` that is after the first shape. The others follow, each in its turn
        between requests.

        Raises:
            ModelError: the model cannot be loaded, or not prepared as the settings ask.
        """
        if self._gpu_metrics is not None:
            self._gpu_metrics.start()
        if self._push is not None:
            self._push.start()
        starting = self._starting = asyncio.create_task(self._load_and_warm(on_progress))
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

    async def _load_and_warm(self, on_progress: Callable[[str], None]) -> None:
        self._loaded = await self._startup.load(on_progress)
        if self._cpu_threads is not None:
            self._cpu_threads.loaded(self.readiness.device, self._gpu.native_id)
        await self._startup.warm(self._loaded, self._warm_once, on_ready=self.ready.set)

    def _warm_once(self, shape: CompiledShape, kind: RunKind) -> None:
        """One run of the warm-up, on the GPU thread: the production path, but no request."""
        # Guidance encodes two texts. Without it one is encoded, which also warms the encoders for a
        # guided run with an empty negative prompt.
        planned = PlannedRequest(
            TextToImageRequest(prompt="warm-up", negative_prompt="cold" if kind.negative else ""),
            shape,
            num_inference_steps=WARMUP_STEPS,
            guidance_scale=max(self.settings.guidance_scale, 2.0) if kind.guided else 1.0,
            seed=0,
        )
        calls = [Call("/", "POST", self.tracing.identify()) for _ in range(kind.images)]
        for outcome in self._execute([RunRequest(planned, call) for call in calls], _new_run_id()):
            if isinstance(outcome, RequestError):
                raise outcome
        self._gpu.sign_of_life()

    @property
    def loaded(self) -> LoadedModel:
        """The model; there is one from the end of loading to the end of the process."""
        assert self._loaded is not None
        return self._loaded

    # Serving

    async def generate(
        self,
        request: TextToImageRequest,
        call: Call,
        on_queued: Callable[[int], None] = lambda _: None,
        on_step: OnStep | None = None,
    ) -> TextToImageResponse:
        """Serve one valid request.

        Args:
            on_queued: called with the number of waiting requests once this one is admitted.
            on_step: called on the GPU thread for each step that has ended. Previews are made only
                if it is given.

        Raises:
            RequestError: a row of the failure table.
        """
        planned = self._plan(request, call)
        with self._admitted(request, call):
            on_queued(self.admission.waiting)
            call.timeline.begin("queue")
            (outcome,) = await self._run([RunRequest(planned, call, on_step)])
        return await self._answer(planned, call, outcome)

    async def generate_together(
        self, requests: Sequence[TextToImageRequest], calls: Sequence[Call]
    ) -> list[TextToImageResponse]:
        """Serve several requests of one shape, step count and guidance in one run, in their order.

        Raises:
            ValueError: they cannot share a run.
            RequestError: the first failure among them.
        """
        planned = [self._plan(request, call) for request, call in zip(requests, calls, strict=True)]
        if not can_share_a_run(planned):
            raise ValueError("one run has one shape, one number of steps and one guidance scale")
        with contextlib.ExitStack() as admitted:
            for index, (request, call) in enumerate(zip(requests, calls, strict=True)):
                call.first_of_run = index == 0
                admitted.enter_context(self._admitted(request, call))
                call.timeline.begin("queue")
            outcomes = await self._run(list(map(RunRequest, planned, calls)))
        return await asyncio.gather(*map(self._answer, planned, calls, outcomes))

    def _plan(self, request: TextToImageRequest, call: Call) -> PlannedRequest:
        """Decide what the request left open. Raises unless this process can serve it now."""
        if (refusal := self.refusal()) is not None:
            raise refusal
        readiness = self.readiness
        planned = plan_request(
            request, self.settings, readiness.shapes, self.loaded.model.trained_shapes
        )
        call.facts = planned.facts(readiness.model, with_prompt=self.settings.trace_prompts)
        return planned

    @contextlib.contextmanager
    def _admitted(self, request: TextToImageRequest, call: Call) -> Iterator[None]:
        """Hold a place in the queue until the run has ended.

        When the deadline, counted from the request's arrival, has passed, it is cancelled.
        """
        seconds = self.settings.deadline_seconds
        if request.deadline_seconds is not None:
            seconds = min(seconds, request.deadline_seconds)
        timer = asyncio.get_running_loop().call_later(
            max(0.0, seconds - call.timeline.elapsed_seconds()),
            call.cancellation.cancel,
            DeadlineExceeded(seconds),
        )
        try:
            with self.admission.admit(call.cancellation):
                yield
        finally:
            timer.cancel()

    async def _run(self, requests: Sequence[RunRequest]) -> list[Outcome]:
        """Queue one run and wait for its outcomes, one for each request.

        The run leaves the queue when every one of its requests was cancelled.
        """
        calls = [request.call for request in requests]
        cancellations = Cancellations([call.cancellation for call in calls])
        future = self._submit(requests)
        cancellations.when_all_cancelled(future.cancel)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not cancellations.all_cancelled:
                # The waiting task was cancelled, so its images have no reader.
                draining = self.readiness.state is State.DRAINING
                for call in calls:
                    call.cancellation.cancel(Draining() if draining else ClientGone())
                raise
            return [_cancelled_while_waiting(call) for call in calls]
        finally:
            if calls[0].run is not None:
                self.admission.run_took(calls[0].run.duration_ns / 1e9)

    async def _answer(
        self, planned: PlannedRequest, call: Call, outcome: Outcome
    ) -> TextToImageResponse:
        """Encode and upload the image of a run. Raises the outcome if it is a failure."""
        if isinstance(outcome, RequestError):
            raise outcome
        with call.stage("image_encode"):
            data = await asyncio.to_thread(encode_image, outcome.pixels, planned.request.format)
        call.image_bytes = len(data)
        with call.stage("upload"):
            url = await self._put(data, planned)
        return self._response(planned, call, url, outcome.prompt_truncated)

    async def _put(self, data: bytes, planned: PlannedRequest) -> str:
        try:
            return await asyncio.to_thread(self._upload, data, planned.request.format)
        except Exception as error:  # noqa: BLE001 - any storage's client may raise anything
            # A storage outage must not cost an image that was generated.
            logger.warning("upload failed with %s; answering inline", type(error).__name__)
            self.metrics.upload_fell_back()
            return data_uri(data, planned.request.format)

    def _response(
        self, planned: PlannedRequest, call: Call, url: str, truncated: bool
    ) -> TextToImageResponse:
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
                width=planned.shape.width,
                height=planned.shape.height,
                content_type=CONTENT_TYPES[planned.request.format],
            ),
            seed=planned.seed,
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

    # On the GPU thread

    def on_model(self, work: Callable[[SdxlModel], T]) -> Future[T]:
        """Do other work with the loaded model on the GPU thread, behind what is queued."""
        return self._gpu.submit(lambda: work(self.loaded.model))

    def _submit(self, requests: Sequence[RunRequest]) -> Future[list[Outcome]]:
        """Queue one run."""
        run_id = _new_run_id()
        run = partial(self._execute, requests, run_id, serving=True)
        calls = [request.call for request in requests]
        return self._gpu.submit(lambda: self.profiling.run(run, run_id, calls))

    def _execute(
        self, requests: Sequence[RunRequest], run_id: str, serving: bool = False
    ) -> list[Outcome]:
        """Execute one run. The GPU thread reaches this from `_submit`, or from the warm-up, which
        holds the thread for all runs of a shape while compiling is allowed.

        Args:
            serving: the run is for requests and not for the warm-up.
        """
        loaded = self.loaded
        recompiles_before = loaded.recompiles
        run = GpuRun(
            loaded,
            requests,
            run_id=run_id,
            ranges=self.profiling.ranges(requests[0].planned.num_inference_steps),
            gpu_watch=self._gpu_watch,
            sign_of_life=self._gpu.sign_of_life,
        )
        outcomes = run.execute()
        if any(isinstance(outcome, DeviceLost) for outcome in outcomes):
            self._device_lost = True
        if run.completed and loaded.recompiles > recompiles_before:
            self.metrics.recompiled()
        if run.completed and serving and requests[0].planned.shape not in self.readiness.shapes:
            self.metrics.cold_shape_served()
        return outcomes

    # Ending

    @property
    def failed(self) -> bool:
        """Whether the start has failed or the device was lost."""
        return self._device_lost or bool(self.readiness.reason)

    @property
    def healthy(self) -> bool:
        """False once the device is lost, the start has failed or a run hangs."""
        if self._device_lost or self.readiness.state is State.FAILED:
            return False
        if self.readiness.state is State.STARTING:
            return True  # the platform's own limit on start-up applies
        return self._gpu.silent_seconds() < SILENCE_LIMIT_SECONDS

    def refusal(self) -> RequestError | None:
        """The error that every request gets now, or None if requests are served."""
        readiness = self.readiness
        if readiness.state is State.STARTING:
            return NotReady(f"The model is not warm yet ({readiness.phase}).")
        if readiness.state is State.DRAINING:
            return Draining()
        if readiness.state is State.FAILED:
            return NotReady(f"The model could not be started: {readiness.reason}.")
        if not self.healthy:
            return DeviceLost()  # nothing queued behind a run that hangs would ever start
        return None

    def begin_drain(self) -> None:
        """Start no new work; what runs may finish. May be called more than once."""
        self.readiness.drain()
        self.metrics.set_ready(False)
        self.admission.drain()

    def cut_off(self) -> None:
        """Cancel what runs. Each request fails as `draining`, within two steps."""
        self.begin_drain()
        self.admission.cancel_all()

    def close(self, budget_seconds: float) -> int:
        """Export what is left, for at most `budget_seconds`; returns how many spans were lost."""
        self.begin_drain()
        # A compile cannot be interrupted and may take minutes; a run that hangs never ends.
        self.work_left_behind = not self._gpu.stop(timeout_seconds=0.1)
        self._startup.close()
        if not self.work_left_behind:
            self._loaded = None  # gives the model's memory back
        if self._cpu_threads is not None:
            self._cpu_threads.close()
        if self._gpu_metrics is not None:
            self._gpu_metrics.stop()
        # Spans and metrics are exported side by side: a dead backend uses up all its time.
        deadline = time.monotonic() + budget_seconds
        push = self._push
        lost = self.recorder.close(budget_seconds, push.begin_end if push else lambda: None)
        if push is not None:
            push.end(max(0.0, deadline - time.monotonic()))
        self.work_left_behind |= self.recorder.left_behind
        self.work_left_behind |= not self.profiling.close(PROFILE_SECONDS)
        return lost


def build_runtime(
    settings: ServeSettings,
    registry: CollectorRegistry = REGISTRY,
    upload: Upload = data_uri,
    prepare: Prepare | None = None,
    kinds: Sequence[RunKind] | None = None,
) -> Runtime:
    """Build everything but the model, and wire it together.

    Args:
        registry: where the metrics are declared.
        upload: stores an image and returns its URL; the default answers inline.
        prepare: makes the loaded model fast in another way than the settings say. The bench uses
            it to compare ways.
        kinds: the kinds of run to warm, if not all that can be served will be requested.

    Raises:
        ConfigurationError: a folder of profiles or of compiled code cannot be used.
    """
    try:
        use_trusted_folders()
    except UntrustedFolder as error:
        raise ConfigurationError(str(error)) from None
    # OpenMP reads its environment when torch is loaded, which comes later.
    cpu_threads = ComputingThreads(choose_cpu_threads())
    gpu = Gpu.open(settings.device)
    resource = build_resource(settings, gpu)
    metrics = _build_metrics(settings, registry)
    tracing = build_tracing(settings, metrics, resource)
    recorder = Recorder(tracing, metrics, settings.trace_steps)
    profiling = Profiling(settings.profile_dir, settings.nvtx)
    readiness = Readiness(cpu_threads=cpu_threads.describe)
    gpu_thread = GpuThread()
    startup = Startup(settings, readiness, metrics, recorder, gpu_thread, prepare, kinds)
    return Runtime(
        settings,
        tracing,
        metrics,
        recorder,
        profiling,
        upload,
        readiness,
        startup,
        gpu_thread,
        gpu_watch=GpuWatch(gpu),
        gpu_metrics=build_gpu_metrics(settings, metrics, gpu),
        push=build_push(settings, metrics, resource),
        cpu_threads=cpu_threads,
    )


def _build_metrics(settings: ServeSettings, registry: CollectorRegistry) -> GenerationMetrics:
    return GenerationMetrics(
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


def _new_run_id() -> str:
    return uuid.uuid4().hex


def _cancelled_while_waiting(call: Call) -> RequestError:
    reason = call.cancellation.reason
    assert reason is not None
    call.fail(reason)
    return reason.with_traceback(None)


def _log_late_failure(starting: asyncio.Task[None]) -> None:
    """A failure after the process became ready costs only the shapes that are not warm yet."""
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.error("not every shape could be warmed: %s", type(error).__name__, exc_info=error)
