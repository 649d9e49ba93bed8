"""A run: images of one shape, step count and guidance, of one request or several, from text, or a
picture and text, to pixels.

This is the only way from a request to the GPU. Queueing is before it and image encoding after it,
both in `runtime.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metrics.gpu import GpuWatch
from metrics.records import PREVIEW_DECODE, SAFETY_CHECK, RunTiming
from metrics.timeline import Ranges, RunTimeline
from serve.engine.call import Call
from serve.engine.cancellation import Cancellations
from serve.engine.failures import clear_frames, explain_failure
from serve.engine.gpu_thread import StepPacer
from serve.engine.loaded_model import LoadedModel
from serve.engine.planning import PlannedRequest
from serve.errors import DeviceLost, NonFiniteOutput, OutOfMemory, RequestError

if TYPE_CHECKING:
    import torch

    from serve.model.initial_image import InitialLatents
    from serve.model.sdxl import Conditioning, DecodedImages, SdxlModel

logger = logging.getLogger(__name__)

OnStep = Callable[[int, float, Any], None]
"""Called on the GPU thread with `(index, gpu_ms, preview pixels or None)` of each step once it has
ended. The steps of a request's runs are counted through."""


@dataclass(frozen=True, slots=True)
class Previews:
    """The previews of a request's steps.

    Attributes:
        steps: the steps of a run that have one; None: each. The last has no decoded one.
        decoded: made by the model's decoder at full size, which takes about as long as a step.
            Otherwise a linear map makes one of an eighth of the size in microseconds.
    """

    steps: frozenset[int] | None = None
    decoded: bool = False

    def at(self, step: int) -> bool:
        return self.steps is None or step in self.steps


@dataclass(frozen=True, slots=True)
class RunPart:
    """The images of one request in one run.

    Attributes:
        call: where the request's timing is kept, and how it is cancelled.
        images: which of the request's images.
        on_step: called for each step.
        previews: those that it is called with, of the first image; None: none.
        steps_before: denoising steps of the request's earlier runs.
    """

    planned: PlannedRequest
    call: Call
    images: range = range(1)
    on_step: OnStep | None = None
    steps_before: int = 0
    previews: Previews | None = None


@dataclass(frozen=True, slots=True)
class GeneratedPixels:
    """One image.

    Attributes:
        pixels: (height, width, 3) uint8, in host memory.
        prompt_truncated: whether a text encoder cut the prompt or the negative prompt.
        prompt_tokens: how many tokens the whole prompt has.
        flagged: whether the safety checker flagged it, and its pixels are black; None: not checked.
    """

    pixels: Any
    prompt_truncated: bool
    prompt_tokens: int
    flagged: bool | None = None


Outcome = list[GeneratedPixels] | RequestError
"""What a run has given one of its requests: its images, or why there are none."""


class GpuRun:
    """One run; made and executed once, on the GPU thread.

    Args:
        parts: of one `run_key`; at most one of each request.
        ranges: marks stages and steps for an attached profiler.
        profile: the name of the run's profile; None: it is not profiled.
        gpu_watch: reads the GPU's conditions during the run.
        step_ended: called whenever a step has ended.
        own_prompt: the prompt is the warm-up's, not a user's.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        parts: Sequence[RunPart],
        *,
        run_id: str,
        ranges: Ranges | None,
        profile: str | None,
        gpu_watch: GpuWatch,
        step_ended: Callable[[], None],
        own_prompt: bool = False,
    ) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._parts = parts
        self._planned = parts[0].planned  # what all of them have in common
        self._calls = [part.call for part in parts]
        self._images = sum(len(part.images) for part in parts)
        self._cancellations = Cancellations([call.cancellation for call in self._calls])
        self._run_id = run_id
        self._ranges = ranges
        self._profile = profile
        self._gpu_watch = gpu_watch
        self._on_step_ended = step_ended
        self._own_prompt = own_prompt
        self._steps_ended = 0
        self._step_reports = _StepReports(loaded.model, parts)
        self._fallbacks_before = loaded.fallbacks
        self._timeline: RunTimeline | None = None
        self.timing: RunTiming | None = None
        """Its times are by its first request's anchor. Set at the end, unless it failed before its
        first stage."""
        self.completed = False
        """Whether every stage has run."""
        self.device_lost = False
        """Whether the run failed because the device was lost."""

    @property
    def trace_id(self) -> str:
        """That of its first request."""
        return self._calls[0].identity.trace_id_hex

    @property
    def position(self) -> tuple[str, int | None]:
        """The stage that the run is in, and in `denoise` the step. Other threads read it.

        The device is behind the host, so the run is in `denoise` until its last step has ended,
        whatever the host has enqueued since. A text that still is encoded counts as step 0.
        """
        timeline = self._timeline
        if timeline is None:
            return "", None
        if timeline.loop_begun and self._steps_ended < self._planned.steps_to_run:
            return "denoise", self._steps_ended
        return timeline.stage_begun, None

    def execute(self) -> list[Outcome]:
        """Run every stage. Returns an outcome for each part, in their order.

        What the run fails with is not raised. It is the outcome of every part whose request was not
        cancelled before; a cancelled one has its own reason. After OutOfMemory, a run of several
        images is no failure of its requests yet: they may be tried again.
        """
        for call in self._calls:
            call.timeline.end()
        try:
            timeline, pacer = self._begin()
            self._use_loras(timeline)
            with timeline.stage("text_encode"):
                conditioning = self._encode_text()
            initial = None
            if self._planned.from_picture:
                with timeline.stage("vae_encode"):
                    initial = self._encode_pictures()
            with timeline.stage("denoise"):
                latents = self._denoise(conditioning, initial, timeline, pacer)
            with timeline.stage("vae_decode"):
                images = self._model.decode(latents)
            flagged = self._find_flagged(images, timeline)
            self._wait_for_pixels(timeline, pacer)
        except Exception as error:  # noqa: BLE001 - any exception fails these requests alone
            return self._fail(error)
        return self._outcomes(images, conditioning, flagged)

    def _begin(self) -> tuple[RunTimeline, StepPacer]:
        """Start the run's clock. Raises a RequestError if every request was cancelled."""
        self._gpu_watch.begin()
        self._cancellations.raise_if_cancelled()
        timeline = self._timeline = RunTimeline(
            self._loaded.clock,
            self._calls[0].timeline.anchor,
            run_id=self._run_id,
            shape=str(self._planned.shape),
            guidance=self._planned.guided,
            guided_steps=self._planned.guided_steps,
            batch_size=self._images,
            ranges=self._ranges,
            profile=self._profile,
        )
        report = self._step_reports.report
        return timeline, StepPacer(timeline, self._cancellations, report, self._step_ended)

    def _step_ended(self) -> None:
        self._steps_ended += 1
        self._on_step_ended()

    def _use_loras(self, timeline: RunTimeline) -> None:
        """Give the weights the run's LoRAs; nothing where they have them."""
        loras = self._loaded.loras
        if loras is not None and loras.active != self._planned.loras:
            with timeline.stage("lora_swap"):
                loras.use(self._planned.loras)

    def _encode_text(self) -> Conditioning:
        wanted = [part.planned.request for part in self._parts for _ in part.images]
        return self._model.encode_prompts(
            [request.prompt for request in wanted],
            [request.negative_prompt for request in wanted],
            self._planned.guided,
            self._planned.shape,
            self._planned.chunks,
            self._planned.guided_steps < self._planned.steps_to_run,
        )

    def _encode_pictures(self) -> InitialLatents:
        """A request's picture is encoded once, for all of its images in the run."""
        pictures = [part.planned.picture for part in self._parts]
        copies = [len(part.images) for part in self._parts]
        left_out = self._planned.num_inference_steps - self._planned.steps_to_run
        return self._model.initial_latents(pictures, copies, left_out)

    def _denoise(
        self,
        conditioning: Conditioning,
        initial: InitialLatents | None,
        timeline: RunTimeline,
        pacer: StepPacer,
    ) -> torch.Tensor:
        self._gpu_watch.request_reading()  # the GPU has the text to encode

        def on_step_enqueued(index: int, latents: Any) -> None:
            previews = self._step_reports
            previews.enqueue_linear(index, latents)
            pacer.step_enqueued()
            if previews.decodes(index):
                with timeline.between_steps(PREVIEW_DECODE):
                    previews.enqueue_decoded(index, latents)

        return self._model.denoise(
            conditioning,
            shape=self._planned.shape,
            num_inference_steps=self._planned.num_inference_steps,
            guidance_scale=self._planned.guidance_scale,
            guided_steps=self._planned.guided_steps,
            seeds=[part.planned.seed_of(image) for part in self._parts for image in part.images],
            on_loop_begins=timeline.loop_begins,
            on_step_enqueued=on_step_enqueued,
            watch_latents=self._step_reports.previews_wanted,
            initial=initial,
        )

    def _find_flagged(self, images: DecodedImages, timeline: RunTimeline) -> torch.Tensor | None:
        """Which images the safety checker flags; None if no request of the run is checked."""
        if not any(part.planned.checked for part in self._parts):
            return None
        with timeline.stage(SAFETY_CHECK):
            return self._model.find_flagged(images)

    def _wait_for_pixels(self, timeline: RunTimeline, pacer: StepPacer) -> None:
        """Wait for the last steps and for the copy to the host; freeze the run's timing."""
        self._gpu_watch.request_reading()  # all work is enqueued, and the GPU as busy as it gets
        pacer.drain()
        timing = timeline.finish(
            eager_fallback=self._loaded.fallbacks != self._fallbacks_before,
            conditions=self._gpu_watch.readings(),
        )
        self._keep(timing)
        self.completed = True

    def _keep(self, timing: RunTiming) -> None:
        """Put the run's timing into its calls, each by its own anchor. One that still goes on
        records the run's metrics."""
        self.timing = timing
        first = self._calls[0].timeline.anchor
        for call in self._calls:
            call.runs.append(timing.moved(call.timeline.anchor.ahead_of(first)))
        observer = next((call for call in self._calls if not call.finished), self._calls[0])
        observer.observed_runs.add(self._run_id)

    def _outcomes(
        self, images: DecodedImages, conditioning: Conditioning, flagged: torch.Tensor | None
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        first = 0
        for part in self._parts:
            indices = range(first, first + len(part.images))
            first = indices.stop
            failure = part.call.cancellation.reason
            if not all(bool(images.finite[index]) for index in indices):
                failure = NonFiniteOutput()
                logger.error("a run drew pixels that are not finite")
            if failure is None:
                checked = flagged if part.planned.checked else None
                outcomes.append(
                    [_generated(images, conditioning, checked, index) for index in indices]
                )
            else:
                self._fail_in_last_stage(part.call, failure)
                outcomes.append(failure)
        return outcomes

    def _fail(self, error: Exception) -> list[Outcome]:
        """The whole run has failed. Its timing keeps the stages and steps that did run."""
        failure = explain_failure(error, self._model.device, self._own_prompt)
        # A RequestError is the reason of a cancelled request, which may be a hang that is over.
        self.device_lost = isinstance(failure, DeviceLost) and failure is not error
        again = isinstance(failure, OutOfMemory) and self._images > 1
        if self._timeline is not None:
            self._keep(
                self._timeline.finish(
                    failed=True,
                    conditions=self._gpu_watch.readings(),
                    error_type=failure.error_type if again else None,
                )
            )
        # The outcome outlives the run; the run's tensors must not.
        clear_frames(error)
        failure.__traceback__ = None
        if again:
            return [failure for _ in self._calls]
        outcomes: list[Outcome] = []
        for call in self._calls:
            # The run stops for one of the reasons; each request has its own.
            own = call.cancellation.reason or failure
            self._fail_in_last_stage(call, own)
            outcomes.append(own)
        return outcomes

    def _fail_in_last_stage(self, call: Call, failure: RequestError) -> None:
        """Record the failure in the stage of the run that ended last."""
        kept = self.timing is not None  # otherwise the call's last run is an earlier one
        stages = call.runs[-1].stages if kept else ()
        call.fail(failure, at_ns=stages[-1].end_ns if stages else None)


def _generated(
    images: DecodedImages, conditioning: Conditioning, flagged: torch.Tensor | None, index: int
) -> GeneratedPixels:
    """One image of a run. A flagged one is black from here on."""
    pixels = images.pixels[index]
    is_flagged = None if flagged is None else bool(flagged[index])
    if is_flagged:
        pixels.zero_()
    return GeneratedPixels(
        pixels.numpy(), conditioning.truncated[index], conditioning.tokens[index], is_flagged
    )


class _StepReports:
    """Reports each step to the run's requests, with a preview for those that want one.

    A preview shows the request's first image in the run. Its copy to the host is enqueued behind
    the step's work, so that it is there when the step has ended. A decoded one is enqueued after
    the step's end was marked, so that it is in no step's time; it comes with the next step.
    """

    def __init__(self, model: SdxlModel, parts: Sequence[RunPart]) -> None:
        self._model = model
        self._parts: list[tuple[int, RunPart]] = []
        """Each with the place of its first image in the run."""
        first = 0
        for part in parts:
            self._parts.append((first, part))
            first += len(part.images)
        wanted = [
            (image, part.previews)
            for image, part in self._parts
            if part.on_step is not None and part.previews is not None
        ]
        self._linear = [(image, previews) for image, previews in wanted if not previews.decoded]
        self._decoded = [(image, previews) for image, previews in wanted if previews.decoded]
        self._pending: dict[tuple[int, int], Any] = {}

    @property
    def previews_wanted(self) -> bool:
        return bool(self._linear or self._decoded)

    def enqueue_linear(self, index: int, latents: Any) -> None:
        """Enqueue a step's linear previews.

        Args:
            latents: (images, channels, height / 8, width / 8).
        """
        for image, previews in self._linear:
            if previews.at(index):
                self._pending[index, image] = self._model.preview(latents[image])

    def decodes(self, index: int) -> bool:
        return any(previews.at(index) for _, previews in self._decoded)

    def enqueue_decoded(self, index: int, latents: Any) -> None:
        """Enqueue a step's decoded previews. `latents`: as for `enqueue_linear`."""
        for image, previews in self._decoded:
            if previews.at(index):
                decoded = self._model.decode(latents[image : image + 1])
                self._pending[index + 1, image] = decoded.pixels[0]

    def report(self, index: int, duration_ns: int) -> None:
        """Step `index` has ended on the device. Cancelled requests get no report."""
        for image, part in self._parts:
            if part.on_step is not None and part.call.cancellation.reason is None:
                pending = self._pending.pop((index, image), None)
                preview = None if pending is None else pending.numpy()
                part.on_step(part.steps_before + index, duration_ns / 1e6, preview)
