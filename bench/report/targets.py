"""The table of targets, with the figures of the latest measurement session on a GPU.

Only figures measured on CUDA at 1024x1024 with SDXL base's architecture are shown; every other row
says "not measured". Where several scenarios reach a target, the fastest is shown and named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.errors import ResultFileError
from bench.harness.result_file import BenchResult, MeasuredScenario
from bench.harness.scenarios import OFFLINE_STEPS
from bench.stats.intervals import interval
from serve.settings import RANDOM_SDXL_BASE, SDXL_BASE

SHAPE = "1024x1024"
MODELS = (SDXL_BASE, RANDOM_SDXL_BASE)
REQUEST_STEPS = 30
NOT_MEASURED = "not measured"
END = "-bench.json"


@dataclass(frozen=True)
class SessionResults:
    """The files of a measurement session: the timed scenarios, and the other pieces by name."""

    result: BenchResult
    others: Mapping[str, Mapping[str, Any]]

    def best(
        self, key: Callable[[MeasuredScenario], float], **wanted: object
    ) -> MeasuredScenario | None:
        """The served scenario with the smallest `key`, of this quantization, images and steps.

        Without a quantization it is lossless.
        """
        quantize = wanted.get("quantize", "none")
        found = [
            s
            for s in self.result.of_side("head").values()
            if not s.calibration
            and s.settings.get("quantize", "none") == quantize
            and (quantize != "none" or not s.lossy)
            and s.images == wanted.get("images", 1)
            and s.steps == wanted.get("steps")
        ]
        return min(found, key=key, default=None)


@dataclass(frozen=True)
class Target:
    """One row: its name, the best figure that others publish, and how to read the results."""

    name: str
    published: str
    value: Callable[[SessionResults], str | None]


def _image_step(**wanted: object) -> Callable[[SessionResults], str | None]:
    def value(results: SessionResults) -> str | None:
        best = results.best(lambda s: s.step_ms / s.images, **wanted)
        if best is None:
            return None
        return _with_interval([r.step_ms / best.images for r in best.requests], "ms", best.name)

    return value


def _images_per_second(quantize: str) -> Callable[[SessionResults], str | None]:
    def value(results: SessionResults) -> str | None:
        best = results.best(
            lambda s: -s.images_per_second, quantize=quantize, images=8, steps=OFFLINE_STEPS
        )
        if best is None:
            return None
        rates = [1000 * best.images / r.total_ms for r in best.requests]
        return _with_interval(rates, "images/s", best.name)

    return value


def _decode(results: SessionResults) -> str | None:
    best = results.best(lambda s: s.stage_ms("vae_decode") or float("inf"))
    if best is None or best.stage_ms("vae_decode") is None:
        return None
    times = [r.stages_ms["vae_decode"] for r in best.requests if "vae_decode" in r.stages_ms]
    return _with_interval(times, "ms", best.name)


def _request(results: SessionResults) -> str | None:
    if results.result.workload.steps != REQUEST_STEPS:
        return None
    best = results.best(lambda s: s.request_ms)
    return (
        None
        if best is None
        else _with_interval([r.total_ms for r in best.requests], "ms", best.name)
    )


def _tracing(results: SessionResults) -> str | None:
    micro = results.others.get("micro")
    if micro is None or micro["device"] == "cpu":
        return None
    cost = {one["name"]: one for one in micro["costs"]}
    calls = micro["clock_calls_a_step"]

    def a_step(which: str) -> float:
        return float(sum(calls[name] * cost[name][which] for name in ("mark", "poll")))

    text = f"{a_step('median_us'):.1f} ({a_step('low_us'):.1f} to {a_step('high_us'):.1f}) us"
    step = results.best(lambda s: s.step_ms)
    share = "" if step is None else f", {a_step('median_us') / step.step_ms / 10:.2f}% of a step"
    return f"{text}{share}"


def _warm_up(case: str) -> Callable[[SessionResults], str | None]:
    def value(results: SessionResults) -> str | None:
        found = results.others.get("coldstart-default")
        starts = [one for one in (found or {}).get("starts", ()) if one["case"] == case]
        if not starts:
            return None
        phases = [
            sum(ms for name, ms in one["phases_ms"].items() if name.startswith("compile")) / 1000
            for one in starts
        ]
        return _with_interval(phases, "s", "SDXL_COMPILE=default")

    return value


def _first_image(results: SessionResults) -> str | None:
    """A cold start in the compile mode that serves its first image soonest."""
    found = []
    for mode in ("off", "regional", "default"):
        kept = results.others.get(f"coldstart-{mode}")
        times = [s["first_image_s"] for s in (kept or {}).get("starts", ()) if s["case"] == "cold"]
        if times:
            found.append(
                (interval(times).point, _with_interval(times, "s", f"SDXL_COMPILE={mode}"))
            )
    return min(found)[1] if found else None


TARGETS: tuple[Target, ...] = (
    Target(
        "a step, batch 1, lossless",
        "44.3 ms (TensorRT, H100, UNet only)",
        _image_step(),
    ),
    Target("a step, batch 1, fp8", "", _image_step(quantize="fp8")),
    Target("an image's step, batch 8, lossless", "", _image_step(images=8)),
    Target(
        "an image's step, batch 8, fp8",
        "20.0 ms (MLPerf, H200, fp8, batch 32)",
        _image_step(images=8, quantize="fp8"),
    ),
    Target(
        "images a second offline, 20 steps, lossless",
        "",
        _images_per_second("none"),
    ),
    Target(
        "images a second offline, 20 steps, fp8",
        "2.399 (MLPerf, H200, fp8, batch 32)",
        _images_per_second("fp8"),
    ),
    Target("VAE decode", "127 ms (TensorRT, H100)", _decode),
    Target(f"a request of {REQUEST_STEPS} steps, with its JPEG", "", _request),
    Target("tracing on the model's thread, a step", "", _tracing),
    Target("warm-up of one shape, cold", "", _warm_up("cold")),
    Target("warm-up of one shape, from cache", "", _warm_up("from cache")),
    Target("process start to first image, cold", "", _first_image),
)


def _with_interval(values: Sequence[float], unit: str, how: str) -> str:
    """The median, with its interval if there is more than one value."""
    found = interval(values)
    digits = 3 if found.point < 10 else 2 if found.point < 100 else 0
    text = f"{found.point:.{digits}f}"
    if len(values) > 1:
        text += f" ({found.low:.{digits}f} to {found.high:.{digits}f})"
    return f"{text} {unit}, `{how}`"


def latest(folder: Path) -> SessionResults | None:
    """The newest session on CUDA, at full size, with the full-size model; None without one."""
    found: list[tuple[int, Path, BenchResult]] = []
    for path in folder.glob(f"*{END}"):
        try:
            result = BenchResult.read(path)
        except ResultFileError:
            continue  # `bench show` reports what is wrong with the file
        work = result.workload
        full_size = work.shape == SHAPE and work.model in MODELS and work.guidance
        if result.environment.device == "cuda" and full_size:
            found.append((result.sessions[-1].start.at_ns, path, result))
    if not found:
        return None
    _, path, result = max(found, key=lambda one: one[0])
    stem = path.name.removesuffix(END)
    others = {
        other.stem.removeprefix(f"{stem}-"): json.loads(other.read_text())
        for other in folder.glob(f"{stem}-*.json")
        if other != path
    }
    return SessionResults(result, others)


def render(folder: Path) -> str:
    """The targets as a Markdown table."""
    results = latest(folder)
    rows = [
        f"| {target.name} | {target.published or '-'} "
        f"| {(results and target.value(results)) or NOT_MEASURED} |"
        for target in TARGETS
    ]
    table = "\n".join(["| target | published | measured (95% interval) |", "|---|---|---|", *rows])
    if results is None:
        return table
    environment, code = results.result.environment, results.result.code[-1]
    day = datetime.fromtimestamp(results.result.sessions[-1].start.at_ns / 1e9, UTC).date()
    where = f"{environment.gpu}, torch {code.versions.get('torch', '?')}, {day}"
    return f"{where}: {results.result.workload.model} at {SHAPE}, guidance on.\n\n{table}"
