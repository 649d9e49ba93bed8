"""`GET /stats`: the figures that the playground shows. One small JSON object."""

from __future__ import annotations

import os
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from serve.engine.planning import serves_guidance
from serve.engine.readiness import Readiness, State
from serve.engine.runtime import Runtime
from serve.http.playground.recent import RecentRequests
from serve.schema import LoraWeight, TextToImageRequest
from serve.settings import ServeSettings


def stats(runtime: Runtime, recent: RecentRequests) -> dict[str, Any]:
    """The state of the process, what it does now, and what a request may ask for.

    Every time is in milliseconds, memory in bytes.
    """
    settings, readiness, metrics = runtime.settings, runtime.readiness, runtime.metrics
    refusal = runtime.refusal()
    last_run = recent.last_run
    return {
        "state": readiness.state.value,
        "serving": refusal is None,
        "problem": "" if refusal is None else refusal.message,
        "model": readiness.model,
        "device": readiness.device,
        "warmup": warmup_progress(readiness),
        "in_flight": metrics.in_flight,
        "waiting": runtime.queue.waiting,
        "max_waiting": settings.max_waiting,
        "batch_size": None if last_run is None else last_run.batch_size,
        "steps": recent.steps(metrics.budget),
        "mfu": None if last_run is None else metrics.utilisation(last_run),
        "memory": _memory(runtime),
        "request": request_limits(settings, readiness),
        "operator_token": settings.debug and settings.admin_token is not None,
        "trace_url": shown_trace_url(settings.trace_url),
    }


def warmup_progress(readiness: Readiness) -> dict[str, Any]:
    """The phases of the start-up: those that have ended with their time, then the current one and
    those that are known to follow.

    `eta_ms` is how long the sizes that are not warm yet take, if each takes as long as those before
    it took on average; null before the first has ended.
    """
    planned = [f"compile {shape}" for shape in readiness.planned_shapes]
    names = list(readiness.phases_ms)
    if readiness.state is State.STARTING:
        known = ["load_model", *planned, "verify"]
        known += [f"count_flops {shape}" for shape in readiness.planned_shapes]
        if readiness.phase not in known and readiness.phases_ms.get(readiness.phase) is None:
            known.insert(1, readiness.phase)  # between loading and warming, as `prepare`
        names += [name for name in known if name not in names]
    compiled = [readiness.phases_ms[name] for name in planned if name in readiness.phases_ms]
    eta_ms = None
    if compiled and readiness.state is State.STARTING:
        # A size that failed has ended too.
        eta_ms = sum(compiled) / len(compiled) * (len(planned) - len(compiled))
    return {
        "phase": readiness.phase,
        "phases": [{"name": name, "ms": readiness.phases_ms.get(name)} for name in names],
        "eta_ms": eta_ms,
    }


def request_limits(settings: ServeSettings, readiness: Readiness) -> dict[str, Any]:
    """Defaults and limits of a request's fields, from its schema and this server's settings.

    Seeds are strings, because a browser's numbers end at 2^53.
    """
    schema = _properties(TextToImageRequest)
    fields = {
        name: _bounds(schema[name])
        for name in ("prompt", "num_inference_steps", "guidance_scale", "guidance_end", "seed")
    }
    fields["num_inference_steps"]["default"] = settings.default_steps
    if settings.timesteps is not None:
        fields["num_inference_steps"] |= dict.fromkeys(
            ("minimum", "maximum"), settings.default_steps
        )
    fields["guidance_scale"]["default"] = settings.guidance_scale
    if not serves_guidance(settings):
        fields["guidance_scale"]["maximum"] = 1
    seed = fields["seed"]
    fields["seed"] = {name: str(seed[name]) for name in ("minimum", "maximum")}
    fields["num_images"] = {"default": 1, "minimum": 1, "maximum": settings.max_images}
    lora = _properties(LoraWeight)["scale"]
    return {
        **fields,
        "shapes": [[shape.width, shape.height] for shape in readiness.shapes],
        "loras": list(readiness.loras),
        "lora_scale": _bounds(lora),
        "formats": schema["format"]["enum"],
        "previews": settings.safety_checker is None,
    }


def shown_trace_url(template: str | None) -> str | None:
    """`SDXL_TRACE_URL` for the page's link; None if it has a user's name or password in it."""
    if template is None or "@" in urlsplit(template).netloc:
        return None
    return template


@cache
def _properties(model: type[BaseModel]) -> dict[str, Any]:
    """A model's fields as JSON schemas. Deriving them takes ten milliseconds of the event loop."""
    properties: dict[str, Any] = model.model_json_schema()["properties"]
    return properties


def _bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's default and limits, those of its non-null alternative too."""
    names = ("default", "minimum", "maximum", "maxLength")
    found = {name: schema[name] for name in names if name in schema}
    for alternative in schema.get("anyOf", ()):
        found |= {name: alternative[name] for name in names if name in alternative}
    return found


def _memory(runtime: Runtime) -> dict[str, int]:
    """Bytes that the process has in memory, and that the allocator holds on the GPU."""
    found = {}
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            found["resident"] = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        pass  # not Linux
    gpu = runtime.gpu_memory
    if gpu is not None:
        found |= {"gpu_allocated": gpu.allocated, "gpu_peak": gpu.peak}
    return found
