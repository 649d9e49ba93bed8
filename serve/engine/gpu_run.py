"""A run: one or more requests of one shape, step count and guidance, from text to pixels.

This is the only way from a request to the GPU. Queueing is before it and image encoding after it,
both in `runtime.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metrics.gpu import GpuWatch
from metrics.timeline import Ranges, RunTimeline
from serve.engine.admission import Cancellations
from serve.engine.call import Call
from serve.engine.failures import clear_frames, explain_failure
from serve.engine.gpu_thread import StepPacer
from serve.engine.loaded_model import LoadedModel
from serve.engine.planning import PlannedRequest
from serve.errors import NonFiniteOutput, RequestError

if TYPE_CHECKING:
    import torch

    from serve.model.sdxl import Conditioning, DecodedImages, SdxlModel

OnStep = Callable[[int, float, Any], None]
"""Called on the GPU thread with `(index, gpu_ms, preview pixels or None)` of each step once it has
ended."""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One request of a run.

    Attributes:
        call: where its timing is kept, and how it is cancelled.
        on_step: called for each step; previews are made only if it is given.
    """

    planned: PlannedRequest
    call: Call
    on_step: OnStep | None = None


@dataclass(frozen=True, slots=True)
class GeneratedPixels:
    """The image of one request.

    Attributes:
        pixels: (height, width, 3) uint8, in host memory.
        prompt_truncated: whether a text encoder cut the prompt or the negative prompt.
    """

    pixels: Any
    prompt_truncated: bool


Outcome = GeneratedPixels | RequestError
"""What a run has given one of its requests."""


class GpuRun:
    """One run; made and executed once, on the GPU thread.

    Args:
        requests: of one shape, step count and guidance scale.
        ranges: marks stages and steps for an attached profiler.
        gpu_watch: reads the GPU's conditions during the run.
        sign_of_life: called whenever a step has ended.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        requests: Sequence[RunRequest],
        *,
        run_id: str,
        ranges: Ranges | None,
        gpu_watch: GpuWatch,
        sign_of_life: Callable[[], None],
    ) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._requests = requests
        self._planned = requests[0].planned  # what all of them have in common
        self._calls = [request.call for request in requests]
        self._cancellations = Cancellations([call.cancellation for call in self._calls])
        self._run_id = run_id
        self._ranges = ranges
        self._gpu_watch = gpu_watch
        self._sign_of_life = sign_of_life
        self._step_reports = _StepReports(loaded.model, requests)
        self._fallbacks_before = loaded.fallbacks
        self._timeline: RunTimeline | None = None
        self.completed = False
        """Whether every stage has run."""

    def execute(self) -> list[Outcome]:
        """Run every stage. Returns an outcome for each request, in their order.

        What the run fails with is the outcome of every request; it is not raised.
        """
        self._end_waiting()
        try:
            timeline, pacer = self._begin()
            with timeline.stage("text_encode"):
                conditioning = self._encode_text()
            with timeline.stage("denoise"):
                latents = self._denoise(conditioning, timeline, pacer)
            with timeline.stage("vae_decode"):
                images = self._model.decode(latents)
            self._wait_for_pixels(timeline, pacer)
        except Exception as error:  # noqa: BLE001 - any exception fails these requests alone
            return self._fail(error)
        return [
            self._outcome(image, call, images, conditioning)
            for image, call in enumerate(self._calls)
        ]

    def _end_waiting(self) -> None:
        for call in self._calls:
            call.timeline.end()
            call.cancellation.work_started = True

    def _begin(self) -> tuple[RunTimeline, StepPacer]:
        """Start the run's clock. Raises the reason if every request was cancelled."""
        self._gpu_watch.begin()
        self._cancellations.raise_if_cancelled()
        timeline = self._timeline = RunTimeline(
            self._loaded.clock,
            self._calls[0].timeline.anchor,
            run_id=self._run_id,
            shape=str(self._planned.shape),
            guidance=self._planned.guided,
            batch_size=len(self._requests),
            ranges=self._ranges,
        )
        report = self._step_reports.report
        return timeline, StepPacer(timeline, self._cancellations, report, self._sign_of_life)

    def _encode_text(self) -> Conditioning:
        wanted = [request.planned.request for request in self._requests]
        return self._model.encode_prompts(
            [request.prompt for request in wanted],
            [request.negative_prompt for request in wanted],
            self._planned.guided,
            self._planned.shape,
        )

    def _denoise(
        self, conditioning: Conditioning, timeline: RunTimeline, pacer: StepPacer
    ) -> torch.Tensor:
        self._gpu_watch.request_reading()  # the GPU has the text to encode

        def on_step_enqueued(index: int, latents: Any) -> None:
            self._step_reports.enqueue_previews(index, latents)
            pacer.step_enqueued()

        return self._model.denoise(
            conditioning,
            shape=self._planned.shape,
            num_inference_steps=self._planned.num_inference_steps,
            guidance_scale=self._planned.guidance_scale,
            seeds=[request.planned.seed for request in self._requests],
            on_loop_begins=timeline.loop_begins,
            on_step_enqueued=on_step_enqueued,
            watch_latents=self._step_reports.previews_wanted,
        )

    def _wait_for_pixels(self, timeline: RunTimeline, pacer: StepPacer) -> None:
        """Wait for the last steps and for the copy to the host; freeze the run's timing."""
        self._gpu_watch.request_reading()  # all work is enqueued, and the GPU as busy as it gets
        pacer.drain()
        timing = timeline.finish(
            eager_fallback=self._loaded.fallbacks != self._fallbacks_before,
            conditions=self._gpu_watch.readings(),
        )
        for call in self._calls:
            call.run = timing
        self.completed = True

    def _outcome(
        self, image: int, call: Call, images: DecodedImages, conditioning: Conditioning
    ) -> Outcome:
        failure = call.cancellation.reason
        if not bool(images.finite[image]):
            failure = NonFiniteOutput()
        if failure is None:
            return GeneratedPixels(images.pixels[image].numpy(), conditioning.truncated[image])
        _fail_in_last_stage(call, failure)
        return failure

    def _fail(self, error: Exception) -> list[Outcome]:
        """The whole run has failed. Its timing keeps the stages and steps that did run."""
        failure = explain_failure(error, self._model.device)
        timing = None
        if self._timeline is not None:
            timing = self._timeline.finish(failed=True, conditions=self._gpu_watch.readings())
        for call in self._calls:
            call.run = timing
            _fail_in_last_stage(call, failure)
        # The outcome outlives the run; the run's tensors must not.
        clear_frames(error)
        failure.__traceback__ = None
        return [failure for _ in self._calls]


def _fail_in_last_stage(call: Call, failure: RequestError) -> None:
    """Record the failure in the stage of the run that ended last."""
    last = call.run.stages[-1].end_ns if call.run is not None and call.run.stages else None
    call.fail(failure, at_ns=last)


class _StepReports:
    """Reports each step to the run's requests, with a preview for those that want one.

    A preview is a small image of the step's latents. Its copy to the host is enqueued behind the
    step's work, so that it is there when the step has ended.
    """

    def __init__(self, model: SdxlModel, requests: Sequence[RunRequest]) -> None:
        self._model = model
        self._requests = requests
        self._with_preview = [
            image
            for image, request in enumerate(requests)
            if request.on_step is not None and request.planned.request.preview
        ]
        self._pending: dict[tuple[int, int], Any] = {}

    @property
    def previews_wanted(self) -> bool:
        return bool(self._with_preview)

    def enqueue_previews(self, index: int, latents: Any) -> None:
        """Enqueue a step's previews. `latents`: (images, channels, height / 8, width / 8)."""
        for image in self._with_preview:
            self._pending[index, image] = self._model.preview(latents[image])

    def report(self, index: int, duration_ns: int) -> None:
        """Step `index` has ended on the device."""
        for image, request in enumerate(self._requests):
            if request.on_step is not None:
                pending = self._pending.pop((index, image), None)
                preview = None if pending is None else pending.numpy()
                request.on_step(index, duration_ns / 1e6, preview)
