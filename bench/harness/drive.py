"""Scenarios made ready, and one request of one of them timed as its caller sees it.

`Served` is `serve`'s own runtime, from `build_runtime` to the encoded image; `PlainCall` is
diffusers' pipeline called as the documentation does, watched from outside through its scheduler.
Both give the same `RequestSample`. torch is reached inside functions.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from prometheus_client import CollectorRegistry

from bench.errors import BenchError
from bench.harness.result_file import Flops, RequestSample
from bench.harness.scenarios import KERNELS, Scenario
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import RunKind
from metrics.clock import WallAnchor, make_clock
from metrics.records import RunTiming
from metrics.timeline import RunTimeline
from serve.engine.call import Call
from serve.engine.runtime import build_runtime
from serve.schema import TextToImageRequest
from serve.settings import DEMO_MODEL, ServeSettings

if TYPE_CHECKING:
    import torch

    from kernels_warmup.compile import CompiledModel
    from kernels_warmup.numerical_error import StepInputs
    from kernels_warmup.recipes import Recipe
    from serve.model.sdxl import SdxlModel

T = TypeVar("T")

PROMPT = "a small red circle left of a large blue square on a white background"
GUIDANCE = 5.0
"""diffusers' own default, and ours."""


@dataclass(frozen=True)
class Work:
    """What every request of a run asks for, and of which model."""

    model: str
    device: str
    """As torch names it."""
    shape: CompiledShape
    steps: int

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


class CannotRun(Exception):
    """A scenario that needs what this machine lacks; the message says what, in a sentence."""


class ScenarioFailed(CannotRun):
    """A scenario that was tried here and failed."""


class Driven(Protocol):
    """A scenario in memory, warm."""

    def request(self, seed: int, round_number: int) -> RequestSample:
        """One request of `images` pictures, timed."""

    def with_pipeline(self, work: Callable[[Any], T]) -> T:
        """Do something with its diffusers pipeline, on the thread that owns it."""

    def close(self) -> None:
        """Give the memory back."""


def refuse_what_cannot_run(scenario: Scenario, work: Work) -> None:
    """Raises CannotRun where a scenario means nothing here or needs what is not here."""
    if scenario.cuda_only and not work.on_cuda:
        raise CannotRun("it needs a CUDA device, and there is none here")
    if scenario.cpu_only and work.on_cuda:
        raise CannotRun("it is for a CPU, and this is a GPU")
    if scenario.quantize != "none":
        import torch

        from kernels_warmup.quantize import why_unusable as why_unquantizable

        reason = why_unquantizable(
            scenario.quantize,  # type: ignore[arg-type]
            torch.device(work.device),
        )
        if reason is not None:
            raise CannotRun(reason)
    if any((scenario.recipe or {}).get(field) for field in KERNELS):
        import torch

        try:
            from kernels_warmup.triton import why_unusable as why_no_kernels
        except ImportError:
            raise CannotRun("that commit has no kernels of its own") from None
        reason = why_no_kernels(
            torch.device(work.device), getattr(torch, dtype_name(scenario, work))
        )
        if reason is not None:
            raise CannotRun(reason)
    if scenario.attention != "auto":
        import torch

        from kernels_warmup.attention import why_unusable

        reason = why_unusable(
            scenario.attention,  # type: ignore[arg-type]
            torch.device(work.device),
            getattr(torch, dtype_name(scenario, work)),
        )
        if reason is not None:
            raise CannotRun(reason)


def drive(scenario: Scenario, work: Work, runner: asyncio.Runner) -> Driven:
    """Load, compile and warm a scenario.

    Raises:
        CannotRun: it needs what is not here.
        ScenarioFailed: it failed to get ready.
    """
    refuse_what_cannot_run(scenario, work)
    try:
        if scenario.way == "served":
            return Served(scenario, work, runner)
        return PlainCall(scenario, work)
    except Exception as error:
        # A compiler, a driver, memory: one scenario never ends the others.
        release_memory()
        raise ScenarioFailed(told(error)) from error


def dtype_name(scenario: Scenario, work: Work) -> str:
    """The UNet's type, by torch's name."""
    if scenario.dtype == "half":
        return "float16" if work.on_cuda else "float32"
    if scenario.dtype == "auto":
        return "bfloat16" if work.on_cuda else "float32"
    return scenario.dtype


class Served:
    """A scenario behind `serve`'s runtime."""

    def __init__(self, scenario: Scenario, work: Work, runner: asyncio.Runner) -> None:
        self._scenario, self._work, self._runner = scenario, work, runner
        settings = ServeSettings.model_validate(
            {
                "model": work.model,
                "device": work.device,
                "dtype": dtype_name(scenario, work),
                "shapes": (work.shape,),
                "compile": scenario.compile,
                # Said, so that nobody's environment changes what a scenario is.
                "attention": "auto",
                "quantize": "none",
                "cache_dir": None,
                "guidance_scale": GUIDANCE,
                "ready_early": False,
                "deadline_seconds": 3600,
                "ENABLE_TRACING": False,
            }
        )
        self._settings_before: dict[str, object] = {}
        self.runtime = build_runtime(
            settings,
            CollectorRegistry(),
            prepare=self._prepare,
            # No other kind of run is timed, and each has graphs of its own to compile.
            kinds=(RunKind(guided=True, images=scenario.images),),
        )
        try:
            runner.run(self.runtime.start())
            after = self.runtime.on_model(lambda _: compiler_settings()).result()
            refuse_changed_settings(self._settings_before, after)
        except BaseException:
            self.close()
            raise

    def _prepare(self, model: SdxlModel) -> CompiledModel | None:
        # Compared here and after the start: the settings of newer torch versions belong to one turn
        # of the model's thread, those of older ones to the process.
        self._settings_before = compiler_settings()
        compiled = prepare(self._scenario, model)
        refuse_changed_settings(self._settings_before, compiler_settings())
        return compiled

    def request(self, seed: int, round_number: int) -> RequestSample:
        images = self._scenario.images
        requests = [
            TextToImageRequest(
                prompt=PROMPT,
                num_inference_steps=self._scenario.steps or self._work.steps,
                guidance_scale=GUIDANCE,
                seed=seed * images + image,
            )
            for image in range(images)
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
        timing = calls[0].finish(200)
        assert timing.run is not None
        if timing.run.eager_fallback:
            raise RuntimeError("a run was not served compiled but fell back to running eagerly")
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
    """Make a loaded model fast in the scenario's way, on the thread that owns it."""
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
    """A recipe that does nothing but what these fields say."""
    from kernels_warmup.recipes import RECIPES

    return replace(RECIPES["off"], **fields)


class PlainCall:
    """diffusers' pipeline, called as a user calls it; nothing of the model is changed."""

    def __init__(self, scenario: Scenario, work: Work) -> None:
        import torch

        from serve.model.scheduler_watch import watch_scheduler
        from serve.model.sdxl import load_model

        self._work = work
        self.uploads = scenario.way == "documented"
        dtype = dtype_name(scenario, work)
        model = load_model(work.model, None, work.device, dtype)
        self.pipeline = model.pipeline
        if self.pipeline.vae.dtype != getattr(torch, dtype):
            # Ours loads an overflowing float16 decoder in bfloat16; the documented one recasts it.
            self.pipeline.vae.to(getattr(torch, dtype))
        self._clock = make_clock(work.device)
        self._watch_scheduler = watch_scheduler
        # As documented: one call warms everything that a request uses.
        self.request(0, 0)

    def call(self, seed: int) -> Any:
        """The call itself; returns a PIL image."""
        import torch

        shape = self._work.shape
        return self.pipeline(
            PROMPT,
            height=shape.height,
            width=shape.width,
            num_inference_steps=self._work.steps,
            # As documented but for the seed, so that all scenarios draw the same.
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
            # To pixels in host memory, as PIL has them.
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
    """A PIL image as fal's `Image.from_pil` makes it, held in memory: PNG at level 1, in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def sample_of(
    run: RunTiming,
    round_number: int,
    *,
    started_ns: int,
    total_ns: int,
    cpu_ns: int,
    stages_ms: dict[str, float],
) -> RequestSample:
    """A finished run as the result file keeps it: the first step apart."""
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


class References:
    """float32 forwards of the weights that scenarios of each type start with."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._by_dtype: dict[str, tuple[StepInputs, torch.Tensor]] = {}

    def error(self, driven: Driven, dtype: str) -> float | None:
        """Relative error of one of its forwards; None where it is no number."""
        from kernels_warmup.numerical_error import forward_once, relative_error, takes_zero_text

        inputs, reference = self.of(dtype)

        def once(pipeline: Any) -> torch.Tensor:
            unet = pipeline.unet
            zero_text = takes_zero_text(unet)
            return forward_once(unet, inputs.cast(unet.dtype), zero_text=zero_text).clone()

        error = relative_error(driven.with_pipeline(once), reference)
        return error if math.isfinite(error) else None

    def of(self, dtype: str) -> tuple[StepInputs, torch.Tensor]:
        """Seeded inputs, and their forward with weights of that type in float32 arithmetic."""
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = self._compute(dtype)
            release_memory()
        return self._by_dtype[dtype]

    def _compute(self, dtype: str) -> tuple[StepInputs, torch.Tensor]:
        import torch

        from kernels_warmup.numerical_error import StepInputs, forward_once
        from serve.model.sdxl import load_model

        work = self._work
        unet = load_model(work.model, None, work.device, dtype).pipeline.unet.float()
        device = torch.device(work.device)
        # Drawn in the narrowest type, so that every scenario gets the very same numbers; without a
        # negative prompt, as the timed requests are.
        drawn = StepInputs.draw(unet, work.shape, 1, device, torch.bfloat16)
        inputs = drawn.without_negative()
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with torch.no_grad():
                return inputs, forward_once(unet, inputs.cast(torch.float32))
        finally:
            torch.backends.cudnn.allow_tf32 = tf32


def count_flops(driven: Driven, work: Work, images: int) -> Flops:
    """Nominal FLOPs of one run, from the configurations of what is loaded."""
    from kernels_warmup.flops import count_run

    counted = driven.with_pipeline(
        lambda pipeline: count_run(pipeline, work.shape, guidance=True, images=images)
    )
    return Flops(counted.text_encode, counted.step, counted.vae_decode)


def choose_work(model: str | None, device: str, shape: str | None, steps: int) -> Work:
    """What is left open, decided as the service decides it.

    Raises:
        BenchError: the device, the size or the number of steps is not allowed.
    """
    from serve.errors import ModelError
    from serve.model.sdxl import choose_device
    from serve.settings import SDXL_BASE

    if steps < 2:
        raise BenchError(f"{steps} steps are not enough: the first is not steady; 2 and more are")
    try:
        found = str(choose_device(device))
        size = None if shape is None else CompiledShape.parse(shape)
    except (ModelError, ValueError, RuntimeError) as error:
        raise BenchError(str(error)) from None
    if model is None:
        model = SDXL_BASE if found.startswith("cuda") else DEMO_MODEL
    if size is None:
        side = 128 if model == DEMO_MODEL else 1024
        size = CompiledShape(side, side)
    return Work(model, found, size, steps)


def compiler_settings() -> dict[str, object]:
    """Every setting of dynamo and inductor by name, as this thread sees them."""
    import torch._dynamo.config
    import torch._inductor.config

    found: dict[str, object] = {}
    for module in (torch._dynamo.config, torch._inductor.config):
        copied = module.get_config_copy()
        found |= {f"{module.__name__}.{name}": value for name, value in copied.items()}
    return found


def refuse_changed_settings(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    """Raises RuntimeError where a setting changed: it would change how the next scenario compiles,
    and no two of them could be compared."""
    changed = sorted(name for name in after if before.get(name) != after[name])
    if changed:
        raise RuntimeError(f"it changed the compiler's settings: {', '.join(changed)}")


class LibrarySettings:
    """torch's process-wide settings as one scenario left them.

    Preparing a compiled model changes some, and the baselines must meet the library's defaults.
    """

    def __init__(self) -> None:
        import torch

        self._compiler = compiler_settings()
        self._benchmark = torch.backends.cudnn.benchmark
        self._tf32 = torch.backends.cudnn.allow_tf32
        self._matmul_tf32 = torch.backends.cuda.matmul.allow_tf32

    def apply(self) -> None:
        import torch

        for name, value in compiler_settings().items():
            if value != self._compiler[name]:
                module, _, setting = name.partition(".config.")
                setattr(sys.modules[f"{module}.config"], setting, self._compiler[name])
        torch.backends.cudnn.benchmark = self._benchmark
        torch.backends.cudnn.allow_tf32 = self._tf32
        torch.backends.cuda.matmul.allow_tf32 = self._matmul_tf32


def device_memory(device: str) -> tuple[int, int]:
    """Bytes in use, by torch on a GPU and by the process on a CPU, and bytes that are free."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo").read_text()
    available = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    return resident, int(available.split()[1]) * 1024


def peak_memory(device: str) -> int:
    """The most bytes in use since this was last asked."""
    import torch

    if not device.startswith("cuda"):
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def release_memory() -> None:
    """Give back what nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def told(error: BaseException) -> str:
    """An exception in one line. Its prompt is the bench's own, so it holds no user's text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def check_entry_points() -> None:
    """Whether the code imported here has what is driven.

    Raises:
        BenchError: it has not.
    """
    import inspect

    from serve.engine.runtime import Runtime

    for name in ("prepare", "kinds"):
        if name not in inspect.signature(build_runtime).parameters:
            raise BenchError(f"serve.engine.runtime.build_runtime takes no `{name}`")
    for name in ("generate", "on_model"):
        if not hasattr(Runtime, name):
            raise BenchError(f"serve.engine.runtime.Runtime has no `{name}`")
