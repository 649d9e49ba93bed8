"""Metrics of the model's work: stages, steps, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram

from metrics.buckets import MOST_IMAGES, BucketFamilies
from metrics.families.observing import CountFault, Exemplar, is_countable, labelled, observe
from metrics.records import PREVIEW_DECODE, REQUEST_STAGES, RUN_STAGES, RunTiming

COLD_SHAPE = "cold"
"""The label of every shape that is not warm: one series for all of them."""

# `queue` has a histogram of its own.
_STAGES = tuple(
    stage for stage in (*REQUEST_STAGES, *RUN_STAGES, PREVIEW_DECODE) if stage != "queue"
)

_GUIDANCE = {True: "on", False: "off"}


@dataclass(frozen=True, slots=True)
class RunFlops:
    """Nominal FLOPs of a run at one shape: those of the unmodified model, whatever computes it.

    `guided_step` and `guided_text_encode` are with guidance; without it, half of each.
    """

    guided_text_encode: int
    guided_step: int
    vae_decode: int
    vae_encode: int = 0

    def of(self, run: RunTiming) -> float:
        """FLOPs of the part of the run that was done."""
        guided = sum(map(run.has_guidance, run.steps))
        # A step without guidance is half of one with it.
        flops = run.batch_size * self.guided_step * (guided + len(run.steps)) / 2
        if run.stage("text_encode") is not None:
            share = run.batch_size * (1.0 if run.guidance else 0.5)
            flops += share * self.guided_text_encode
        if run.stage("vae_encode") is not None:
            flops += run.batch_size * self.vae_encode
        if run.stage("vae_decode") is not None:
            flops += run.batch_size * self.vae_decode
        return flops


def batch_labels(max_batch: int) -> tuple[int, ...]:
    """The values of the `batch` label: powers of two, the last at least `max_batch`.

    A run is counted under the next power of two that holds its images. Without that bound nine
    shapes with batches of up to 32 would have twenty thousand series.
    """
    return tuple(2**exponent for exponent in range((max_batch - 1).bit_length() + 1))


class RunMetrics:
    """Stages, steps and FLOPs of runs."""

    def __init__(
        self, registry: CollectorRegistry, families: BucketFamilies, count_fault: CountFault
    ) -> None:
        self._count_fault = count_fault
        self.flops: dict[str, RunFlops] = {}
        self._stages = labelled(
            Histogram(
                "sdxl_stage_duration_seconds",
                "Time of one stage; the model's stages on the GPU's clock, once a run.",
                ("stage",),
                registry=registry,
                buckets=families.stage,
            ),
            _STAGES,
        )
        self._step_duration = Histogram(
            "sdxl_denoise_step_duration_seconds",
            "Time of one denoising step on the GPU's clock.",
            ("shape", "guidance", "batch"),
            registry=registry,
            buckets=families.step,
        )
        self._step_durations: dict[tuple[str, bool, int], Histogram] = {}
        self._batch_sizes = Histogram(
            "sdxl_run_batch_size",
            "Images of a run.",
            registry=registry,
            buckets=batch_labels(MOST_IMAGES),
        )
        self._gpu_queue = Histogram(
            "sdxl_denoise_step_gpu_queue_seconds",
            "Time a step waited in the GPU's queue before it started; near 0 the GPU had waited "
            "for the host. Without a GPU nothing is observed.",
            registry=registry,
            buckets=families.gpu_queue,
        )
        self.recompiles = Counter(
            "sdxl_recompiles",
            "Runs after warm-up that needed another compilation; they ran eagerly instead.",
            registry=registry,
        )
        self.cold_runs = Counter(
            "sdxl_cold_shape_runs",
            "Runs at a shape that was not warm, served eagerly.",
            registry=registry,
        )
        self._flops_done = Counter(
            "sdxl_model_flops",
            "Nominal FLOPs of the model in runs at warm shapes.",
            registry=registry,
        )
        self._run_seconds = Counter(
            "sdxl_run_seconds",
            "Time on the GPU's clock of the runs that sdxl_model_flops_total counts.",
            registry=registry,
        )
        self.declare((), 1)

    def declare(self, shapes: Sequence[str], max_batch: int) -> None:
        self._step_durations = {
            (shape, guidance, batch): self._step_duration.labels(
                shape, _GUIDANCE[guidance], str(batch)
            )
            for shape in (*shapes, COLD_SHAPE)
            for guidance in _GUIDANCE
            for batch in batch_labels(max_batch)
        }

    def observe_stage(self, name: str, duration_ns: float, exemplar: Exemplar) -> None:
        observe(self._stages[name], duration_ns / 1e9, exemplar, self._count_fault)

    def observe(self, run: RunTiming, exemplar: Exemplar) -> None:
        observe(self._batch_sizes, run.batch_size, exemplar, self._count_fault)
        for stage in (*run.stages, *run.between_steps):
            self.observe_stage(stage.name, stage.duration_ns, exemplar)
        for guidance, steps in run.steps_by_guidance.items():
            durations = self._durations_of(run, guidance)
            for step in steps:
                observe(durations, step.duration_ns / 1e9, exemplar, self._count_fault)
        if run.clock != "host":
            for step in run.steps:
                observe(self._gpu_queue, step.gpu_queue_ns / 1e9, exemplar, self._count_fault)
        self._count_flops(run)

    def _durations_of(self, run: RunTiming, guidance: bool) -> Histogram:
        """The series of a run's steps with or without guidance."""
        batch = min(2 ** (run.batch_size - 1).bit_length(), MOST_IMAGES)
        durations = self._step_durations.get((run.shape, guidance, batch))
        if durations is None:
            # A batch size that was not declared is not warm, whatever its shape.
            largest = max(batch for _, _, batch in self._step_durations)
            durations = self._step_durations[COLD_SHAPE, guidance, min(batch, largest)]
        return durations

    def flops_of(self, run: RunTiming) -> tuple[float, float]:
        """The run's nominal FLOPs and its seconds on the GPU's clock; 0 and 0 if its shape is not
        warm."""
        flops = self.flops.get(run.shape)
        if flops is None or not run.stages:
            return 0.0, 0.0
        return flops.of(run), (run.stages[-1].end_ns - run.stages[0].start_ns) / 1e9

    def _count_flops(self, run: RunTiming) -> None:
        flops, seconds = self.flops_of(run)
        # Both or none: utilisation divides the two sums, so they must count the same runs.
        if is_countable(seconds, self._count_fault):
            self._flops_done.inc(flops)
            self._run_seconds.inc(seconds)
