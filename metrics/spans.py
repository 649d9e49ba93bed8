"""A finished timing as a tree of back-dated spans.

Children lie inside their parents and siblings do not overlap: spans timed on the GPU's clock are
placed on the host's within a known error, and what sticks out by that error is cut and reported
as `inference.clamped_us`. What no child covers is not hidden: `request.unattributed_ms`.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from metrics.timeline import (
    Failure,
    RequestTiming,
    RunTiming,
    StageTiming,
    WarmupTiming,
)
from metrics.tracing import ROOT_SPAN

Attributes = Mapping[str, str | int | float | bool]

GEN_AI_PROVIDER = "stepspan"


class _Tree:
    """Starts and ends spans inside their parents' bounds, and counts them."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.count = 0
        self.clamped_ns = 0

    def open(
        self,
        name: str,
        start_ns: int,
        context: Context,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> tuple[Span, Context]:
        span = self._tracer.start_span(
            name, context=context, kind=kind, attributes=dict(attributes or {}), start_time=start_ns
        )
        return span, trace.set_span_in_context(span, context)

    def close(self, span: Span, end_ns: int) -> None:
        span.end(end_time=end_ns)
        self.count += 1

    def clamp(self, start_ns: int, end_ns: int, lower: int, upper: int) -> tuple[int, int]:
        """The interval cut to [lower, upper]; how much was cut is added up."""
        inside_start = min(max(start_ns, lower), upper)
        inside_end = min(max(end_ns, inside_start), upper)
        self.clamped_ns += abs(inside_start - start_ns) + abs(inside_end - end_ns)
        return inside_start, inside_end


def emit_request(tracer: Tracer, context: Context, request: RequestTiming) -> int:
    """Emit the tree of one request. Returns how many spans it has.

    Args:
        context: the root's parent context.
    """
    tree = _Tree(tracer)
    root, inside = tree.open(
        ROOT_SPAN, request.start_ns, context, _root_attributes(request), SpanKind.SERVER
    )
    parts: list[StageTiming | RunTiming] = list(request.stages)
    if request.run is not None:
        parts.append(request.run)
    lower = request.start_ns
    for part in sorted(parts, key=lambda part: part.start_ns):
        start_ns, end_ns = tree.clamp(part.start_ns, part.end_ns, lower, request.end_ns)
        if isinstance(part, RunTiming):
            _emit_run(tree, inside, part, request, start_ns, end_ns)
        else:
            span, _ = tree.open(part.name, start_ns, inside)
            _mark_failed(span, request.failure, start_ns, end_ns)
            tree.close(span, end_ns)
        lower = end_ns
    if request.failure is not None:
        _record_failure(root, request.failure)
    tree.close(root, request.end_ns)
    return tree.count


def emit_warmup(
    tracer: Tracer, context: Context, warmup: WarmupTiming, attributes: Attributes
) -> int:
    """Emit the start-up's own trace. Returns how many spans it has."""
    tree = _Tree(tracer)
    root, inside = tree.open("warmup", warmup.start_ns, context, attributes)
    lower = warmup.start_ns
    for phase in warmup.phases:
        start_ns, end_ns = tree.clamp(phase.start_ns, phase.end_ns, lower, warmup.end_ns)
        span, _ = tree.open(phase.name, start_ns, inside, phase.attributes)
        _mark_failed(span, warmup.failure, start_ns, end_ns)
        tree.close(span, end_ns)
        lower = end_ns
    if warmup.failure is not None:
        _record_failure(root, warmup.failure)
    tree.close(root, warmup.end_ns)
    return tree.count


def _emit_run(
    tree: _Tree,
    context: Context,
    run: RunTiming,
    request: RequestTiming,
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
            _emit_steps(tree, in_stage, stage_span, run, stage_start, stage_end)
        _mark_failed(stage_span, request.failure, stage_start, stage_end)
        tree.close(stage_span, stage_end)
        lower = stage_end
    span.set_attribute("inference.clamped_us", (tree.clamped_ns - clamped_before) / 1e3)
    if request.failure is not None and start_ns <= request.failure.at_ns <= end_ns:
        _record_failure(span, request.failure)
    tree.close(span, end_ns)


def _emit_steps(
    tree: _Tree, context: Context, denoise: Span, run: RunTiming, start_ns: int, end_ns: int
) -> None:
    summary = run.step_summary()
    if summary is not None:
        denoise.set_attributes(
            {
                "inference.step.median_ms": summary.median_ns / 1e6,
                "inference.step.slowest_ms": summary.slowest_ns / 1e6,
                "inference.step.slowest_index": summary.slowest_index,
            }
        )
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
                "inference.step.lead_ms": step.lead_ns / 1e6,
            },
        )
        tree.close(span, step_end)
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
    if request.run is not None and request.failure is None:
        attributes["request.unattributed_ms"] = request.unattributed_ns / 1e6
    return attributes


def _run_attributes(run: RunTiming, request: RequestTiming) -> dict[str, str | int | float | bool]:
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
    if request.facts is not None:
        attributes |= {
            "gen_ai.request.model": request.facts.model_name,
            "gen_ai.request.seed": request.facts.seed,
            "num_inference_steps": request.facts.num_inference_steps,
        }
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
