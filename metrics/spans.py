"""Span trees: finished records as plain trees, and the one function that emits them.

A tree is data (`SpanNode`) until `emit` makes back-dated spans of it. Children are inside their
parents, and siblings do not overlap. Spans timed on the GPU's clock are placed on the host's clock
within a known error, so they may stick out by that error; `emit` clamps them. The attributes
`inference.clamped_us` and `request.clamped_us` report the clamping, `request.unattributed_ms` the
time that no child covers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, Tracer

from metrics.records import (
    Failure,
    GpuConditions,
    LoraSet,
    PhaseTiming,
    RequestTiming,
    RunTiming,
    StageTiming,
    WarmupTiming,
)
from metrics.sampling import ROOT_SPAN
from metrics.slow_reason import slow_reason

AttributeValue = str | int | float | bool
Attributes = Mapping[str, AttributeValue]

GEN_AI_PROVIDER = "stepspan"

GATEWAY_SPAN = "prompt-gateway"


@dataclass(frozen=True, slots=True)
class SpanNode:
    """A span that is not emitted yet, with its children. Times are Unix nanoseconds."""

    name: str
    start_ns: int
    end_ns: int
    attributes: Attributes = field(default_factory=dict)
    children: tuple[SpanNode, ...] = ()
    kind: SpanKind = SpanKind.INTERNAL
    links: tuple[Link, ...] = ()
    error: str | None = None
    """The message of status ERROR; None: no status is set."""
    exception: Failure | None = None
    """Recorded as an exception event."""
    clamped_attribute: str | None = None
    """The attribute with the microseconds by which children were clamped."""
    reports_zero_clamping: bool = False
    """Whether that attribute is set even if it is 0."""

    @property
    def size(self) -> int:
        """Number of spans in the tree."""
        return 1 + sum(child.size for child in self.children)


def emit(tracer: Tracer, context: Context, root: SpanNode) -> None:
    """Emit a tree. Parents start before their children and end after them.

    Args:
        context: the root's parent context.
    """
    _emit(tracer, context, root, root.start_ns, root.end_ns)


def _emit(
    tracer: Tracer, context: Context, node: SpanNode, lower_ns: int, upper_ns: int
) -> tuple[int, int]:
    """Emit a node clamped to [lower_ns, upper_ns]; returns its end, and the ns clamped in it."""
    start_ns = min(max(node.start_ns, lower_ns), upper_ns)
    end_ns = min(max(node.end_ns, start_ns), upper_ns)
    span = tracer.start_span(
        node.name,
        context=context,
        kind=node.kind,
        attributes=dict(node.attributes),
        links=node.links,
        start_time=start_ns,
    )
    inside = trace.set_span_in_context(span, context)
    clamped_ns, earliest_ns = 0, start_ns
    for child in sorted(node.children, key=lambda child: child.start_ns):
        earliest_ns, clamped_in_child = _emit(tracer, inside, child, earliest_ns, end_ns)
        clamped_ns += clamped_in_child
    if node.clamped_attribute is not None and (clamped_ns or node.reports_zero_clamping):
        span.set_attribute(node.clamped_attribute, clamped_ns / 1e3)
    if node.exception is not None:
        failure = node.exception
        span.add_event(
            "exception",
            {"exception.type": failure.exception_type, "exception.message": failure.message},
            timestamp=failure.at_ns,
        )
    if node.error is not None:
        span.set_status(Status(StatusCode.ERROR, node.error))
    span.end(end_ns)
    return end_ns, clamped_ns + abs(start_ns - node.start_ns) + abs(end_ns - node.end_ns)


@dataclass(frozen=True, slots=True)
class PlacedSpan:
    """A span of a tree with the times that `emit` gives it, Unix nanoseconds.

    Attributes:
        depth: 0 for the root.
        clock: what it was timed with, `host` or `cuda`.
    """

    node: SpanNode
    start_ns: int
    end_ns: int
    depth: int
    clock: str


def placed_spans(root: SpanNode) -> Iterator[PlacedSpan]:
    """All spans of a tree, clamped as `emit` clamps them; parents first, siblings by time."""
    return _placed(root, root.start_ns, root.end_ns, 0, "host")


def _placed(
    node: SpanNode, lower_ns: int, upper_ns: int, depth: int, clock: str
) -> Iterator[PlacedSpan]:
    start_ns = min(max(node.start_ns, lower_ns), upper_ns)
    end_ns = min(max(node.end_ns, start_ns), upper_ns)
    yield PlacedSpan(node, start_ns, end_ns, depth, clock)
    earliest_ns = start_ns
    for child in sorted(node.children, key=lambda child: child.start_ns):
        # A stage names its run's clock, which its steps share. A run, which names it too, is
        # itself timed with the host's.
        named = {} if "run.id" in child.attributes else child.attributes
        of_child = str(named.get("inference.clock", clock))
        for span in _placed(child, earliest_ns, end_ns, depth + 1, of_child):
            yield span
            if span.depth == depth + 1:
                earliest_ns = span.end_ns


# Trees -------------------------------------------------------------------------------------------


def request_tree(
    request: RequestTiming, steps: bool = True, caller: SpanContext | None = None
) -> SpanNode:
    """A request, its stages and its runs.

    Args:
        steps: whether every denoising step is a span. `denoise` has their summary in any case.
        caller: a caller whose trace is not continued; it becomes a link.
    """
    parts = [_stage_node(stage, request.failure) for stage in request.stages]
    parts += [_run_node(run, request, steps) for run in request.runs]
    return _root_node(ROOT_SPAN, request, parts, caller)


def gateway_tree(request: RequestTiming, caller: SpanContext | None = None) -> SpanNode:
    """A request as the gateway serves it. Its call to the image app is a tree of its own,
    `call_node`, because the call has its own span id."""
    parts = [_stage_node(stage, request.failure) for stage in request.stages]
    return _root_node(GATEWAY_SPAN, request, parts, caller)


def call_node(call: StageTiming, failure: Failure | None, attributes: Attributes) -> SpanNode:
    """A call to another service, the parent of that service's spans.

    For a client every refusal is an error, as the conventions require.
    """
    failed = failure if _happened_in(failure, call.start_ns, call.end_ns) else None
    return SpanNode(
        "call",
        call.start_ns,
        call.end_ns,
        attributes if failed is None else {**attributes, "error.type": failed.error_type},
        kind=SpanKind.CLIENT,
        error=None if failed is None else failed.message,
    )


def warmup_tree(warmup: WarmupTiming, attributes: Attributes) -> SpanNode:
    """The start-up's own trace."""
    return SpanNode(
        "warmup",
        warmup.start_ns,
        warmup.end_ns,
        {**attributes, **_error_type(warmup.failure)},
        tuple(_phase_node(phase, warmup.failure) for phase in warmup.phases),
        error=_server_error(warmup.failure),
        exception=_server_fault(warmup.failure),
    )


def _root_node(
    name: str, request: RequestTiming, parts: Sequence[SpanNode], caller: SpanContext | None
) -> SpanNode:
    failure = request.failure
    return SpanNode(
        name,
        request.start_ns,
        request.end_ns,
        {**_root_attributes(request), **_error_type(failure)},
        tuple(parts),
        SpanKind.SERVER,
        () if caller is None else (Link(caller),),
        error=_server_error(failure),
        exception=_server_fault(failure),
        clamped_attribute="request.clamped_us",
    )


def _stage_node(
    stage: StageTiming | PhaseTiming,
    failure: Failure | None,
    attributes: Attributes | None = None,
    children: tuple[SpanNode, ...] = (),
) -> SpanNode:
    """A stage. The stage of the failure has status ERROR; its parents have the exception event."""
    inside = _happened_in(failure, stage.start_ns, stage.end_ns)
    return SpanNode(
        stage.name,
        stage.start_ns,
        stage.end_ns,
        attributes or {},
        children,
        error=_server_error(failure) if inside else None,
    )


def _phase_node(phase: PhaseTiming, failure: Failure | None) -> SpanNode:
    """A phase of the start-up. One that failed has status ERROR, also if the start went on."""
    if phase.error_type is None:
        return _stage_node(phase, failure, phase.attributes)
    return SpanNode(
        phase.name,
        phase.start_ns,
        phase.end_ns,
        {**phase.attributes, "error.type": phase.error_type},
        error=f"It failed with {phase.error_type}.",
    )


def _run_node(run: RunTiming, request: RequestTiming, steps: bool) -> SpanNode:
    stages = []
    for stage in run.stages:
        attributes: Attributes = {"inference.clock": run.clock}
        children: tuple[SpanNode, ...] = ()
        if stage.name == "denoise":
            attributes = {**attributes, **_step_summary(run)}
            children = _loop_nodes(run, steps)
        stages.append(_stage_node(stage, request.failure, attributes, children))
    failure = request.failure if _happened_in(request.failure, run.start_ns, run.end_ns) else None
    return SpanNode(
        "inference",
        run.start_ns,
        run.end_ns,
        {**_run_attributes(run, request), **_error_type(failure)},
        tuple(stages),
        error=_server_error(failure) if run.error_type is None else _failed_run(run.error_type),
        exception=_server_fault(failure),
        clamped_attribute="inference.clamped_us",
        reports_zero_clamping=True,
    )


def _loop_nodes(run: RunTiming, steps: bool) -> tuple[SpanNode, ...]:
    """The steps, and what was done between them, in the order of time."""
    between = [SpanNode(each.name, each.start_ns, each.end_ns) for each in run.between_steps]
    nodes = [*(_step_nodes(run) if steps else ()), *between]
    return tuple(sorted(nodes, key=lambda node: node.start_ns))


def _step_nodes(run: RunTiming) -> tuple[SpanNode, ...]:
    return tuple(
        SpanNode(
            "denoise_step",
            step.start_ns,
            step.end_ns,
            {
                "inference.step.index": step.index,
                "inference.step.guidance": run.has_guidance(step),
                # The measured duration, without clamping.
                "inference.step.gpu_ms": step.duration_ns / 1e6,
                "inference.step.gpu_queue_ms": step.gpu_queue_ns / 1e6,
            },
        )
        for step in run.steps
    )


# Attributes --------------------------------------------------------------------------------------


def _step_summary(run: RunTiming) -> Attributes:
    summary = run.step_summary()
    if summary is None:
        return {}
    return {
        "inference.step.median_ms": summary.median_ns / 1e6,
        "inference.step.slowest_ms": summary.slowest_ns / 1e6,
        "inference.step.slowest_index": summary.slowest_index,
    }


def _root_attributes(request: RequestTiming) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "http.request.method": request.method,
        "http.route": request.endpoint,
        "url.path": request.endpoint,
        "url.scheme": "http",
        "http.response.status_code": request.status_code,
        "request.outcome": request.outcome,
    }
    if request.api_key is not None:
        attributes["enduser.id"] = request.api_key
    facts = request.facts
    if facts is not None:
        attributes |= {
            "model.name": facts.model_name,
            "prompt.length": facts.prompt_length,
            "num_inference_steps": facts.num_inference_steps,
            "guidance_scale": facts.guidance_scale,
            "guidance_end": facts.guidance_end,
            "image.width": facts.width,
            "image.height": facts.height,
            "num_images": facts.num_images,
        }
        if facts.strength is not None:
            attributes["strength"] = facts.strength
        if facts.prompt is not None:
            attributes["prompt.text"] = facts.prompt
        attributes |= _lora_attributes(facts.loras)
    if not request.runs and (reason := slow_reason(request)) is not None:
        attributes["inference.slow_reason"] = reason  # there is no `inference` span
    if request.estimate is not None:
        attributes["request.eta_ms"] = request.estimate.seconds * 1e3
    if request.runs and request.failure is None:
        attributes["request.unattributed_ms"] = request.unattributed_ns / 1e6
    return attributes


def _run_attributes(run: RunTiming, request: RequestTiming) -> dict[str, AttributeValue]:
    reason = slow_reason(request)
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": GEN_AI_PROVIDER,
        "gen_ai.output.type": "image",
        "run.id": run.run_id,
        "inference.batch.size": run.batch_size,
        "inference.shape": run.shape,
        "inference.guidance": run.guidance,
        "inference.guided_steps": sum(map(run.has_guidance, run.steps)),
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
    if run.error_type is not None:
        attributes["error.type"] = run.error_type
    if run.profile is not None:
        attributes |= {"inference.profiled": True, "inference.profile": run.profile}
    if request.facts is not None:
        attributes |= {
            "gen_ai.request.model": request.facts.model_name,
            "gen_ai.request.seed": request.facts.seed,
            "num_inference_steps": request.facts.num_inference_steps,
            **_lora_attributes(request.facts.loras),
        }
        if request.facts.strength is not None:
            attributes |= {
                "inference.strength": request.facts.strength,
                "inference.steps_to_run": request.facts.steps_to_run,
            }
    return attributes


def _lora_attributes(loras: LoraSet) -> Attributes:
    """The names of the LoRAs, and the scales in the same order; nothing without any."""
    if not loras:
        return {}
    return {
        "lora.names": ",".join(name for name, _ in loras),
        "lora.scales": ",".join(f"{scale:g}" for _, scale in loras),
    }


def _gpu_attributes(
    conditions: Sequence[GpuConditions],
) -> dict[str, AttributeValue]:
    """What throttled the GPU during the run, and its lowest clock."""
    names = sorted(set().union(*(reading.throttle for reading in conditions)))
    attributes: dict[str, AttributeValue] = {"gpu.throttle_reasons": ",".join(names)}
    clocks = [reading.sm_clock_mhz for reading in conditions if reading.sm_clock_mhz is not None]
    if clocks:
        attributes["gpu.sm_clock_mhz"] = min(clocks)
    highest = conditions[0].max_sm_clock_mhz
    if highest is not None:
        attributes["gpu.sm_clock_max_mhz"] = highest
    return attributes


# Failures ----------------------------------------------------------------------------------------


def _happened_in(failure: Failure | None, start_ns: int, end_ns: int) -> bool:
    return failure is not None and start_ns <= failure.at_ns <= end_ns


def _error_type(failure: Failure | None) -> Attributes:
    return {} if failure is None else {"error.type": failure.error_type}


def _server_fault(failure: Failure | None) -> Failure | None:
    """The failure if the service is at fault; a caller's mistake is not an error of the span."""
    return failure if failure is not None and failure.server_fault else None


def _failed_run(error_type: str) -> str:
    return f"The run failed with {error_type}; its images are drawn one by one."


def _server_error(failure: Failure | None) -> str | None:
    fault = _server_fault(failure)
    return None if fault is None else fault.message
