"""One process's service: started once, then the story of each request. `build.py` builds it.

`Runtime.generate` reads from top to bottom like a request: planned, admitted, queued, drawn on the
GPU, encoded, uploaded. On the event loop there is bookkeeping only; work that takes milliseconds
happens on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from kernels_warmup.cpu_contention import ComputingThreads
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import RunKind
from metrics.catalogue import GenerationMetrics
from metrics.gpu import GpuWatch
from metrics.gpu_metrics import GpuMetrics, MemoryUse
from metrics.push import MetricsPush
from metrics.recorder import Recorder
from metrics.tracing import Tracing
from serve.engine.call import Call
from serve.engine.failures import clear_frames
from serve.engine.gpu_run import GeneratedPixels, GpuRun, OnStep, Outcome, Previews, RunPart
from serve.engine.gpu_thread import GpuThread
from serve.engine.images import Upload, data_uri, encode_image
from serve.engine.loaded_model import LoadedModel
from serve.engine.pictures.reading import PictureReader, grey_picture
from serve.engine.planning import PlannedRequest, plan_request
from serve.engine.readiness import Readiness, State
from serve.engine.response import build_response
from serve.engine.startup import Startup
from serve.engine.waiting.admission import Admission
from serve.engine.waiting.estimates import Estimates
from serve.engine.waiting.request_queue import Batch, QueuedRequest, RequestQueue
from serve.engine.watchdog import Watchdog
from serve.errors import (
    ClientGone,
    DeadlineExceeded,
    DeviceLost,
    Draining,
    NotReady,
    OutOfMemory,
    RequestError,
)
from serve.schema import ImageToImageRequest, TextToImageRequest, TextToImageResponse
from serve.settings import ServeSettings
from serve.telemetry.profiling import Profiling

if TYPE_CHECKING:
    from serve.model.sdxl import SdxlModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

OPENAI_IMAGES = "/v1/images/generations"
IMAGE_TO_IMAGE = "/image-to-image"
IMAGE_TO_IMAGE_STREAM = "/image-to-image/stream"
ENDPOINTS = ("/", "/stream", IMAGE_TO_IMAGE, IMAGE_TO_IMAGE_STREAM, OPENAI_IMAGES)
"""The endpoints that generate: traced, counted, and the values of the `endpoint` label."""

WARMUP_STEPS = 2
PROFILE_SECONDS = 0.2
"""How long the end of the process waits for a profile that is being written. A large one takes
seconds, and the process does not have them."""


class Runtime:
    """The GPU thread, its queue and the telemetry of one process.

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
        wait_ms = settings.batch_wait_ms
        self.queue = RequestQueue(
            settings.max_waiting, None if wait_ms is None else wait_ms / 1e3, metrics.set_waiting
        )
        self.estimates = Estimates()
        self.admission = Admission(self.queue, self.estimates, self._sizes)
        self.ready = asyncio.Event()
        self.work_left_behind = False
        self._pictures = PictureReader(settings.image_hosts)
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
        self._watchdog = Watchdog(gpu_thread, self.queue, readiness, self._show_readiness)

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
        self._watchdog.start()
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
            TextToImageRequest(
                prompt="warm-up",
                negative_prompt="cold" if kind.negative else "",
                num_images=kind.images,
            ),
            shape,
            # At fixed timesteps there is no other number of steps.
            num_inference_steps=len(self.settings.timesteps or ()) or WARMUP_STEPS,
            guidance_scale=max(self.settings.guidance_scale, 2.0) if kind.guided else 1.0,
            seed=0,
            chunks=kind.chunks,
            checked=self.settings.safety_checker is not None,
            strength=1.0 if kind.from_picture else None,
            picture=grey_picture(shape) if kind.from_picture else None,
        )
        call = Call("/", "POST", self.tracing.identify())
        (outcome,) = self._execute([RunPart(planned, call, range(kind.images))], _new_run_id())
        if isinstance(outcome, RequestError):
            raise outcome
        self._gpu.sign_of_life()

    @property
    def loaded(self) -> LoadedModel:
        """The model; there is one from the end of loading to the end of the process."""
        assert self._loaded is not None
        return self._loaded

    # Serving

    @property
    def model_names(self) -> tuple[str, ...]:
        """What a request may call the model, its own name first; empty before it is loaded."""
        own = (self.readiness.model,) if self.readiness.model else ()
        return (*own, *self.settings.model_names)

    @property
    def uploads(self) -> bool:
        """Whether images are stored somewhere and answered as a URL, instead of inline."""
        return self._upload is not data_uri

    @property
    def gpu_memory(self) -> MemoryUse | None:
        """What the allocator holds on the GPU; None without a GPU."""
        return None if self._gpu_metrics is None else self._gpu_metrics.memory_use()

    async def generate(
        self,
        request: TextToImageRequest,
        call: Call,
        on_queued: Callable[[int], None] = lambda _: None,
        on_step: OnStep | None = None,
        previews: Previews | None = None,
    ) -> TextToImageResponse:
        """Serve one valid request.

        Args:
            on_queued: called with the number of requests that wait before this one, when it has
                been admitted. The call has its estimate by then, if there is one.
            on_step: called on the GPU thread for each step that has ended.
            previews: those that `on_step` gets; None: of each step if the request wants them.

        Raises:
            RequestError: a row of the failure table.
        """
        planned = self._plan(request, call)
        with self._deadline(planned, call) as seconds:
            planned = await self._with_picture(planned, call)
            self.admission.admit(planned, call, seconds)
            on_queued(self.queue.waiting)
            queued = self._queue(planned, call, on_step, previews)
            self._wake(queued)
            images = await self._drawn(queued)
        return await self._answer(planned, call, images)

    async def generate_together(
        self, requests: Sequence[TextToImageRequest], calls: Sequence[Call]
    ) -> list[TextToImageResponse]:
        """Serve requests that arrive at the same moment, so that the GPU thread finds all of them
        waiting: those that can share a run do.

        Raises:
            RequestError: the first failure among them.
        """
        planned = [self._plan(request, call) for request, call in zip(requests, calls, strict=True)]
        with contextlib.ExitStack() as deadlines:
            queued = []
            for each, call in zip(planned, calls, strict=True):
                seconds = deadlines.enter_context(self._deadline(each, call))
                self.admission.admit(each, call, seconds)
                queued.append(self._queue(each, call))
            for each_queued in queued:
                self._wake(each_queued)
            drawn = await asyncio.gather(*map(self._drawn, queued), return_exceptions=True)
        for outcome in drawn:
            if isinstance(outcome, BaseException):
                raise outcome
        images = [outcome for outcome in drawn if not isinstance(outcome, BaseException)]
        return await asyncio.gather(*map(self._answer, planned, calls, images))

    def _plan(self, request: TextToImageRequest, call: Call) -> PlannedRequest:
        """Decide what the request left open. Raises unless this process can serve it now."""
        if (refusal := self.refusal()) is not None:
            raise refusal
        readiness = self.readiness
        model = self.loaded.model
        planned = plan_request(
            request,
            self.settings,
            readiness.shapes,
            model.trained_shapes,
            model.chunks_of,
            model.most_steps,
        )
        call.facts = planned.facts(readiness.model, with_prompt=self.settings.trace_prompts)
        return planned

    async def _with_picture(self, planned: PlannedRequest, call: Call) -> PlannedRequest:
        """For image to image, with the picture that it begins with.

        Raises:
            InvalidRequest: there is no such picture, or it may not be used here.
            Draining: the process is shutting down, or begins to before the picture is read.
            RequestError: the request was cancelled, or the queue is full already.
        """
        request = planned.request
        if not isinstance(request, ImageToImageRequest):
            return planned
        self.admission.refuse_if_full(planned, call)

        def refuse() -> None:  # it waits for no GPU yet, so the queue's drain does not know it
            call.cancellation.cancel(Draining())

        with call.stage("image_decode"), self.readiness.when_draining(refuse):
            reading = self._pictures.read(request.image_url, planned.shape)
            picture = await call.cancellation.unless_cancelled(reading)
        return replace(planned, picture=picture)

    @contextlib.contextmanager
    def _deadline(self, planned: PlannedRequest, call: Call) -> Iterator[float]:
        """Cancel the request at its deadline unless its last run has ended by then.

        Gives the deadline in seconds, counted from the request's arrival.
        """
        seconds = self.settings.deadline_seconds
        if planned.request.deadline_seconds is not None:
            seconds = min(seconds, planned.request.deadline_seconds)

        def pass_deadline() -> None:
            eta_ms = self.admission.eta_ms(planned, call)
            self.queue.cancel_unless_drawn(call, DeadlineExceeded(seconds, eta_ms))

        timer = asyncio.get_running_loop().call_later(
            max(0.0, seconds - call.timeline.elapsed_seconds()), pass_deadline
        )
        try:
            yield seconds
        finally:
            timer.cancel()

    def _queue(
        self,
        planned: PlannedRequest,
        call: Call,
        on_step: OnStep | None = None,
        previews: Previews | None = None,
    ) -> QueuedRequest:
        if previews is None and planned.request.preview:
            previews = Previews()
        if planned.checked:
            previews = None  # they would show what the check is about to blank
        call.timeline.begin("queue")
        queued = self.queue.join(planned, call, on_step, self._sizes(planned), previews)
        self._watchdog.answer_if_cancelled(queued)
        return queued

    def _wake(self, queued: QueuedRequest) -> None:
        """Make the GPU thread take a batch for each of the request's runs."""
        for _ in range(len(queued.parts)):
            self._gpu.submit(self._run_next)

    async def _drawn(self, queued: QueuedRequest) -> list[GeneratedPixels]:
        """Wait for the request's images. Raises its failure."""
        call = queued.call
        try:
            outcome = await asyncio.wrap_future(queued.future)
        except asyncio.CancelledError:
            # The waiting task was cancelled, so its images have no reader.
            draining = self.readiness.state is State.DRAINING
            call.cancellation.cancel(Draining() if draining else ClientGone())
            raise
        if isinstance(outcome, RequestError):
            call.fail(outcome)
            raise outcome
        return outcome

    async def _answer(
        self, planned: PlannedRequest, call: Call, images: Sequence[GeneratedPixels]
    ) -> TextToImageResponse:
        """Encode and upload the images."""
        drawn = time.perf_counter()
        wanted = planned.request
        encode = partial(encode_image, image_format=wanted.format, quality=wanted.image_quality)
        with call.stage("image_encode"):
            encoded = await asyncio.gather(
                *(asyncio.to_thread(encode, image.pixels) for image in images)
            )
        call.image_bytes = tuple(map(len, encoded))
        with call.stage("upload"):
            urls = await asyncio.gather(*(self._put(data, planned) for data in encoded))
        self.estimates.observe_answer(planned, time.perf_counter() - drawn)
        if any(image.prompt_truncated for image in images):
            self.metrics.prompt_truncated()
        self.metrics.images_flagged(sum(image.flagged is True for image in images))
        return build_response(planned, call, urls, images)

    async def _put(self, data: bytes, planned: PlannedRequest) -> str:
        if planned.request.sync_mode:
            return data_uri(data, planned.request.format)
        try:
            return await asyncio.to_thread(self._upload, data, planned.request.format)
        except Exception as error:  # noqa: BLE001 - any storage's client may raise anything
            # A storage outage must not cost an image that was generated.
            logger.warning("upload failed with %s; answering inline", type(error).__name__)
            self.metrics.upload_fell_back()
            return data_uri(data, planned.request.format)

    # On the GPU thread

    def on_model(self, work: Callable[[SdxlModel], T]) -> Future[T]:
        """Do other work with the loaded model on the GPU thread, behind what is queued."""
        return self._gpu.submit(lambda: work(self.loaded.model))

    def _run_next(self) -> None:
        """Execute the next run of the queue; nothing if none waits any more."""
        batch = self.queue.take(self._sizes)
        if batch is None:
            return
        run_id = _new_run_id()
        calls = [part.call for part in batch.parts]
        run = partial(self._execute, batch.parts, run_id, batch)
        try:
            # In the first request's context, so that what the run logs carries its ids.
            outcomes = batch.requests[0].context.run(self.profiling.run, run, run_id, calls)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the requests decides
            clear_frames(error)
            self.queue.fail(batch, error)
            return
        if batch.images > 1 and any(isinstance(outcome, OutOfMemory) for outcome in outcomes):
            self._forget_sizes(batch)
        for _ in range(self.queue.end(batch, outcomes)):
            self._gpu.submit(self._run_next)

    def _sizes(self, planned: PlannedRequest) -> Sequence[int]:
        """The numbers of images that a run of such a request may have."""
        loaded = self.loaded
        cold = (1,) if loaded.has_graphs else loaded.batch_sizes
        return self.readiness.batch_sizes.get(planned.shape, cold)

    def _forget_sizes(self, batch: Batch) -> None:
        """A run of several images ran out of memory: its shape gets smaller runs from now on."""
        planned = batch.parts[0].planned
        smaller = tuple(size for size in self._sizes(planned) if size < batch.images) or (1,)
        self.readiness.batch_sizes = {**self.readiness.batch_sizes, planned.shape: smaller}
        logger.warning(
            "a run of %d images at %s ran out of memory; they are drawn one by one, and runs at "
            "this size have at most %d images from now on",
            batch.images,
            planned.shape,
            smaller[-1],
        )

    def _execute(
        self, parts: Sequence[RunPart], run_id: str, batch: Batch | None = None
    ) -> list[Outcome]:
        """Execute one run. The GPU thread reaches this from `_run_next`, or from the warm-up, which
        holds the thread for all runs of a shape while compiling is allowed.

        Args:
            batch: the requests that the run is for; None: it is the warm-up's.
        """
        loaded = self.loaded
        recompiles_before = loaded.recompiles

        def step_ended() -> None:
            self._gpu.sign_of_life()
            if batch is not None:
                self.queue.step_ended(batch)

        run = GpuRun(
            loaded,
            parts,
            run_id=run_id,
            ranges=self.profiling.ranges(parts[0].planned.steps_to_run),
            profile=self.profiling.recording,
            gpu_watch=self._gpu_watch,
            step_ended=step_ended,
            own_prompt=batch is None,
        )
        self._watchdog.run = run
        try:
            outcomes = run.execute()
        finally:
            self._watchdog.run = None
        if run.device_lost:
            self._device_lost = True
            self._show_readiness()
        if run.completed and loaded.recompiles > recompiles_before:
            self.metrics.recompiled()
        if run.completed and run.timing is not None:
            self.estimates.observe_run(run.timing, serving=batch is not None)
            if batch is not None and parts[0].planned.shape not in self.readiness.shapes:
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
        lost = self._device_lost or self.readiness.state is State.FAILED
        return not lost and self._watchdog.hang is None

    def refusal(self) -> RequestError | None:
        """The error that every request gets now, or None if requests are served."""
        readiness = self.readiness
        if readiness.state is State.STARTING:
            return NotReady(f"The model is not warm yet ({readiness.phase}).")
        if readiness.state is State.DRAINING:
            return Draining()
        if readiness.state is State.FAILED:
            return NotReady(f"The model could not be started: {readiness.reason}.")
        if self._device_lost:
            return DeviceLost()
        if (hang := self._watchdog.hang) is not None:
            return DeviceLost(hang)  # nothing queued behind it would ever start
        return None

    def _show_readiness(self) -> None:
        """After a failure of the device, or its end."""
        self.metrics.set_ready(self.refusal() is None)

    def begin_drain(self) -> None:
        """Start no new work; what runs may finish. May be called more than once."""
        self.readiness.drain()
        self.metrics.set_ready(False)
        self.queue.drain()

    def cut_off(self) -> None:
        """Cancel what runs. Each request fails as `draining`, within two steps."""
        self.begin_drain()
        self.queue.cancel_all()

    def close(self, budget_seconds: float) -> int:
        """Export what is left, for at most `budget_seconds`; returns how many spans were lost."""
        self.begin_drain()
        self._watchdog.close()
        # A compile cannot be interrupted and may take minutes; a run that hangs never ends.
        self.work_left_behind = not self._gpu.stop(timeout_seconds=0.1)
        self.queue.close()
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
        self.work_left_behind |= not self._pictures.close()
        return lost


def _new_run_id() -> str:
    return uuid.uuid4().hex


def _log_late_failure(starting: asyncio.Task[None]) -> None:
    """A failure after the process became ready costs only the shapes that are not warm yet."""
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.error("not every shape could be warmed: %s", type(error).__name__, exc_info=error)
