"""Frozen records of what happened, in Unix nanoseconds: a run, a request, a start-up.

`timeline.py` makes them; `spans.py` and `catalogue.py` read them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

SAFETY_CHECK = "safety_check"
"""The last stage of a run, with a safety checker."""

RUN_STAGES = ("lora_swap", "text_encode", "vae_encode", "denoise", "vae_decode", SAFETY_CHECK)
"""Stages on the thread that owns the model, timed by the run's clock. Only a run of image to image
has `vae_encode`."""

LoraSet = tuple[tuple[str, float], ...]
"""LoRAs and their scales, sorted by name, without those of scale 0."""

PREVIEW_DECODE = "preview_decode"
"""Between two steps: a preview that a request wants from the model's decoder."""

REQUEST_STAGES = ("receive", "image_decode", "queue", "image_encode", "upload", "respond")
"""Stages of one request outside its run, timed by the host's clock. Only image to image has
`image_decode`, in which the picture is fetched too."""


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One stage of a run or a request, Unix nanoseconds."""

    name: str
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    def moved(self, by_ns: int) -> StageTiming:
        return StageTiming(self.name, self.start_ns + by_ns, self.end_ns + by_ns)


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One denoising step on the run's clock, Unix nanoseconds.

    `gpu_queue_ns` is how long the step waited in the GPU's queue: the GPU's start of the step minus
    the host's time of enqueueing it. If clearly positive, the step waited for the GPU; if near
    zero, the GPU waited for the host. Always 0 on the host's clock.
    """

    index: int
    start_ns: int
    end_ns: int
    gpu_queue_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    def moved(self, by_ns: int) -> StepTiming:
        start_ns, end_ns = self.start_ns + by_ns, self.end_ns + by_ns
        return StepTiming(self.index, start_ns, end_ns, self.gpu_queue_ns)


@dataclass(frozen=True, slots=True)
class StepSummary:
    """The steps of one run in three figures."""

    median_ns: int
    slowest_ns: int
    slowest_index: int


@dataclass(frozen=True, slots=True)
class GpuConditions:
    """One reading of the GPU's driver. A value that the driver did not return is empty or None.

    `throttle` has names of `gpu.THROTTLE_REASONS`.
    """

    throttle: frozenset[str] = frozenset()
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None


@dataclass(frozen=True, slots=True)
class RunTiming:
    """One unit of GPU work: one or more images of one shape, step count and guidance, of one
    request or of several. `batch_size` counts the images.

    `start_ns` and `end_ns` are the host's times on the thread that owns the model. Stages and steps
    are on the run's clock, placed within `error_bound_ns`.
    """

    run_id: str
    clock: str
    shape: str
    guidance: bool
    batch_size: int
    start_ns: int
    end_ns: int
    stages: tuple[StageTiming, ...]
    steps: tuple[StepTiming, ...]
    between_steps: tuple[StageTiming, ...] = ()
    """Other work in the denoising loop, as a preview that the model's decoder makes."""
    error_bound_ns: int = 0
    drift_ns: int = 0
    eager_fallback: bool = False
    """A part of the model was not compiled for this shape and ran eagerly."""
    conditions: tuple[GpuConditions, ...] = ()
    """Readings of the GPU's driver during the run."""
    profile: str | None = None
    """The file of its profile. Profiling slowed the run, so its times are not observed."""
    error_type: str | None = None
    """Why it failed, if its requests did not fail with it: they were tried again."""
    guided_steps: int | None = None
    """How many steps have guidance, of those that `steps` has or would have had, if `guidance` is
    set; the steps after them have none. None: all of them."""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def profiled(self) -> bool:
        return self.profile is not None

    def moved(self, by_ns: int) -> RunTiming:
        """The same run with every moment later by `by_ns`."""
        if by_ns == 0:
            return self
        return replace(
            self,
            start_ns=self.start_ns + by_ns,
            end_ns=self.end_ns + by_ns,
            stages=tuple(stage.moved(by_ns) for stage in self.stages),
            steps=tuple(step.moved(by_ns) for step in self.steps),
            between_steps=tuple(stage.moved(by_ns) for stage in self.between_steps),
        )

    def stage(self, name: str) -> StageTiming | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def has_guidance(self, step: StepTiming) -> bool:
        """Whether one of its steps ran with guidance."""
        ended = self.guided_steps is not None and step.index >= self.guided_steps
        return self.guidance and not ended

    @property
    def steps_by_guidance(self) -> Mapping[bool, Sequence[StepTiming]]:
        """Its steps with and without guidance; a kind that it has no steps of is absent."""
        steps: dict[bool, list[StepTiming]] = {}
        for step in self.steps:
            steps.setdefault(self.has_guidance(step), []).append(step)
        return steps

    def step_summary(self) -> StepSummary | None:
        if not self.steps:
            return None
        slowest = max(self.steps, key=lambda step: step.duration_ns)
        return StepSummary(
            median_ns=round(statistics.median(step.duration_ns for step in self.steps)),
            slowest_ns=slowest.duration_ns,
            slowest_index=slowest.index,
        )


@dataclass(frozen=True, slots=True)
class GenerationFacts:
    """The parameters of a valid request: lengths and sizes. `prompt` is set only if the operator
    turned it on."""

    model_name: str
    prompt_length: int
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    seed: int
    prompt: str | None = None
    num_images: int = 1
    guidance_end: float = 1.0
    loras: LoraSet = ()
    strength: float | None = None
    """Of image to image."""
    steps_left_out: int = 0
    """The first steps, which image to image does not run."""

    @property
    def steps_to_run(self) -> int:
        """The denoising steps of each of its runs."""
        return self.num_inference_steps - self.steps_left_out


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a request was expected to take from a moment on until its images are stored.

    `seconds` counts from `at_ns`, Unix nanoseconds.
    """

    at_ns: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed. `message` must not contain user text.

    A mistake of the service's caller (`server_fault` false) is recorded on the span, but its status
    is not an error, as the conventions for servers require.
    """

    error_type: str
    exception_type: str
    message: str
    at_ns: int
    server_fault: bool = True


@dataclass(frozen=True, slots=True)
class PhaseTiming:
    """One phase of the start-up, Unix nanoseconds; `attributes` say which shape or part."""

    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    error_type: str | None = None
    """Why it failed, if the start went on without it: a shape that is left out."""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class WarmupTiming:
    """The start-up from loading the model until it was ready or failed."""

    start_ns: int
    end_ns: int
    phases: tuple[PhaseTiming, ...]
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request from the moment its head was read to its last byte written, Unix nanoseconds.

    A request of several images may have several runs. A run that several requests share is in
    `observed_runs` of one of them: a run's metrics are observed once.
    """

    endpoint: str
    method: str
    status_code: int
    outcome: str
    start_ns: int
    end_ns: int
    stages: tuple[StageTiming, ...]
    runs: tuple[RunTiming, ...] = ()
    observed_runs: tuple[RunTiming, ...] = ()
    facts: GenerationFacts | None = None
    failure: Failure | None = None
    image_bytes: tuple[int, ...] = ()
    """Size of each encoded image, once there are images."""
    estimate: Estimate | None = None
    """Made when the request was queued; None if the service had measured too little."""
    api_key: str | None = None
    """The name of the caller's key, of a closed set; never the key."""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def unattributed_ns(self) -> int:
        """Time outside all stages and runs: hand-overs between threads and the event loop."""
        covered = sum(stage.duration_ns for stage in self.stages)
        return max(0, self.duration_ns - covered - self.runs_ns)

    @property
    def run(self) -> RunTiming | None:
        """Its last run; None if none has begun."""
        return self.runs[-1] if self.runs else None

    @property
    def runs_ns(self) -> int:
        """Time of all its runs."""
        return sum(run.duration_ns for run in self.runs)

    def stage_ns(self, name: str) -> int | None:
        """Time of a stage, which may have several parts: a request waits before each of its runs.
        None if the stage did not begin."""
        parts = [stage.duration_ns for stage in self.stages if stage.name == name]
        return sum(parts) if parts else None

    def stage(self, name: str) -> StageTiming | None:
        return next((stage for stage in self.stages if stage.name == name), None)
