"""How long a replica needs for a run, as a result file measured it.

Two kinds of file are read: one of `python -m bench run`, whose scenarios with several images a run
give the times of shared runs, and one with a list of the service's own recorded requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError
from bench.harness.result_file import BenchResult, MeasuredScenario

MODEL_STAGES = frozenset(
    {"lora_swap", "text_encode", "vae_encode", "denoise", "vae_decode", "safety_check"}
)
"""The stages that hold the GPU; the others overlap the next run."""


@dataclass(frozen=True)
class ServiceTimes:
    """Measured seconds of runs by their number of images, and of the rest of a request.

    Attributes:
        runs: for each number of images the seconds of runs, ascending.
        outside: seconds of a request outside its run and its queue, ascending.
    """

    name: str
    machine: str
    workload: str
    steps: int
    runs: Mapping[int, NDArray[np.float64]]
    outside: NDArray[np.float64]

    def __post_init__(self) -> None:
        if 1 not in self.runs:
            raise BenchError(f"{self.name} has no runs of one image")

    @property
    def most_images(self) -> int:
        return max(self.runs)

    def run_seconds(self, images: int, share: float) -> float:
        """The seconds that this share of the runs do not exceed. A number of images that was not
        measured lies between the two that were."""
        if images in self.runs:
            return _at(self.runs[images], share)
        below = max(size for size in self.runs if size < images)
        above = min(size for size in self.runs if size > images)
        part = (images - below) / (above - below)
        return (1 - part) * _at(self.runs[below], share) + part * _at(self.runs[above], share)

    def outside_seconds(self, share: float) -> float:
        return _at(self.outside, share)

    def mean_run(self, images: int = 1) -> float:
        return float(np.mean(self.runs[images]))

    def images_per_second(self, images: int) -> float:
        """Of a replica that always has this many to draw at once."""
        return images / self.mean_run(images)


def _at(ascending: NDArray[np.float64], share: float) -> float:
    return float(ascending[int(share * len(ascending))])


def read(path: Path, scenarios: Sequence[str] = ()) -> ServiceTimes:
    """The service times of a result file.

    Args:
        scenarios: of a file of `bench run`: those to take, one for each number of images. Without,
            `default` and its `batch-N`.

    Raises:
        BenchError: it has no such times.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = None  # the reader of results says what is wrong
    if isinstance(document, list):
        if scenarios:
            raise BenchError(f"{path.name} holds recorded requests, not scenarios")
        return _of_requests(path, document)
    return _of_result(path, BenchResult.read(path), scenarios)


def _of_result(path: Path, result: BenchResult, names: Sequence[str]) -> ServiceTimes:
    known = result.of_side("head")
    if unknown := [name for name in names if name not in known]:
        raise BenchError(f"{path.name} has no scenario {unknown[0]}; it has {', '.join(known)}")
    wanted = names or [name for name in known if name == "default" or name.startswith("batch-")]
    chosen: dict[int, MeasuredScenario] = {}
    for name in wanted:
        scenario = known[name]
        if scenario.steps not in (None, result.workload.steps):
            raise BenchError(
                f"the scenario {name} has another number of steps than the file's workload"
            )
        if scenario.images in chosen:
            raise BenchError(
                f"{chosen[scenario.images].name} and {name} both have {scenario.images} images a "
                "run: name one of them with --scenario"
            )
        chosen[scenario.images] = scenario
    if 1 not in chosen:
        raise BenchError(f"{path.name} has no scenario of one image among those chosen")
    runs, outside = {}, []
    for images, scenario in chosen.items():
        seconds = []
        for request in scenario.requests:
            stages = request.stages_ms
            run = sum(ms for stage, ms in stages.items() if stage in MODEL_STAGES)
            if not run:
                raise BenchError(f"the scenario {scenario.name} has no times of the model's stages")
            seconds.append(run / 1000)
            if images == 1:
                outside.append(max(0.0, request.total_ms - run - stages.get("queue", 0.0)) / 1000)
        runs[images] = np.sort(np.array(seconds))
    workload, where = result.workload, result.environment
    return ServiceTimes(
        path.name,
        where.gpu or f"{where.cores} cores of {where.cpu}",
        f"{workload.model}, {workload.shape}, {workload.steps} steps",
        workload.steps,
        runs,
        np.sort(np.array(outside)),
    )


def _of_requests(path: Path, requests: list[Any]) -> ServiceTimes:
    try:
        runs = np.array([_seconds(request["run"]) for request in requests])
        whole = np.array([_seconds(request) for request in requests])
        queued = np.array(
            [
                sum(_seconds(stage) for stage in request["stages"] if stage["name"] == "queue")
                for request in requests
            ]
        )
        facts = requests[0]["facts"]
        steps = int(facts["num_inference_steps"])
        workload = f"{facts['model_name']}, {facts['width']}x{facts['height']}, {steps} steps"
    except (KeyError, IndexError, TypeError) as error:
        raise BenchError(f"{path.name} is not a list of recorded requests") from error
    outside = np.sort(np.maximum(0.0, whole - runs - queued))
    machine = path.name.partition("-")[0]
    return ServiceTimes(path.name, machine, workload, steps, {1: np.sort(runs)}, outside)


def _seconds(timing: Any) -> float:
    return (int(timing["end_ns"]) - int(timing["start_ns"])) / 1e9
