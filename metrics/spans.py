"""A finished timing as a tree of back-dated spans.

Children lie inside their parents and siblings do not overlap: spans timed on the GPU's clock are
placed on the host's within a known error, and what sticks out by that error is cut and reported
as `inference.clamped_us`, and for the whole tree as `request.clamped_us`. What no child covers is
not hidden: `request.unattributed_ms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer

from metrics.gpu import GpuConditions
from metrics.sampling import ROOT_SPAN
from metrics.timeline import (
    Failure,
    RequestTiming,
    RunTiming,
    StageTiming,
    WarmupTiming,
)

Attributes = Mapping[str, str | int | float | bool]

GEN_AI_PROVIDER = "stepspan"

RELAY_SPAN = "prompt-gateway"


class _Tree:
    """Starts spans inside their parents' bounds."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.clamped_ns = 0

    def open(
        self,
        name: str,
        start_ns: int,
        context: Context,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[Link] = (),
    ) -> tuple[Span, Context]:
        span = self._tracer.start_span(
            name,
            context=context,
            kind=kind,
            attributes=dict(attributes or {}),
            links=links,
            start_time=start_ns,
        )
        return span, trace.set_span_in_context(span, context)

    def clamp(self, start_ns: int, end_ns: int, lower: int, upper: int) -> tuple[int, int]:
        """The interval cut to [lower, upper]; how much was cut is added up."""
        inside_start = min(max(start_ns, lower), upper)
        inside_end = min(max(end_ns, inside_start), upper)
        self.clamped_ns += abs(inside_start - start_ns) + abs(inside_end - end_ns)
        return inside_start, inside_end


def request_spans(request: RequestTiming, steps: bool = True) -> int:
    """How many spans `emit_request` makes of a request."""
    run = request.run
    in_run = 0 if run is None else 1 + len(run.stages)
    if run is not None and steps and run.stage("denoise") is not None:
        in_run += len(run.steps)
    return 1 + len(request.stages) + in_run


def warmup_spans(warmup: WarmupTiming) -> int:
    """How many spans `emit_warmup` makes of a start-up."""
    return 1 + len(warmup.phases)


def emit_request(
    tracer: Tracer,
    context: Context,
    request: RequestTiming,
    steps: bool = True,
    caller: SpanContext | None = None,
) -> None:
    """Emit the tree of one request.

    Args:
        context: the root's parent context.
        steps: whether every denoising step is a span; what sums them up is told anyway.
        caller: a caller whose trace is not continued, for a link to it.
    """
    tree = _Tree(tracer)
    root, inside = tree.open(
        ROOT_SPAN,
        request.start_ns,
        context,
        _root_attributes(request),
        SpanKind.SERVER,
        [] if caller is None else [Link(caller)],
    )
    parts: list[StageTiming | RunTiming] = list(request.stages)
    if request.run is not None:
        parts.append(request.run)
    lower = request.start_ns
    for part in sorted(parts, key=lambda part: part.start_ns):
        start_ns, end_ns = tree.clamp(part.start_ns, part.end_ns, lower, request.end_ns)
        if isinstance(part, RunTiming):
            _emit_run(tree, inside, part, request, steps, start_ns, end_ns)
        else:
            span, _ = tree.open(part.name, start_ns, inside)
            _mark_failed(span, request.failure, start_ns, end_ns)
            span.end(end_ns)
        lower = end_ns
    if tree.clamped_ns:
        root.set_attribute("request.clamped_us", tree.clamped_ns / 1e3)
    if request.failure is not None:
        _record_failure(root, request.failure)
    root.end(request.end_ns)


def emit_relay(
    tracer: Tracer, context: Context, request: RequestTiming, caller: SpanContext | None = None
) -> None:
    """Emit the gateway's root and those of its stages that `request` has.

    Its call to the image app is none of them: that has an identity of its own, `emit_call`.
    """
    tree = _Tree(tracer)
    root, inside = tree.open(
        RELAY_SPAN,
        request.start_ns,
        context,
        _root_attributes(request),
        SpanKind.SERVER,
        [] if caller is None else [Link(caller)],
    )
    for stage in request.stages:
        span, _ = tree.open(stage.name, stage.start_ns, inside)
        _mark_failed(span, request.failure, stage.start_ns, stage.end_ns)
        span.end(stage.end_ns)
    if request.failure is not None:
        _record_failure(root, request.failure)
    root.end(request.end_ns)


def emit_call(
    tracer: Tracer,
    context: Context,
    call: StageTiming,
    failure: Failure | None,
    attributes: Attributes,
) -> None:
    """Emit a call to another service, the parent of that service's spans.

    To a caller every refusal is an error, as the conventions for clients ask.
    """
    tree = _Tree(tracer)
    span, _ = tree.open("call", call.start_ns, context, attributes, SpanKind.CLIENT)
    if failure is not None and call.start_ns <= failure.at_ns <= call.end_ns:
        span.set_attribute("error.type", failure.error_type)
        span.set_status(Status(StatusCode.ERROR, failure.message))
    span.end(call.end_ns)


def emit_warmup(
    tracer: Tracer, context: Context, warmup: WarmupTiming, attributes: Attributes
) -> None:
    """Emit the start-up's own trace."""
    tree = _Tree(tracer)
    root, inside = tree.open("warmup", warmup.start_ns, context, attributes)
    lower = warmup.start_ns
    for phase in warmup.phases:
        start_ns, end_ns = tree.clamp(phase.start_ns, phase.end_ns, lower, warmup.end_ns)
        span, _ = tree.open(phase.name, start_ns, inside, phase.attributes)
        _mark_failed(span, warmup.failure, start_ns, end_ns)
        span.end(end_ns)
        lower = end_ns
    if warmup.failure is not None:
        _record_failure(root, warmup.failure)
    root.end(warmup.end_ns)


def _emit_run(
    tree: _Tree,
    context: Context,
    run: RunTiming,
    request: RequestTiming,
    steps: bool,
    start_ns: int,
    end_ns: int,
) -> None:
    span, inside = tree.open("inference", start_ns, context, _run_attributes(run, request))
    clamped_before = tree.clamped_ns
    lower = start_ns
    for stage in run.stages:
        stage_start, stage_end = tree.clamp(stage.start_ns, stage.end_ns, lower, end_ns)
        stage_span, in_stage = tree.open(
            stage.name, stage_start, inside, {"inference.clock": run.clock}
        )
        if stage.name == "denoise":
            _sum_up_steps(stage_span, run)
            if steps:
                _emit_steps(tree, in_stage, run, stage_start, stage_end)
        _mark_failed(stage_span, request.failure, stage_start, stage_end)
        stage_span.end(stage_end)
        lower = stage_end
    span.set_attribute("inference.clamped_us", (tree.clamped_ns - clamped_before) / 1e3)
    if request.failure is not None and start_ns <= request.failure.at_ns <= end_ns:
        _record_failure(span, request.failure)
    span.end(end_ns)


def _sum_up_steps(denoise: Span, run: RunTiming) -> None:
    summary = run.step_summary()
    if summary is not None:
        denoise.set_attributes(
            {
                "inference.step.median_ms": summary.median_ns / 1e6,
                "inference.step.slowest_ms": summary.slowest_ns / 1e6,
                "inference.step.slowest_index": summary.slowest_index,
            }
        )


def _emit_steps(tree: _Tree, context: Context, run: RunTiming, start_ns: int, end_ns: int) -> None:
    lower = start_ns
    for step in run.steps:
        step_start, step_end = tree.clamp(step.start_ns, step.end_ns, lower, end_ns)
        span, _ = tree.open(
            "denoise_step",
            step_start,
            context,
            {
                "inference.step.index": step.index,
                # The measured duration, whatever clamping did to the drawn one.
                "inference.step.gpu_ms": step.duration_ns / 1e6,
                "inference.step.gpu_queue_ms": step.gpu_queue_ns / 1e6,
            },
        )
        span.end(step_end)
        lower = step_end


def _root_attributes(request: RequestTiming) -> dict[str, str | int | float | bool]:
    attributes: dict[str, str | int | float | bool] = {
        "http.request.method": request.method,
        "http.route": request.endpoint,
        "url.path": request.endpoint,
        "url.scheme": "http",
        "http.response.status_code": request.status_code,
        "request.outcome": request.outcome,
    }
    facts = request.facts
    if facts is not None:
        attributes |= {
            "model.name": facts.model_name,
            "prompt.length": facts.prompt_length,
            "num_inference_steps": facts.num_inference_steps,
            "guidance_scale": facts.guidance_scale,
            "image.width": facts.width,
            "image.height": facts.height,
        }
        if facts.prompt is not None:
            attributes["prompt.text"] = facts.prompt
    if request.run is None and (reason := request.slow_reason) is not None:
        attributes["inference.slow_reason"] = reason  # no run came of it to carry this
    if request.run is not None and request.failure is None:
        attributes["request.unattributed_ms"] = request.unattributed_ns / 1e6
    return attributes


def _run_attributes(run: RunTiming, request: RequestTiming) -> dict[str, str | int | float | bool]:
    reason = request.slow_reason
    attributes: dict[str, str | int | float | bool] = {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": GEN_AI_PROVIDER,
        "gen_ai.output.type": "image",
        "run.id": run.run_id,
        "inference.batch.size": run.batch_size,
        "inference.shape": run.shape,
        "inference.guidance": run.guidance,
        "inference.clock": run.clock,
        "inference.clock.error_bound_us": run.error_bound_ns / 1e3,
        "inference.clock.drift_us": run.drift_ns / 1e3,
    }
    if run.conditions:
        attributes |= _gpu_attributes(run.conditions)
    if reason is not None:
        attributes["inference.slow_reason"] = reason
    if run.eager_fallback:
        attributes["inference.eager_fallback"] = True
    if run.profile is not None:
        attributes |= {"inference.profiled": True, "inference.profile": run.profile}
    if request.facts is not None:
        attributes |= {
            "gen_ai.request.model": request.facts.model_name,
            "gen_ai.request.seed": request.facts.seed,
            "num_inference_steps": request.facts.num_inference_steps,
        }
    return attributes


def _gpu_attributes(
    conditions: Sequence[GpuConditions],
) -> dict[str, str | int | float | bool]:
    """What held the GPU back in the run, and its slowest clock."""
    names = sorted(set().union(*(seen.throttle for seen in conditions)))
    attributes: dict[str, str | int | float | bool] = {"gpu.throttle_reasons": ",".join(names)}
    clocks = [seen.sm_clock_mhz for seen in conditions if seen.sm_clock_mhz is not None]
    if clocks:
        attributes["gpu.sm_clock_mhz"] = min(clocks)
    highest = conditions[0].max_sm_clock_mhz
    if highest is not None:
        attributes["gpu.sm_clock_max_mhz"] = highest
    return attributes


def _record_failure(span: Span, failure: Failure) -> None:
    span.set_attribute("error.type", failure.error_type)
    if not failure.server_fault:
        return
    span.add_event(
        "exception",
        {"exception.type": failure.exception_type, "exception.message": failure.message},
        timestamp=failure.at_ns,
    )
    span.set_status(Status(StatusCode.ERROR, failure.message))


def _mark_failed(span: Span, failure: Failure | None, start_ns: int, end_ns: int) -> None:
    """Mark the stage in which the failure lies; the event itself is on its parents."""
    if failure is not None and failure.server_fault and start_ns <= failure.at_ns <= end_ns:
        span.set_status(Status(StatusCode.ERROR, failure.message))
