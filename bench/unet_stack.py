"""What each change buys: one denoising step and one VAE decode, measured for a stack of recipes.

    python -m bench.unet_stack --out FILE [--scenario NAME ...] [--seconds-limit N] [--tiny]

SDXL base's architecture with seeded random weights, so that nothing is downloaded; step latency
hardly depends on the weights' values. A step is what diffusers' pipeline does: scale the latents,
one UNet forward over both halves of the guidance, guide, one Euler step. Scenarios that fit in
memory together are timed in interleaved rounds; the statistic is each run's median over its
steady steps. The file is written after every scenario and continued when it exists.
"""

# ruff: noqa: TID253 - this program is nothing but model code; `python -m bench` never imports it

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import diffusers
import torch
import torch._dynamo
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn

from kernels_warmup.attention import Backend, attend, why_unusable
from kernels_warmup.compile import (
    GRAPHS_PER_FUNCTION,
    RECIPES,
    TUNED,
    PerShape,
    Recipe,
    UNetForward,
    compile_decoder,
    compile_unet,
)
from kernels_warmup.quantize import Quantization
from kernels_warmup.shapes import CompiledShape
from serve.sdxl_base import SCHEDULER_CONFIG, UNET_CONFIG, VAE_CONFIG

TINY_UNET = UNET_CONFIG | {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 2, 2),
    "norm_num_groups": 8,
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
TINY_VAE = VAE_CONFIG | {
    "block_out_channels": (16, 16, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
}
GUIDANCE = 5.0
SKIPPED_STEPS = 2
"""A run's first steps also fill the text buffers and the launch queue."""
FIRST_RUNS = 3
DECODES = 6
"""Decodes a run, the skipped ones counted in."""
RESERVE_SECONDS = 45.0
"""Kept for the interleaved rounds and the profile when scenarios are started."""


# Scenarios ---------------------------------------------------------------------------------------

PLAIN = Recipe("none", "none", {}, False, False, False, False)
"""diffusers' modules, untouched."""


@dataclass(frozen=True)
class Scenario:
    """One row of the stack."""

    name: str
    what: str
    expected_seconds: float
    """To prepare and time it; what cannot fit in the time left is not started."""
    kind: Literal["step", "decode", "operators"] = "step"
    recipe: Recipe | None = None
    """None: diffusers' modules untouched."""
    dtype: torch.dtype = torch.bfloat16
    attention: Backend = "auto"
    quantize: Quantization = "none"
    images: int = 1
    of: str | None = None
    """Another scenario whose compiled function this one runs in another way."""
    way: Literal["launched", "whole step"] | None = None
    resident: bool = True
    """Stays in memory for the interleaved rounds."""
    predicted_ms: float | None = None
    """Written before anything was measured, for an H100 at 1024x1024."""


CAPTURED = replace(PLAIN, replay="captured")
LAST = replace(CAPTURED, channels_last=True)
FUSED = replace(LAST, fuse_qkv=True)
TEXT = replace(FUSED, text_once=True)
BLOCKS = replace(TEXT, scope="blocks")
WHOLE = replace(TEXT, scope="whole")
TREES = replace(WHOLE, replay="trees")
GEMM = replace(WHOLE, options={"max_autotune_gemm": True, "max_autotune_conv_backends": "ATEN"})
TMA = replace(WHOLE, options=TUNED)
COORDINATE = replace(WHOLE, options={"coordinate_descent_tuning": True})
MAX = replace(TEXT, scope="whole", options=RECIPES["max"].options)

# fmt: off
SCENARIOS: tuple[Scenario, ...] = (
    Scenario("fp16-eager", "as documented: fp16, diffusers' modules", 15,
             dtype=torch.float16, predicted_ms=52),
    Scenario("bf16-eager", "bf16, diffusers' modules", 12, predicted_ms=52),
    Scenario("captured", "bf16, one captured CUDA graph, cudnn.benchmark", 10,
             recipe=CAPTURED, predicted_ms=46),
    Scenario("captured-last", "+ channels_last", 12,
             recipe=LAST, predicted_ms=43),
    Scenario("captured-fused", "+ fused QKV", 12,
             recipe=FUSED, predicted_ms=42.2),
    Scenario("captured-text", "+ text K/V and added condition once", 12,
             recipe=TEXT, predicted_ms=41),
    Scenario("captured-flash", "the same, FlashAttention 2 by name", 10,
             recipe=TEXT, attention="flash", predicted_ms=41),
    Scenario("captured-cudnn", "the same, cuDNN attention", 10,
             recipe=TEXT, attention="cudnn", predicted_ms=40),
    Scenario("operators", "each product, convolution and attention by itself", 45,
             kind="operators"),
    Scenario("whole", "+ compiled whole, cuBLAS products, captured", 130,
             recipe=WHOLE, attention="cudnn", predicted_ms=31),
    Scenario("whole-launched", "the same, launched kernel by kernel", 3,
             of="whole", way="launched", predicted_ms=32),
    Scenario("whole-step", "the same, one graph for the whole step", 5,
             of="whole", way="whole step", predicted_ms=30.9),
    Scenario("vae-fp32-eager", "decode as documented for fp16: upcast to float32", 8,
             kind="decode", dtype=torch.float32, resident=False, predicted_ms=330),
    Scenario("vae-bf16-eager", "decode in bf16, diffusers' modules", 6,
             kind="decode", predicted_ms=62),
    Scenario("vae-captured", "+ channels_last, attention in bf16 products, captured", 8,
             kind="decode", recipe=replace(LAST, vae_attention=True), predicted_ms=50),
    Scenario("vae-whole", "+ compiled whole", 50,
             kind="decode", recipe=replace(WHOLE, vae_attention=True), predicted_ms=31),
    Scenario("blocks", "compiled block by block (regional), captured", 45,
             recipe=BLOCKS, attention="cudnn", predicted_ms=33),
    Scenario("whole-tma", "+ products tuned, persistent TMA template", 190,
             recipe=TMA, attention="cudnn", predicted_ms=29.5),
    Scenario("whole-tma-step", "the same, one graph for the whole step", 5,
             of="whole-tma", way="whole step", predicted_ms=29.4),
    Scenario("blocks-fp8", "lossy: fp8 linears, block by block", 50,
             recipe=BLOCKS, attention="cudnn", quantize="fp8", predicted_ms=26),
    Scenario("whole-fp8", "lossy: fp8 linears, compiled whole", 120,
             recipe=WHOLE, attention="cudnn", quantize="fp8", predicted_ms=24.5),
    Scenario("whole-coordinate", "whole + coordinate descent", 180,
             recipe=COORDINATE, attention="cudnn", predicted_ms=30.7),
    Scenario("blocks-x2", "2 images, block by block", 45, images=2, resident=False,
             recipe=BLOCKS, attention="cudnn", predicted_ms=60),
    Scenario("blocks-x4", "4 images, block by block", 45, images=4, resident=False,
             recipe=BLOCKS, attention="cudnn", predicted_ms=114),
    Scenario("blocks-x8", "8 images, block by block", 50, images=8, resident=False,
             recipe=BLOCKS, attention="cudnn", predicted_ms=222),
    Scenario("whole-trees", "whole, inductor's own graph trees", 90,
             recipe=TREES, attention="cudnn", predicted_ms=31.3),
    Scenario("whole-gemm", "products tuned without the TMA template", 200,
             recipe=GEMM, attention="cudnn", predicted_ms=30),
    Scenario("whole-xformers", "whole, xformers attention", 100,
             recipe=WHOLE, attention="xformers", predicted_ms=32),
    Scenario("max", "the mode `max`", 320,
             recipe=MAX, attention="cudnn", predicted_ms=29.2),
)
# fmt: on


# Time --------------------------------------------------------------------------------------------


class Stopwatch:
    """Marks between steps; read once, after the last. CUDA's own clock where there is one."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between neighbouring marks."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._cuda:
            torch.cuda.synchronize()
            return [float(a.elapsed_time(b)) for a, b in pairs]
        return [(b - a) * 1000 for a, b in pairs]


@dataclass(frozen=True)
class RunTime:
    """One run: the median of its steady steps, and the host's own time to enqueue a step."""

    median_ms: float
    host_ms: float


# The step ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepInputs:
    """Seeded inputs of one denoising run."""

    latents: torch.Tensor
    text: torch.Tensor
    added: dict[str, torch.Tensor]

    @classmethod
    def draw(
        cls, unet: Any, shape: CompiledShape, images: int, device: torch.device, dtype: torch.dtype
    ) -> StepInputs:
        draw = torch.Generator().manual_seed(20)
        pooled = unet.config.projection_class_embeddings_input_dim
        pooled -= 6 * unet.config.addition_time_embed_dim
        sides = [shape.height, shape.width, 0, 0, shape.height, shape.width]

        def random_tensor(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw).to(device, dtype)

        return cls(
            random_tensor(images, 4, *shape.latent),
            random_tensor(2 * images, 77, unet.config.cross_attention_dim),
            {
                "text_embeds": random_tensor(2 * images, pooled),
                "time_ids": torch.tensor([sides] * (2 * images), device=device, dtype=dtype),
            },
        )


def forward_once(forward: Callable[..., Any], inputs: StepInputs) -> torch.Tensor:
    """One guided UNet forward in the middle of the schedule, as its error is measured."""
    sample = torch.cat([inputs.latents] * 2)
    timestep = torch.tensor(601.0, device=sample.device)
    result = forward(
        sample,
        timestep,
        encoder_hidden_states=inputs.text,
        added_cond_kwargs=inputs.added,
        return_dict=False,
    )
    return cast(torch.Tensor, result[0])


class PipelineSteps:
    """Denoises as diffusers' pipeline does, with its scheduler, and marks every step."""

    def __init__(self, forward: Callable[..., Any], inputs: StepInputs) -> None:
        self._forward = forward
        self._inputs = inputs
        self.latents = inputs.latents

    def run(self, steps: int) -> RunTime:
        inputs, device = self._inputs, self._inputs.latents.device
        scheduler = EulerDiscreteScheduler(**SCHEDULER_CONFIG)
        scheduler.set_timesteps(steps, device=device)
        latents = inputs.latents * scheduler.init_noise_sigma
        scheduler.set_begin_index(0)
        watch = Stopwatch(device)
        began = time.perf_counter()
        watch.mark()
        for timestep in scheduler.timesteps:
            sample = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            noise = self._forward(
                sample,
                timestep,
                encoder_hidden_states=inputs.text,
                added_cond_kwargs=inputs.added,
                return_dict=False,
            )[0]
            without, with_text = noise.chunk(2)
            noise = without + GUIDANCE * (with_text - without)
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
            watch.mark()
        host_ms = (time.perf_counter() - began) * 1000 / steps
        self.latents = latents
        return RunTime(_steady_median(watch.milliseconds()), host_ms)


class WholeSteps:
    """The same step as one function of device tensors, captured whole on CUDA."""

    def __init__(self, unet: Any, step: PerShape, inputs: StepInputs, steps: int) -> None:
        device = inputs.latents.device
        scheduler = EulerDiscreteScheduler(**SCHEDULER_CONFIG)
        scheduler.set_timesteps(steps, device=device)
        self._inputs, self._scheduler = inputs, scheduler
        self._sigmas = scheduler.sigmas.to(device)
        self._timesteps = scheduler.timesteps.to(device)
        self._index = torch.zeros(1, dtype=torch.long, device=device)
        self.latents = torch.empty_like(inputs.latents)
        unet.forward.text.prepare_conditioning(inputs.text, inputs.added)
        self._graph: torch.cuda.CUDAGraph | None = None

        def one() -> None:
            sigma = self._sigmas.index_select(0, self._index).squeeze()
            following = self._sigmas.index_select(0, self._index + 1).squeeze()
            timestep = self._timesteps.index_select(0, self._index).squeeze()
            sample = torch.cat([self.latents] * 2) / (sigma**2 + 1) ** 0.5
            without, with_text = step.function(sample.to(self.latents.dtype), timestep).chunk(2)
            noise = without + GUIDANCE * (with_text - without)
            self.latents.copy_(self.latents.float() + noise.float() * (following - sigma))
            self._index.add_(1)

        self._one = one
        if device.type == "cuda":
            self._restart()
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), more_graphs():
                one()
                one()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            self._restart()
            with torch.cuda.graph(self._graph):
                one()

    def _restart(self) -> None:
        self.latents.copy_(self._inputs.latents * self._scheduler.init_noise_sigma)
        self._index.zero_()

    def run(self, steps: int) -> RunTime:
        if steps != len(self._timesteps):
            raise ValueError(f"captured for {len(self._timesteps)} steps, not {steps}")
        self._restart()
        watch = Stopwatch(self.latents.device)
        began = time.perf_counter()
        watch.mark()
        for _ in range(steps):
            if self._graph is None:
                self._one()
            else:
                self._graph.replay()
            watch.mark()
        host_ms = (time.perf_counter() - began) * 1000 / steps
        return RunTime(_steady_median(watch.milliseconds()), host_ms)


class Decodes:
    """Decodes the same latents again and again; one decode is one step."""

    def __init__(self, vae: Any, latents: torch.Tensor) -> None:
        self._vae = vae
        self._latents = latents

    def once(self) -> torch.Tensor:
        return cast(torch.Tensor, self._vae.decode(self._latents, return_dict=False)[0])

    def run(self, steps: int) -> RunTime:
        watch = Stopwatch(self._latents.device)
        began = time.perf_counter()
        watch.mark()
        for _ in range(steps):
            self.once()
            watch.mark()
        host_ms = (time.perf_counter() - began) * 1000 / steps
        return RunTime(_steady_median(watch.milliseconds()), host_ms)


def _steady_median(milliseconds: list[float]) -> float:
    return statistics.median(milliseconds[SKIPPED_STEPS:])


@contextmanager
def more_graphs() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=GRAPHS_PER_FUNCTION):
        yield


# Weights -----------------------------------------------------------------------------------------


class Weights:
    """The seeded weights, held once; every scenario's modules start as views of them."""

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self._configs = (TINY_UNET, TINY_VAE) if tiny else (UNET_CONFIG, VAE_CONFIG)
        self._states: list[dict[str, torch.Tensor]] = []
        for model, config in zip((UNet2DConditionModel, AutoencoderKL), self._configs, strict=True):
            torch.manual_seed(7)
            with device:
                built = model.from_config(config)
            self._states.append(built.to(torch.bfloat16).state_dict())

    def unet(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        return self._build(UNet2DConditionModel, 0, dtype)

    def vae(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        return self._build(AutoencoderKL, 1, dtype)

    def _build(self, model: Any, index: int, dtype: torch.dtype) -> Any:
        with torch.device("meta"):
            built = model.from_config(self._configs[index])
        state = {name: tensor.to(dtype) for name, tensor in self._states[index].items()}
        built.load_state_dict(state, assign=True)
        return built.eval().requires_grad_(False)


# The bench ---------------------------------------------------------------------------------------


def library_settings(scenario: Scenario) -> None:
    """diffusers' modules untouched keep the library's defaults, as a user would meet them."""
    torch.backends.cudnn.benchmark = scenario.recipe is not None or scenario.of is not None


@dataclass
class Prepared:
    """A scenario ready to be timed."""

    scenario: Scenario
    runs: PipelineSteps | WholeSteps | Decodes
    steps: int
    unet: Any = None
    function: PerShape | None = None
    recorded: list[float] = field(default_factory=list)
    """Each run's median, in milliseconds."""
    host: list[float] = field(default_factory=list)

    def time(self) -> None:
        library_settings(self.scenario)
        result = self.runs.run(self.steps)
        self.recorded.append(result.median_ms)
        self.host.append(result.host_ms)


class Bench:
    """Prepares scenarios one by one, times them, and writes down everything at once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.began = time.monotonic()
        self.limit: float = arguments.seconds_limit
        self.out = Path(arguments.out)
        self.shape: CompiledShape = arguments.shape
        self.tiny: bool = arguments.tiny
        self.steps: int = arguments.steps
        self.rounds: int = arguments.rounds
        self.profiled: list[str] = arguments.profile
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.prepared: dict[str, Prepared] = {}
        self.results: dict[str, Any] = {"scenarios": {}, "sessions": []}
        if self.out.exists():
            self.results = json.loads(self.out.read_text())
        self.session: dict[str, Any] = {
            "environment": environment(self.device, arguments.commit),
            "shape": str(self.shape),
            "tiny": self.tiny,
            "steps": self.steps,
            "state": [],
        }
        self.results["sessions"].append(self.session)

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.began)

    def write(self) -> None:
        self.session["seconds"] = round(time.monotonic() - self.began, 1)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1))
        os.replace(part, self.out)

    def measure(self, scenarios: list[Scenario]) -> None:
        if self.device.type == "cuda":
            # Starts the compile workers, which take seconds, while other things happen.
            import torch._inductor.async_compile  # noqa: F401
        self.session["ceilings"] = ceilings(self.device)
        self.say(f"ceilings {self.session['ceilings']}")
        self.weights = Weights(self.device, tiny=self.tiny)
        self._references()
        self.say("weights and references")
        for scenario in scenarios:
            needed = scenario.expected_seconds + RESERVE_SECONDS
            if self.left() < needed:
                self._record(scenario, skipped=f"{self.left():.0f} s left, {needed:.0f} needed")
                continue
            self._one(scenario)
        self._interleave()
        self._profiles()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def _record(self, scenario: Scenario, **entries: Any) -> None:
        row = {"what": scenario.what, "predicted_ms": scenario.predicted_ms, **entries}
        if "skipped" in entries and scenario.name in self.results["scenarios"]:
            return
        self.results["scenarios"][scenario.name] = row
        self.write()

    def _references(self) -> None:
        """One forward and one decode in float32, with the weights the others have."""
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        exact = self.weights.unet(torch.float32)
        self.inputs = StepInputs.draw(exact, self.shape, 1, self.device, torch.bfloat16)
        self.reference = forward_once(exact, _cast(self.inputs, torch.float32))
        vae = self.weights.vae(torch.float32)
        self.vae_latents = self.inputs.latents / vae.config.scaling_factor
        self.vae_reference = Decodes(vae, self.vae_latents.float()).once()
        del exact, vae
        self._tidy()

    def _one(self, scenario: Scenario) -> None:
        self.say(f"{scenario.name}: {scenario.what}")
        began = time.monotonic()
        before = self._memory()
        try:
            if scenario.kind == "operators":
                self.results["operators"] = time_operators(self.weights, self.inputs, self.device)
                self._record(scenario, seconds=round(time.monotonic() - began, 1))
                return
            if scenario.attention != "auto":
                reason = why_unusable(scenario.attention, self.device, scenario.dtype)
                if reason and not self.tiny:
                    self._record(scenario, skipped=reason)
                    return
            prepared = self._prepare(scenario)
            ready = time.monotonic()
            error = self._error(prepared)
            for _ in range(FIRST_RUNS):
                prepared.time()
        except Exception as failure:  # noqa: BLE001 - one scenario never ends the others
            self._record(
                scenario,
                failed=f"{type(failure).__name__}: {str(failure)[:600]}",
                where=traceback.format_exc()[-1500:],
                seconds=round(time.monotonic() - began, 1),
            )
            self.say(f"  failed: {type(failure).__name__}: {str(failure)[:200]}")
            self._tidy()
            return
        self._record(
            scenario,
            first_ms=_rounded(prepared.recorded),
            host_ms=_rounded(prepared.host),
            images=scenario.images,
            kind=scenario.kind,
            prepare_seconds=round(ready - began, 1),
            seconds=round(time.monotonic() - began, 1),
            error_vs_fp32=error,
            peak_memory_gib=round((self._memory(peak=True) - before) / 2**30, 2),
        )
        self.say(
            f"  {statistics.median(prepared.recorded):.3f} ms, host "
            f"{statistics.median(prepared.host):.2f} ms, error {error}, "
            f"prepared in {ready - began:.1f} s"
        )
        prepared.recorded.clear()
        prepared.host.clear()
        if scenario.resident:
            self.prepared[scenario.name] = prepared
        del prepared
        self._tidy()

    def _prepare(self, scenario: Scenario) -> Prepared:
        """Build, compile and run once, so that everything slow has happened."""
        if scenario.of is not None:
            return self._variant(scenario)
        usable = why_unusable(scenario.attention, self.device, scenario.dtype) is None
        backend: Backend = scenario.attention if usable else "auto"
        library_settings(scenario)
        if scenario.kind == "decode":
            vae = self.weights.vae(scenario.dtype)
            if scenario.recipe is not None:
                compile_decoder(vae, scenario.recipe)
            decodes = Decodes(vae, self.vae_latents.to(scenario.dtype))
            decodes.once()
            prepared = Prepared(scenario, decodes, min(self.steps, DECODES))
        else:
            unet = self.weights.unet(scenario.dtype)
            function = None
            if scenario.recipe is not None:
                function = compile_unet(unet, scenario.recipe, backend, scenario.quantize)
            inputs = self.inputs
            if scenario.images != 1:
                inputs = StepInputs.draw(
                    unet, self.shape, scenario.images, self.device, torch.bfloat16
                )
            inputs = _cast(inputs, scenario.dtype)
            steps = PipelineSteps(unet, inputs)
            forward_once(unet, inputs)
            prepared = Prepared(scenario, steps, self.steps, unet, function)
        prepared.runs.run(SKIPPED_STEPS + 1)
        return prepared

    def _variant(self, scenario: Scenario) -> Prepared:
        """Another way of running what an earlier scenario compiled."""
        base = self.prepared.get(cast(str, scenario.of))
        if base is None or base.function is None:
            raise LookupError(f"needs {scenario.of!r} in the same session")
        if scenario.way == "whole step":
            whole = WholeSteps(base.unet, base.function, self.inputs, self.steps)
            return Prepared(scenario, whole, self.steps, base.unet, base.function)
        launched = replace(cast(Recipe, base.scenario.recipe), replay="none")
        per_shape = PerShape(base.function.function, launched, self.device)
        forward = UNetForward(per_shape, base.unet.forward.text)
        steps = PipelineSteps(forward, self.inputs)
        steps.run(SKIPPED_STEPS + 1)
        return Prepared(scenario, steps, self.steps, base.unet, base.function)

    def _error(self, prepared: Prepared) -> float | None:
        """Relative error of one forward against float32; NaN is told, not hidden."""
        scenario = prepared.scenario
        if scenario.images != 1 or scenario.of is not None:
            return None
        if isinstance(prepared.runs, Decodes):
            result, reference = prepared.runs.once(), self.vae_reference
        else:
            inputs = _cast(self.inputs, scenario.dtype)
            result, reference = forward_once(prepared.unet, inputs), self.reference
        return relative_error(result, reference)

    def _interleave(self) -> None:
        """Rounds over all that is resident, in a new order each time."""
        rows = list(self.prepared.values())
        order = random.Random(3)
        for index in range(self.rounds):
            if self.left() < 0:
                self.say(f"time is up after {index} of {self.rounds} rounds")
                break
            order.shuffle(rows)
            for prepared in rows:
                prepared.time()
            self.session["state"].append(gpu_state())
            for prepared in rows:
                row = self.results["scenarios"][prepared.scenario.name]
                row["runs_ms"] = _rounded(prepared.recorded)
                row["host_ms"] = _rounded(prepared.host)
                row["median_ms"] = round(statistics.median(prepared.recorded), 4)
            self.write()
        self.say(f"{len(rows)} scenarios interleaved")

    def _profiles(self) -> None:
        for name in self.profiled:
            prepared = self.prepared.get(name)
            if prepared is None or self.left() < -10:
                continue
            try:
                self.results.setdefault("profiles", {})[name] = profile(prepared, self.device)
            except Exception as failure:  # noqa: BLE001 - a profile is an extra
                self.results.setdefault("profiles", {})[name] = {"failed": str(failure)[:600]}
            self.write()
            self.say(f"profiled {name}")

    def _memory(self, *, peak: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _cast(inputs: StepInputs, dtype: torch.dtype) -> StepInputs:
    return StepInputs(
        inputs.latents.to(dtype),
        inputs.text.to(dtype),
        {name: tensor.to(dtype) for name, tensor in inputs.added.items()},
    )


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (result.double() - reference.double()).norm()
    return float(f"{float(difference / reference.double().norm()):.4g}")


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]


# Single operators --------------------------------------------------------------------------------


def time_operators(
    weights: Weights, inputs: StepInputs, device: torch.device
) -> list[dict[str, Any]]:
    """Every distinct product, convolution and attention of a step, each timed by itself.

    Weights rotate through more memory than the cache holds, as they do in the model.
    """
    rows: list[dict[str, Any]] = []
    for (kind, *sizes), count in _operators(weights, inputs).items():
        for how, flops, call in _candidates(str(kind), sizes, device):
            row: dict[str, Any] = {"kind": kind, "sizes": sizes, "how": how, "count": count}
            try:
                microseconds = _time_call(call, device)
                row["us"] = round(microseconds, 2)
                row["step_ms"] = round(microseconds * count / 1000, 4)
                row["tflops"] = round(flops / microseconds / 1e6, 1)
            except Exception as failure:  # noqa: BLE001 - a candidate may not exist here
                row["failed"] = f"{type(failure).__name__}: {str(failure)[:200]}"
            rows.append(row)
    return rows


def _operators(weights: Weights, inputs: StepInputs) -> Counter[tuple[Any, ...]]:
    """What one forward runs, counted by hooks; text keys and values are left out (once a run)."""
    from diffusers.models.attention_processor import Attention

    unet = weights.unet()
    counted: Counter[tuple[Any, ...]] = Counter()

    def linear(module: nn.Linear, args: Any, _: Any) -> None:
        rows = args[0].numel() // module.in_features
        counted["linear", rows, module.in_features, module.out_features] += 1

    def convolution(module: nn.Conv2d, args: Any, _: Any) -> None:
        counted[
            "conv", *args[0].shape, module.out_channels, module.kernel_size[0], module.stride[0]
        ] += 1

    def attention(module: Any, args: Any, keywords: Any, _: Any) -> None:
        batch, tokens, width = args[0].shape
        context = keywords.get("encoder_hidden_states")
        length = tokens if context is None else context.shape[1]
        counted["attention", batch, module.heads, tokens, length, width // module.heads] += 1
        if context is None:
            counted["linear", batch * tokens, width, 3 * width] += 1

    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("to_k", "to_v")):
            module.register_forward_hook(linear)
        elif isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, Attention):
            module.register_forward_hook(attention, with_kwargs=True)
    forward_once(unet, inputs)
    return counted


def _candidates(
    kind: str, sizes: list[Any], device: torch.device
) -> Iterator[tuple[str, float, Callable[[int], Any]]]:
    """(how, FLOPs, call): ways to do one operator; call(i) uses the i-th of the rotated weights."""
    bf16 = torch.bfloat16

    def fresh(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=bf16)

    if kind == "linear":
        rows, inner, outer = sizes
        flops = 2.0 * rows * inner * outer
        turns = _turns(inner * outer * 2)
        source, bias = fresh(rows, inner), fresh(outer)
        matrices = [fresh(outer, inner) for _ in range(turns)]
        yield "bf16", flops, lambda i: nn.functional.linear(source, matrices[i % turns], bias)
        if min(rows, inner, outer) < 256:
            return
        narrow = [to_fp8_rows(matrix) for matrix in matrices]
        own, own_scale = to_fp8_rows(source)
        scaled = torch._scaled_mm
        yield (
            "fp8 by row",
            flops,
            lambda i: scaled(
                own,
                narrow[i % turns][0].t(),
                scale_a=own_scale,
                scale_b=narrow[i % turns][1].t(),
                bias=bias,
                out_dtype=bf16,
                use_fast_accum=True,
            ),
        )
        one = torch.ones((), device=device)
        yield (
            "fp8 one scale",
            flops,
            lambda i: scaled(
                own,
                narrow[i % turns][0].t(),
                scale_a=one,
                scale_b=one,
                bias=bias,
                out_dtype=bf16,
                use_fast_accum=True,
            ),
        )
    elif kind == "conv":
        batch, channels, height, width, outer, kernel, stride = sizes
        padding = kernel // 2
        flops = 2.0 * batch * outer * (height // stride) * (width // stride) * channels * kernel**2
        turns = _turns(channels * outer * kernel**2 * 2)
        bias = fresh(outer)
        last = torch.channels_last
        source = fresh(batch, channels, height, width).to(memory_format=last)
        filters = [
            fresh(outer, channels, kernel, kernel).to(memory_format=last) for _ in range(turns)
        ]
        yield (
            "channels last",
            flops,
            lambda i: nn.functional.conv2d(source, filters[i % turns], bias, stride, padding),
        )
    else:
        batch, heads, tokens, length, size = sizes
        flops = 4.0 * batch * heads * tokens * length * size

        def projected(count: int) -> torch.Tensor:
            return fresh(batch, count, heads, size).transpose(1, 2)

        query, key, value = projected(tokens), projected(length), projected(length)
        backends: tuple[Backend, ...] = ("auto", "flash", "cudnn")
        for backend in backends:
            yield backend, flops, _attention(backend, query, key, value)


def _attention(backend: Backend, *tensors: torch.Tensor) -> Callable[[int], Any]:
    return lambda _: attend(backend, *tensors)


def _turns(size: int) -> int:
    """How many weights of this many bytes outgrow a 50 MB cache."""
    return max(1, min(24, math.ceil(120e6 / size)))


def _time_call(call: Callable[[int], Any], device: torch.device) -> float:
    """Microseconds a call, launches left out on CUDA by replaying a graph of many."""
    calls = 24
    if device.type != "cuda":
        call(0)
        began = time.perf_counter()
        call(1)
        return (time.perf_counter() - began) * 1e6
    torch.backends.cudnn.benchmark = True
    for turn in range(3):
        call(turn)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(calls):
            call(turn)
    graph.replay()
    times = []
    for _ in range(5):
        watch = Stopwatch(device)
        watch.mark()
        graph.replay()
        watch.mark()
        times.append(watch.milliseconds()[0] * 1000 / calls)
    return statistics.median(times)


# Kernels -----------------------------------------------------------------------------------------

KINDS: tuple[tuple[str, str], ...] = (
    ("generated: reduction", r"^triton_(red|per)"),
    ("generated: pointwise", r"^triton_poi"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("conv", r"conv|fprop|implicit|nchwToNhwc|nhwcToNchw|im2col"),
    ("gemm", r"gemm|nvjet|cutlass|^triton_(tem|mm)|splitK|cublas|s16816|h16816|bmm|addmm"),
    ("norm", r"norm|RowwiseMoments|softmax"),
    ("copy", r"[Mm]em(cpy|set)|copy|Cat"),
    ("elementwise", r"elementwise|vectorized|upsample|reduce"),
)


def kind_of(kernel: str) -> str:
    """A kernel's kind by its name; generated kernels first, for they are named by what they hold"""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def profile(prepared: Prepared, device: torch.device) -> dict[str, Any]:
    """Time by kernel over a few steps, and what of a step no kernel covers."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_cuda = device.type == "cuda"
    steps = prepared.steps if isinstance(prepared.runs, WholeSteps) else SKIPPED_STEPS + 3
    with profiler(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        timed = prepared.runs.run(steps)
        if on_cuda:
            torch.cuda.synchronize()
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    spans: list[tuple[float, float]] = []
    for event in seen.events() or []:
        if on_cuda and event.device_type.name != "CUDA":
            continue
        span = event.time_range
        total[event.name] += span.end - span.start
        calls[event.name] += 1
        spans.append((span.start, span.end))
    spans.sort()
    busy, until = 0.0, -math.inf
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    by_kind: Counter[str] = Counter()
    for kernel, microseconds in total.items():
        by_kind[kind_of(kernel)] += microseconds
    span_ms = (spans[-1][1] - spans[0][0]) / 1000 / steps if spans else 0.0
    return {
        "steps": steps,
        "step_ms_while_profiled": round(timed.median_ms, 4),
        "timeline_ms_a_step": round(span_ms, 4),
        "gaps_ms_a_step": round(span_ms - busy / 1000 / steps, 4),
        "kernels_a_step": round(sum(calls.values()) / steps, 1),
        "by_kind_ms_a_step": {k: round(v / 1000 / steps, 4) for k, v in by_kind.most_common()},
        "top": [
            {
                "kernel": kernel[:160],
                "kind": kind_of(kernel),
                "calls_a_step": round(calls[kernel] / steps, 2),
                "ms_a_step": round(microseconds / 1000 / steps, 4),
            }
            for kernel, microseconds in total.most_common(40)
        ],
    }


def to_fp8_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) as fp8 and the float32 scales (rows, 1) that give the values back."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / largest
    return (rows.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


# The machine -------------------------------------------------------------------------------------

GPU_STATE = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,"
    "temperature.gpu,clocks_event_reasons.active,utilization.gpu,memory.used"
)


def gpu_state() -> dict[str, str]:
    """What the driver says of the GPU now; empty without one."""
    command = ["nvidia-smi", f"--query-gpu={GPU_STATE}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"unavailable": str(error)[:200]}
    values = [value.strip() for value in told.stdout.splitlines()[0].split(",")]
    return dict(zip(GPU_STATE.split(","), values, strict=False))


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "triton": _version_of("triton"),
        "cpus": os.cpu_count(),
        "commit": commit or _git("rev-parse", "HEAD"),
        "device": device.type,
        "gpu": gpu_state(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


def _version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        told = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches today: a large bf16 product and a large copy, sustained."""
    on_cuda = device.type == "cuda"
    side, repeats = (8192, 150) if on_cuda else (256, 3)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in "ab")

    def milliseconds(call: Callable[[], Any]) -> float:
        call()
        watch = Stopwatch(device)
        watch.mark()
        for _ in range(repeats):
            call()
        watch.mark()
        return watch.milliseconds()[0] / repeats

    product = milliseconds(lambda: left @ right)
    source = torch.empty(2**31 if on_cuda else 2**20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    return {
        "bf16_matmul_tflops": float(f"{2 * side**3 / product / 1e9:.4g}"),
        "copy_gb_per_s_read_and_written": float(f"{2 * source.numel() / copy / 1e6:.4g}"),
    }


# The command -------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    heads = (
        ("ms", 9),
        ("predicted", 9),
        ("host ms", 8),
        ("error", 9),
        ("prepare s", 9),
        ("GiB", 6),
    )
    lines = [f"{'scenario':18} {' '.join(f'{name:>{width}}' for name, width in heads)}  what"]
    for name, row in results["scenarios"].items():
        if "failed" in row or "skipped" in row:
            lines.append(f"{name:18} {row.get('failed') or row.get('skipped')}"[:150])
            continue
        times = row.get("runs_ms") or row.get("first_ms") or []
        median = f"{statistics.median(times):9.3f}" if times else f"{'':9}"
        host = f"{statistics.median(row['host_ms']):8.2f}" if row.get("host_ms") else f"{'':8}"
        lines.append(
            f"{name:18} {median} {row.get('predicted_ms') or '':>9} {host} "
            f"{row.get('error_vs_fp32') or '':>9} {row.get('prepare_seconds', ''):>9} "
            f"{row.get('peak_memory_gib', ''):>6}  {row['what']}"
        )
    for name, found in results.get("profiles", {}).items():
        lines.append(
            f"profile {name}: gaps {found.get('gaps_ms_a_step')} ms, "
            f"{found.get('kernels_a_step')} kernels, {found.get('by_kind_ms_a_step')}"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.unet_stack", description=__doc__)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--out", required=True, help="JSON file, continued when it exists")
    parser.add_argument("--scenario", nargs="*", choices=names, help="which, in the order given")
    parser.add_argument("--seconds-limit", type=float, default=math.inf)
    parser.add_argument("--shape", type=CompiledShape.parse, default=CompiledShape(1024, 1024))
    parser.add_argument("--steps", type=int, default=10, help="steps a timed run")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--profile", nargs="*", choices=names, default=["whole", "vae-whole"])
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--tiny", action="store_true", help="a small model, to prove the program")
    parsed = parser.parse_args(arguments)
    if parsed.steps <= SKIPPED_STEPS:
        parser.error(f"--steps must be more than {SKIPPED_STEPS}: the first ones are not counted")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    parsed = parse(arguments)
    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    chosen = [by_name[name] for name in parsed.scenario or by_name]
    bench = Bench(parsed)
    try:
        with torch.no_grad():
            bench.measure(chosen)
    finally:
        bench.write()
        print(table(bench.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
