"""The time of our own code: telemetry, and the work around a request's steps.

    python -m bench micro

Each figure is the median over series of calls with its 95% interval, in microseconds a call. The
pieces are built as the service builds them; nothing leaves the machine. The work around the steps
is timed on the demo model and a CPU, whatever the device (`request_overhead.py`).
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

from bench.micro.timing import CallTime, summary, time_call
from bench.outputs import output_file, write_json

if TYPE_CHECKING:
    from metrics.clock import Clock, Mark
    from metrics.records import RequestTiming
    from serve.engine.runtime import Runtime

STEPS = 30
"""Steps of the recorded request: 30 steps and 6 stages are 36 histogram observations."""
SHAPES_KEPT_WARM = (1, 9)
"""The default of a full-size model, and all sizes that SDXL was trained for."""
MOST_OUTSTANDING = 2048
"""The most spans that wait for export before the next tree is built: a quarter of the queue."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--series", type=int, default=200, help="series of calls for each figure (default: 200)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="the device whose clock is timed, as SDXL_DEVICE (default: auto)",
    )
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    from bench.errors import BenchError
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import where
    from bench.harness.work import device_named

    if options.series < 1:
        raise BenchError("--series: 1 and more are allowed")
    device = device_named(options.device)
    from bench.micro import request_overhead

    with ExitStack() as held:
        for each in dict.fromkeys((device, "cpu")):
            held.enter_context(only_bench_on(each))
        costs = [*measure(device, options.series), *request_overhead.measure(options.series)]
    for cost in costs:
        spread = f"({cost.low_us:.2f} to {cost.high_us:.2f})"
        print(f"{cost.name:8} {cost.median_us:10.2f} us {spread:24} {cost.what}")
    if options.out:
        written = where(device) | {"python": platform.python_version(), "device": device}
        written |= {
            "costs": [asdict(cost) for cost in costs],
            "clock_calls_a_step": calls_a_step(),
        }
        write_json(options.out, written)
    return 0


def measure(device: str, series: int) -> list[CallTime]:
    """Every piece, in the order in which a request runs them."""
    from metrics.catalogue import render
    from metrics.clock import make_clock

    clock = make_clock(device)
    runtimes = [_runtime(_shapes(count)) for count in SHAPES_KEPT_WARM]
    try:
        runtime = runtimes[0]
        request = recorded_request(_shapes(1)[0])
        for count, one in zip(SHAPES_KEPT_WARM, runtimes, strict=True):
            _fill_labels(one, _shapes(count))

        def record() -> None:
            runtime.metrics.observe_request(request, {"trace_id": "0" * 32, "span_id": "0" * 16})

        def scrape(count: int, one: Runtime) -> CallTime:
            registry, accept = one.metrics.registry, "application/openmetrics-text; version=1.0.0"
            kilobytes = len(render(registry, accept)[0]) / 1000
            what = f"/metrics, every label set of {count} warm sizes filled: {kilobytes:.0f} kB"
            return time_call(
                f"scrape{count}", what, lambda: render(registry, accept), max(1, series // 10), 1
            )

        return [
            _mark(clock, series),
            _step(clock, series),
            _poll(clock, series),
            _resolve(clock, series),
            time_call(
                "record", f"one request of {STEPS} steps into the metrics", record, series, 5
            ),
            _emit(runtime, request, series),
            _export(request, series),
            *map(scrape, SHAPES_KEPT_WARM, runtimes),
        ]
    finally:
        for one in runtimes:
            one.close(1)


def _mark(clock: Clock, series: int) -> CallTime:
    def once() -> float:
        clock.begin()
        start = time.perf_counter_ns()
        for _ in range(STEPS):
            clock.mark()
        return (time.perf_counter_ns() - start) / STEPS

    return summary("mark", f"one mark of the {clock.name} clock", [once() for _ in range(series)])


def _pace(clock: Clock, steps: int) -> float:
    """Nanoseconds a step of a denoising loop without a model: a step callback's timing code."""
    from metrics.clock import WallAnchor
    from metrics.timeline import RunTimeline
    from serve.engine.cancellation import Cancellation
    from serve.engine.gpu_thread import StepPacer

    timeline = RunTimeline(clock, WallAnchor.now(), run_id="", shape="", guidance=True)
    pacer = StepPacer(timeline, Cancellation(), lambda index, duration_ns: None, lambda: None)
    timeline.loop_begins()
    start = time.perf_counter_ns()
    for _ in range(steps):
        pacer.step_enqueued()
    pacer.drain()
    return (time.perf_counter_ns() - start) / steps


def _step(clock: Clock, series: int) -> CallTime:
    calls = ", ".join(f"{count:g} {name}" for name, count in calls_a_step().items())
    what = f"one step's timing on the model's thread: {calls}"
    return summary("step", what, [_pace(clock, STEPS) for _ in range(series)])


def calls_a_step() -> dict[str, float]:
    """How often a step's callback calls the clock, by method; counted in a loop without a model."""
    from collections import Counter

    from metrics.clock import HostClock

    counted: Counter[str] = Counter()

    class Counting(HostClock):
        def mark(self) -> Mark:
            counted["mark"] += 1
            return super().mark()

        def poll(self, mark: Mark) -> int | None:
            counted["poll"] += 1
            return super().poll(mark)

        def wait(self, mark: Mark) -> None:
            counted["wait"] += 1
            super().wait(mark)

    _pace(Counting(), STEPS)
    counted["mark"] -= 1  # where the loop begins
    return {name: count / STEPS for name, count in sorted(counted.items())}


def _poll(clock: Clock, series: int) -> CallTime:
    clock.begin()
    mark = clock.mark()
    clock.wait(mark)
    return time_call(
        "poll", "whether a mark has been reached, and when", lambda: clock.poll(mark), series, 50
    )


def _resolve(clock: Clock, series: int) -> CallTime:
    def once() -> float:
        clock.begin()
        marks = [clock.mark() for _ in range(STEPS + 7)]
        clock.wait(marks[-1])
        start = time.perf_counter_ns()
        clock.resolve(marks)
        return time.perf_counter_ns() - start

    what = f"the {STEPS + 7} marks of a run of {STEPS} steps"
    return summary("resolve", what, [once() for _ in range(series)])


def _emit(runtime: Runtime, request: RequestTiming, series: int) -> CallTime:
    from metrics.spans import request_tree

    tracing, spans = runtime.tracing, request_tree(request).size

    def once() -> float:
        identity = tracing.identify()
        start = time.perf_counter_ns()
        room = tracing.emit(identity, request_tree(request))
        taken = time.perf_counter_ns() - start
        assert room  # a tree that is dropped costs nothing
        while tracing.outstanding > MOST_OUTSTANDING:
            time.sleep(0.01)
        return taken

    what = f"one request of {STEPS} steps as {spans} spans, queued"
    return summary("emit", what, [once() for _ in range(series)])


def _export(request: RequestTiming, series: int) -> CallTime:
    """CPU time of the exporting thread: one request's share of a full batch."""
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from bench.service.processes import running
    from metrics.otlp import AnswerReader
    from metrics.spans import emit, request_tree
    from metrics.tracing import BatchSizes

    kept, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tree = request_tree(request)
    size = BatchSizes().export_batch_size
    while len(kept.get_finished_spans()) < size:
        emit(provider.get_tracer("bench"), Context(), tree)
    batch, spans = kept.get_finished_spans()[:size], tree.size
    with running("the OTLP receiver", ["bench.service.otlp_receiver"]) as receiver:
        exporter = OTLPSpanExporter(receiver.address + "/v1/traces", session=AnswerReader("spans"))

        def once() -> float:
            start = time.thread_time_ns()
            result = exporter.export(batch)
            taken = time.thread_time_ns() - start
            assert result.name == "SUCCESS"
            return taken * spans / len(batch)

        once()
        costs = [once() for _ in range(max(1, series // 4))]
        exporter.shutdown()  # type: ignore[no-untyped-call]
    what = f"its {spans} spans sent with others, {len(batch)} at a time: CPU"
    return summary("export", what, costs)


def _runtime(shapes: Sequence[str]) -> Runtime:
    """A runtime for its telemetry only; its exporter discards the spans."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from prometheus_client import CollectorRegistry

    from metrics.tracing import SpanDestination, Tracing
    from serve.engine.build import build_runtime
    from serve.settings import ServeSettings
    from serve.telemetry.setup import build_resource, build_sampling

    class Nowhere(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    settings = ServeSettings.model_validate({"device": "cpu", "ENABLE_TRACING": False})
    runtime = build_runtime(settings, CollectorRegistry())
    runtime.tracing = Tracing(
        sampling=build_sampling(settings),
        destination=SpanDestination(Nowhere()),
        resource=build_resource(settings),
        on_ended=runtime.metrics.spans_ended,
        on_result=runtime.metrics.span_results,
    )
    runtime.metrics.set_warm_shapes(shapes)
    return runtime


def _shapes(count: int) -> list[str]:
    from kernels_warmup.shapes import SDXL_SHAPES

    return [str(shape) for shape in SDXL_SHAPES[:count]]


def recorded_request(
    shape: str, guidance: bool = True, endpoint: str = "/", steps: int = STEPS
) -> RequestTiming:
    """A finished request as the middleware passes it on, with made-up times."""
    from metrics.records import GenerationFacts, RequestTiming, RunTiming, StageTiming, StepTiming

    ms = 1_000_000
    start = 1_700_000_000 * 1000 * ms
    begin = start + 3 * ms
    step_timings = tuple(
        StepTiming(i, begin + (20 + 30 * i) * ms, begin + (50 + 30 * i) * ms, 60 * ms)
        for i in range(steps)
    )
    denoised = step_timings[-1].end_ns
    stages = (
        StageTiming("text_encode", begin, begin + 19 * ms),
        StageTiming("denoise", begin + 20 * ms, denoised),
        StageTiming("vae_decode", denoised, denoised + 33 * ms),
    )
    end = denoised + 34 * ms
    own = (
        StageTiming("receive", start, start + ms),
        StageTiming("queue", start + ms, start + 2 * ms),
        StageTiming("image_encode", end, end + 11 * ms),
        StageTiming("upload", end + 11 * ms, end + 13 * ms),
        StageTiming("respond", end + 13 * ms, end + 15 * ms),
    )
    run = RunTiming("0" * 32, "cuda", shape, guidance, 1, begin, end, stages, step_timings)
    width, height = map(int, shape.split("x"))
    facts = GenerationFacts("sdxl-base", 80, steps, 5.0, width, height, 1)
    last = end + 15 * ms
    return RequestTiming(endpoint, "POST", 200, "ok", start, last, own, (run,), (run,), facts)


def _fill_labels(runtime: Runtime, shapes: Sequence[str]) -> None:
    """Observe every combination of labels once, so that a scrape has its largest size."""
    from dataclasses import replace

    from serve.engine.runtime import ENDPOINTS
    from serve.errors import OUTCOMES

    for shape in (*shapes, "64x64"):
        for guidance in (True, False):
            runtime.metrics.observe_request(
                recorded_request(shape, guidance), {"trace_id": "1" * 32}
            )
    for endpoint in ENDPOINTS:
        for outcome in OUTCOMES:
            request = replace(recorded_request(shapes[0]), endpoint=endpoint, outcome=outcome)
            runtime.metrics.observe_request(request, None)
