"""The span tree: names, bounds, failures. Property tests over generated timings."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode, TraceFlags

from metrics.records import (
    Failure,
    GpuConditions,
    PhaseTiming,
    RequestTiming,
    RunTiming,
    StageTiming,
    StepTiming,
    WarmupTiming,
)
from metrics.spans import emit, request_tree, warmup_tree
from tests.metrics.timings import FACTS, MS, START_NS, request_timing, run_timing


def emitted(
    request: RequestTiming, steps: bool = True, caller: SpanContext | None = None
) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tree = request_tree(request, steps, caller)
    emit(provider.get_tracer("test"), Context(), tree)
    spans = list(exporter.get_finished_spans())
    assert len(spans) == tree.size
    return spans


def named(spans: list[ReadableSpan], name: str) -> ReadableSpan:
    return next(span for span in spans if span.name == name)


def parent_name(spans: list[ReadableSpan], span: ReadableSpan) -> str | None:
    if span.parent is None:
        return None
    parent_id = span.parent.span_id
    return next(s.name for s in spans if s.context and s.context.span_id == parent_id)


def assert_nested(spans: list[ReadableSpan]) -> None:
    """Assert that children are inside their parents and siblings do not overlap."""
    by_id = {span.context.span_id: span for span in spans if span.context}
    children: dict[int, list[ReadableSpan]] = {}
    for span in spans:
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time
        if span.parent is not None:
            parent = by_id[span.parent.span_id]
            assert parent.start_time is not None
            assert parent.end_time is not None
            assert parent.start_time <= span.start_time
            assert span.end_time <= parent.end_time
            children.setdefault(span.parent.span_id, []).append(span)
    for siblings in children.values():
        ordered = sorted(siblings, key=lambda s: (s.start_time or 0, s.end_time or 0))
        for earlier, later in pairwise(ordered):
            assert (earlier.end_time or 0) <= (later.start_time or 0)


def test_the_tree_of_a_request() -> None:
    spans = emitted(request_timing())
    assert_nested(spans)
    parents = {span.name: parent_name(spans, span) for span in spans}
    assert parents == {
        "text-to-image": None,
        "receive": "text-to-image",
        "queue": "text-to-image",
        "inference": "text-to-image",
        "text_encode": "inference",
        "denoise": "inference",
        "denoise_step": "denoise",
        "vae_decode": "inference",
        "image_encode": "text-to-image",
        "upload": "text-to-image",
        "respond": "text-to-image",
    }


def test_attributes_of_the_root_and_the_run() -> None:
    spans = emitted(request_timing())
    root = named(spans, "text-to-image")
    assert root.kind is SpanKind.SERVER
    assert root.attributes is not None
    expected = {
        "http.request.method": "POST",
        "http.route": "/",
        "http.response.status_code": 200,
        "model.name": "demo",
        "prompt.length": 12,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "image.width": 128,
        "image.height": 96,
        "request.unattributed_ms": 1.0,
    }
    assert expected.items() <= dict(root.attributes).items()
    assert "prompt.text" not in root.attributes
    run = dict(named(spans, "inference").attributes or {})
    assert run["gen_ai.operation.name"] == "generate_content"
    assert run["gen_ai.output.type"] == "image"
    assert run["gen_ai.request.seed"] == 7
    assert run["inference.clock.error_bound_us"] == 20
    assert run["inference.batch.size"] == 1
    denoise = dict(named(spans, "denoise").attributes or {})
    assert denoise["inference.step.slowest_index"] == 1
    assert denoise["inference.step.median_ms"] == 11
    step = dict(named(spans, "denoise_step").attributes or {})
    assert step["inference.step.index"] == 0
    assert step["inference.step.gpu_ms"] == 10


@pytest.mark.parametrize(
    ("guidance", "guided_steps", "of_steps"),
    [
        (True, None, [True, True, True]),
        (True, 3, [True, True, True]),
        (True, 1, [True, False, False]),
        (False, 0, [False, False, False]),
        (False, None, [False, False, False]),
    ],
)
def test_a_step_says_whether_it_had_guidance(
    guidance: bool, guided_steps: int | None, of_steps: list[bool]
) -> None:
    run = dataclasses.replace(run_timing(START_NS), guidance=guidance, guided_steps=guided_steps)
    spans = emitted(request_timing(run=run))
    steps = [dict(span.attributes or {}) for span in spans if span.name == "denoise_step"]
    steps.sort(key=lambda attributes: attributes["inference.step.index"])
    assert [attributes["inference.step.guidance"] for attributes in steps] == of_steps
    inference = dict(named(spans, "inference").attributes or {})
    assert inference["inference.guidance"] is guidance
    assert inference["inference.guided_steps"] == sum(of_steps)
    assert dict(named(spans, "text-to-image").attributes or {})["guidance_end"] == 1.0


def test_the_prompt_is_recorded_only_if_turned_on() -> None:
    facts = dataclasses.replace(FACTS, prompt="a red circle")
    root = named(emitted(request_timing(facts=facts)), "text-to-image")
    assert dict(root.attributes or {})["prompt.text"] == "a red circle"


def test_a_server_fault_marks_the_path_to_its_stage() -> None:
    run = run_timing(START_NS + 3 * MS)
    denoise = run.stage("denoise")
    assert denoise is not None
    failure = Failure("out_of_memory", "OutOfMemoryError", "no memory", denoise.start_ns + MS)
    spans = emitted(request_timing(run=run, failure=failure, status_code=500, outcome="error"))
    marked = {s.name for s in spans if s.status.status_code is StatusCode.ERROR}
    assert marked == {"text-to-image", "inference", "denoise"}
    root = named(spans, "text-to-image")
    assert dict(root.attributes or {})["error.type"] == "out_of_memory"
    assert "request.unattributed_ms" not in dict(root.attributes or {})
    [event] = root.events
    assert event.name == "exception"
    assert dict(event.attributes or {})["exception.type"] == "OutOfMemoryError"


def test_a_callers_fault_is_recorded_without_an_error_status() -> None:
    failure = Failure("queue_full", "QueueFull", "full", START_NS + MS, server_fault=False)
    spans = emitted(request_timing(failure=failure, status_code=429, outcome="rejected"))
    assert {s.status.status_code for s in spans} == {StatusCode.UNSET}
    root = named(spans, "text-to-image")
    assert dict(root.attributes or {})["error.type"] == "queue_full"


def test_device_spans_are_clamped_into_the_host_and_the_clamp_is_reported() -> None:
    run = run_timing(START_NS + 3 * MS)
    late = tuple(StageTiming(s.name, s.start_ns + 2 * MS, s.end_ns + 2 * MS) for s in run.stages)
    spans = emitted(request_timing(run=dataclasses.replace(run, stages=late)))
    assert_nested(spans)
    clamped = dict(named(spans, "inference").attributes or {})["inference.clamped_us"]
    assert isinstance(clamped, float)
    assert clamped >= 1000


def test_the_measured_step_time_survives_clamping() -> None:
    run = run_timing(START_NS + 3 * MS)
    steps = tuple(
        StepTiming(s.index, s.start_ns - 50 * MS, s.end_ns - 50 * MS, 0) for s in run.steps
    )
    spans = emitted(request_timing(run=dataclasses.replace(run, steps=steps)))
    assert_nested(spans)
    times = [
        dict(s.attributes or {})["inference.step.gpu_ms"] for s in spans if s.name == "denoise_step"
    ]
    assert times == [10, 12, 11]


def test_without_steps_the_summary_stays() -> None:
    spans = emitted(request_timing(), steps=False)
    assert "denoise_step" not in {span.name for span in spans}
    denoise = dict(named(spans, "denoise").attributes or {})
    assert denoise["inference.step.slowest_ms"] == 12


def test_a_caller_that_is_not_trusted_is_a_link() -> None:
    caller = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1))
    root = named(emitted(request_timing(), caller=caller), "text-to-image")
    assert root.parent is None
    assert [link.context for link in root.links] == [caller]
    assert not named(emitted(request_timing()), "text-to-image").links


def test_the_run_has_the_gpus_conditions() -> None:
    run = dataclasses.replace(
        run_timing(START_NS + 3 * MS),
        eager_fallback=True,
        conditions=(
            GpuConditions(frozenset({"power_cap"}), 1900, 1980),
            GpuConditions(frozenset({"thermal", "power_cap"}), 1200, 1980),
        ),
    )
    attributes = dict(named(emitted(request_timing(run=run)), "inference").attributes or {})
    assert attributes["gpu.throttle_reasons"] == "power_cap,thermal"
    assert attributes["gpu.sm_clock_mhz"] == 1200
    assert attributes["gpu.sm_clock_max_mhz"] == 1980
    assert attributes["inference.eager_fallback"] is True
    assert attributes["inference.slow_reason"] == "eager_fallback"
    plain = dict(named(emitted(request_timing()), "inference").attributes or {})
    assert not {"gpu.throttle_reasons", "inference.slow_reason"} & plain.keys()


def test_host_stages_that_overlap_are_cut_and_reported() -> None:
    request = request_timing()
    receive, queue, *rest = request.stages
    late = StageTiming("receive", receive.start_ns, receive.end_ns + MS)
    spans = emitted(dataclasses.replace(request, stages=(late, queue, *rest)))
    assert_nested(spans)
    assert dict(named(spans, "text-to-image").attributes or {})["request.clamped_us"] == 1000


def test_a_warm_up_is_a_trace_of_its_own() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    phases = (
        PhaseTiming("load_model", START_NS, START_NS + MS),
        PhaseTiming("compile 128x128", START_NS + MS, START_NS + 2 * MS, {"graphs": 2}),
        PhaseTiming("verify", START_NS + 2 * MS, START_NS + 3 * MS),
    )
    failure = Failure("warmup_failed", "ValueError", "m", START_NS + 3 * MS)
    warmup = WarmupTiming(START_NS, START_NS + 3 * MS, phases, failure)
    tree = warmup_tree(warmup, {"model.name": "demo"})
    emit(provider.get_tracer("t"), Context(), tree)
    spans = list(exporter.get_finished_spans())
    assert len(spans) == tree.size == 4
    assert_nested(spans)
    assert [s.name for s in spans] == ["load_model", "compile 128x128", "verify", "warmup"]
    assert spans[-1].status.status_code is StatusCode.ERROR


def test_a_shape_that_is_left_out_is_an_error_in_a_start_that_goes_on() -> None:
    phases = (
        PhaseTiming("compile 1x1", START_NS, START_NS + MS, {"graphs": 2}, "OutOfMemoryError"),
        PhaseTiming("compile 2x2", START_NS + MS, START_NS + 2 * MS, {"graphs": 2}),
    )
    tree = warmup_tree(WarmupTiming(START_NS, START_NS + 2 * MS, phases), {})
    assert tree.error is None
    failed, warm = tree.children
    assert failed.error is not None
    assert failed.attributes == {"graphs": 2, "error.type": "OutOfMemoryError"}
    assert warm.error is None


def test_a_run_that_failed_is_an_error_though_its_images_were_drawn_after_all() -> None:
    run = dataclasses.replace(run_timing(START_NS + 3 * MS), error_type="out_of_memory")
    spans = emitted(request_timing(run=run))
    marked = [span.name for span in spans if span.status.status_code is StatusCode.ERROR]
    assert marked == ["inference"]
    assert dict(named(spans, "inference").attributes or {})["error.type"] == "out_of_memory"


moments = st.integers(START_NS - 100 * MS, START_NS + 200 * MS)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[int, int]:
    """Two moments in order, anywhere: clocks disagree, runs fail midway."""
    first, second = sorted((draw(moments), draw(moments)))
    return first, second


@st.composite
def runs(draw: st.DrawFn) -> RunTiming:
    run_start, run_end = draw(intervals())
    names = ("text_encode", "denoise", "vae_decode")
    stages = tuple(
        StageTiming(name, *draw(intervals())) for name in names[: draw(st.integers(0, 3))]
    )
    steps = tuple(
        StepTiming(index, *draw(intervals()), gpu_queue_ns=draw(st.integers(0, MS)))
        for index in range(draw(st.integers(0, 6)))
    )
    return RunTiming(
        "r", "cuda", "128x96", True, 1, run_start, run_end, stages, steps, error_bound_ns=1
    )


@st.composite
def requests(draw: st.DrawFn) -> RequestTiming:
    start, end = draw(intervals())
    outer = tuple(
        StageTiming(name, *draw(intervals()))
        for name in draw(st.lists(st.sampled_from(("receive", "queue", "upload", "respond"))))
    )
    failure = None
    if draw(st.booleans()):
        failure = Failure("internal", "E", "m", draw(moments))
    return RequestTiming(
        "/",
        "POST",
        500 if failure else 200,
        "error" if failure else "ok",
        start,
        end,
        outer,
        tuple(draw(st.lists(runs(), max_size=3))),
        (),
        FACTS,
        failure,
    )


@given(requests())
@settings(max_examples=150, deadline=None)
def test_nothing_leaves_its_parent_and_siblings_never_overlap(request: RequestTiming) -> None:
    assert_nested(emitted(request))


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(requests())
@settings(max_examples=20_000, deadline=None)
def test_nothing_leaves_its_parent_over_many_timings(request: RequestTiming) -> None:
    assert_nested(emitted(request))
