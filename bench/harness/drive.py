"""Load a scenario, and time one request of it as the caller sees it.

`Served` runs the service's own runtime, from `build_runtime` to the encoded image. `PlainCall`
calls diffusers' pipeline as its documentation does and records step times from outside, through
the scheduler. Both return the same `RequestSample`. torch is imported inside functions.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from prometheus_client import CollectorRegistry

from bench.errors import BenchError
from bench.harness.result_file import RequestSample
from bench.harness.scenarios import Scenario
from bench.harness.torch_state import (
    check_settings_unchanged,
    compiler_settings,
    release_memory,
)
from bench.harness.work import (
    GUIDANCE,
    PROMPT,
    ScenarioFailed,
    Work,
    check_can_run,
    dtype_name,
    one_line,
)
from kernels_warmup.warmup import RunKind
from metrics.clock import WallAnchor, make_clock
from metrics.records import RunTiming
from metrics.timeline import RunTimeline
from serve.engine.build import build_runtime
from serve.engine.call import Call
from serve.engine.runtime import Runtime
from serve.schema import TextToImageRequest
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from kernels_warmup.compile import CompiledModel
    from kernels_warmup.recipes import Recipe
    from serve.model.sdxl import SdxlModel

T = TypeVar("T")


class LoadedScenario(Protocol):
    """A scenario in memory, warm and ready to be timed."""

    def request(self, seed: int, round_number: int) -> RequestSample:
        """Run and time one request."""

    def with_pipeline(self, work: Callable[[Any], T]) -> T:
        """Call `work` with the diffusers pipeline, on the thread that owns it."""

    def close(self) -> None:
        """Free the memory."""


def load_scenario(scenario: Scenario, work: Work, runner: asyncio.Runner) -> LoadedScenario:
    """Load, compile and warm a scenario.

    Raises:
        CannotRun: this machine lacks what it needs.
        ScenarioFailed: loading, compiling or warming failed.
    """
    check_can_run(scenario, work)
    try:
        if scenario.way == "served":
            return Served(scenario, work, runner)
        return PlainCall(scenario, work)
    except Exception as error:
        # Compilers and drivers raise many types. One scenario must not end the others.
        release_memory()
        raise ScenarioFailed(one_line(error)) from error


# Through the service's runtime -------------------------------------------------------------------


class Served:
    """A scenario run by the service's runtime."""

    def __init__(self, scenario: Scenario, work: Work, runner: asyncio.Runner) -> None:
        self._scenario, self._work, self._runner = scenario, work, runner
        settings = ServeSettings.model_validate(
            {
                "model": work.model,
                "device": work.device,
                "dtype": dtype_name(scenario, work),
                "shapes": (work.shape,),
                "compile": scenario.compile,
                # Set here, so that the environment cannot change what a scenario is.
                "attention": "auto",
                "quantize": "none",
                "cache_dir": None,
                "guidance_scale": GUIDANCE,
                "ready_early": False,
                "deadline_seconds": 3600,
                "max_batch": scenario.images,
                "max_images": scenario.images,
                "batch_wait_ms": 0,
                "ENABLE_TRACING": False,
            }
        )
        self.runtime = build_runtime(
            settings,
            CollectorRegistry(),
            prepare=self._prepare,
            # Only this kind of run is timed, and each kind compiles graphs of its own.
            kinds=(RunKind(guided=True, images=scenario.images),),
        )
        try:
            runner.run(self.runtime.start())
        except BaseException:
            self.close()
            raise

    def _prepare(self, model: SdxlModel) -> CompiledModel | None:
        # What the compiler itself sets while it compiles, such as how many threads it uses, is no
        # fault of the scenario's; `LibrarySettings` puts it back before the next one.
        before = compiler_settings()
        compiled = prepare(self._scenario, model)
        check_settings_unchanged(before, compiler_settings())
        return compiled

    def request(self, seed: int, round_number: int) -> RequestSample:
        scenario, images = self._scenario, self._scenario.images
        # A commit without `num_images` is timed by the other scenarios.
        more: dict[str, Any] = {"num_images": images} if scenario.one_request else {}
        requests = [
            TextToImageRequest(
                prompt=PROMPT,
                num_inference_steps=scenario.steps or self._work.steps,
                guidance_scale=GUIDANCE,
                seed=seed * images + image,
                **more,
            )
            for image in range(1 if scenario.one_request else images)
        ]
        return self._runner.run(self._timed(requests, round_number))

    async def _timed(self, requests: list[TextToImageRequest], round_number: int) -> RequestSample:
        calls = [Call("/", "POST", self.runtime.tracing.identify()) for _ in requests]
        started_ns = time.time_ns()
        cpu_ns = time.process_time_ns()
        start_ns = time.perf_counter_ns()
        if len(requests) == 1:
            await self.runtime.generate(requests[0], calls[0])
        else:
            await self.runtime.generate_together(requests, calls)
        total_ns = time.perf_counter_ns() - start_ns
        cpu_ns = time.process_time_ns() - cpu_ns
        timings = [call.finish(200) for call in calls]
        runs = {each.run.run_id: each.run for each in timings if each.run is not None}
        if any(run.eager_fallback for run in runs.values()):
            raise RuntimeError("a run was not served compiled but fell back to running eagerly")
        if len(runs) != 1:
            raise RuntimeError(f"the images were drawn in {len(runs)} runs, not in one")
        timing = timings[0]
        assert timing.run is not None
        stages = (*timing.stages, *timing.run.stages)
        return sample_of(
            timing.run,
            round_number,
            started_ns=started_ns,
            total_ns=total_ns,
            cpu_ns=cpu_ns,
            stages_ms={stage.name: stage.duration_ns / 1e6 for stage in stages},
        )

    def with_pipeline(self, work: Callable[[Any], T]) -> T:
        def on_thread(model: SdxlModel) -> T:
            import torch

            with torch.no_grad():
                return work(model.pipeline)

        return self.runtime.on_model(on_thread).result()

    def close(self) -> None:
        self.runtime.close(1)
        del self.runtime
        release_memory()


def prepare(scenario: Scenario, model: SdxlModel) -> CompiledModel | None:
    """Compile a loaded model in the scenario's way. Runs on the thread that owns the model."""
    from kernels_warmup.compile import compile_model
    from kernels_warmup.recipes import mode_for

    recipe = None if scenario.recipe is None else recipe_of(scenario.recipe)
    decoder_recipe = None if scenario.decoder is None else recipe_of(scenario.decoder)
    return compile_model(
        model.pipeline,
        mode_for(scenario.compile, model.device),
        attention=scenario.attention,  # type: ignore[arg-type]
        quantize=scenario.quantize,  # type: ignore[arg-type]
        recipe=recipe,
        decoder_recipe=decoder_recipe,
    )


def recipe_of(fields: Any) -> Recipe:
    """A recipe with these fields set and everything else off."""
    from kernels_warmup.recipes import RECIPES

    return replace(RECIPES["off"], **fields)


def check_entry_points() -> None:
    """Raise BenchError if the imported commit lacks a function or argument that `Served` uses."""
    import inspect

    for name in ("prepare", "kinds"):
        if name not in inspect.signature(build_runtime).parameters:
            raise BenchError(f"its serve.engine.build.build_runtime has no argument `{name}`")
    for name in ("generate", "on_model"):
        if not hasattr(Runtime, name):
            raise BenchError(f"its serve.engine.runtime.Runtime has no method `{name}`")


# Through a plain diffusers call ------------------------------------------------------------------


class PlainCall:
    """diffusers' pipeline, called as its documentation does; the model is not changed."""

    def __init__(self, scenario: Scenario, work: Work) -> None:
        import torch

        from serve.model.loading import load_model
        from serve.model.scheduler_watch import watch_scheduler

        self._work = work
        self.uploads = scenario.way == "documented"
        dtype = dtype_name(scenario, work)
        model = load_model(work.model, None, work.device, dtype)
        self.pipeline = model.pipeline
        if self.pipeline.vae.dtype != getattr(torch, dtype):
            # `load_model` loads a decoder that overflows in float16 as bfloat16. The documented
            # example converts it instead.
            self.pipeline.vae.to(getattr(torch, dtype))
        self._clock = make_clock(work.device)
        self._watch_scheduler = watch_scheduler
        # As documented: one call warms everything that a request uses.
        self.request(0, 0)

    def call(self, seed: int) -> Any:
        """Call the pipeline; returns a PIL image."""
        import torch

        shape = self._work.shape
        return self.pipeline(
            PROMPT,
            height=shape.height,
            width=shape.width,
            num_inference_steps=self._work.steps,
            # As documented, but with a seed, so that all scenarios draw the same image.
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]

    def request(self, seed: int, round_number: int) -> RequestSample:
        anchor = WallAnchor.now()
        shape = str(self._work.shape)
        started_ns = time.time_ns()
        cpu_ns = time.process_time_ns()
        start_ns = time.perf_counter_ns()
        timeline = RunTimeline(self._clock, anchor, run_id="", shape=shape, guidance=True)
        with self._watch_scheduler(
            self.pipeline.scheduler, timeline.loop_begins, timeline.step_enqueued
        ):
            image = self.call(seed)
        drawn_ns = time.perf_counter_ns()
        if self.uploads:
            png_data_uri(image)
        end_ns = time.perf_counter_ns()
        cpu_ns = time.process_time_ns() - cpu_ns
        run = timeline.finish()
        stages = {
            "text_encode": (run.steps[0].start_ns - anchor.to_unix(start_ns)) / 1e6,
            "denoise": (run.steps[-1].end_ns - run.steps[0].start_ns) / 1e6,
            # Up to the pixels in host memory, as a PIL image.
            "vae_decode": (anchor.to_unix(drawn_ns) - run.steps[-1].end_ns) / 1e6,
        }
        if self.uploads:
            stages["image_encode"] = (end_ns - drawn_ns) / 1e6
        return sample_of(
            run,
            round_number,
            started_ns=started_ns,
            total_ns=end_ns - start_ns,
            cpu_ns=cpu_ns,
            stages_ms=stages,
        )

    def with_pipeline(self, work: Callable[[Any], T]) -> T:
        import torch

        with torch.no_grad():
            return work(self.pipeline)

    def close(self) -> None:
        del self.pipeline
        release_memory()


def png_data_uri(image: Any) -> str:
    """Encode a PIL image as fal's `Image.from_pil` does: PNG at level 1, in a base64 data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# One request's sample ----------------------------------------------------------------------------


def sample_of(
    run: RunTiming,
    round_number: int,
    *,
    started_ns: int,
    total_ns: int,
    cpu_ns: int,
    stages_ms: dict[str, float],
) -> RequestSample:
    """A finished run as the result file keeps it, with the first step apart."""
    steps = [step.duration_ns / 1e6 for step in run.steps]
    on_device = run.clock != "host"
    return RequestSample(
        round=round_number,
        started_ns=started_ns,
        total_ms=total_ns / 1e6,
        first_step_ms=steps[0],
        steps_ms=tuple(steps[1:]),
        gpu_queue_ms=tuple(step.gpu_queue_ns / 1e6 for step in run.steps) if on_device else (),
        stages_ms={name: max(0.0, value) for name, value in stages_ms.items()},
        cpu_ms=cpu_ns / 1e6,
    )
