"""Finished timings for the tests of spans and metrics."""

from __future__ import annotations

import dataclasses

from metrics.records import (
    Estimate,
    Failure,
    GenerationFacts,
    GpuConditions,
    RequestTiming,
    RunTiming,
    StageTiming,
    StepTiming,
)

START_NS = 1_700_000_000_000_000_000
MS = 1_000_000

FACTS = GenerationFacts("demo", 12, 3, 5.0, 128, 96, 7)


def run_timing(start_ns: int, step_ms: tuple[float, ...] = (10, 12, 11)) -> RunTiming:
    """A run with 2 ms of text encoding before its steps and 5 ms of decoding after them."""
    at = start_ns + 1 * MS
    text = StageTiming("text_encode", at, at + 2 * MS)
    denoise_start = at = text.end_ns + MS
    steps = []
    for index, duration in enumerate(step_ms):
        end = at + round(duration * MS)
        steps.append(StepTiming(index, at, end, gpu_queue_ns=index * MS))
        at = end
    denoise = StageTiming("denoise", denoise_start, at)
    decode = StageTiming("vae_decode", at, at + 5 * MS)
    return RunTiming(
        run_id="run",
        clock="cuda",
        shape="128x96",
        guidance=True,
        batch_size=1,
        start_ns=start_ns,
        end_ns=decode.end_ns + MS,
        stages=(text, denoise, decode),
        steps=tuple(steps),
        error_bound_ns=20_000,
        drift_ns=-3_000,
    )


def request_timing(
    *,
    outcome: str = "ok",
    failure: Failure | None = None,
    run: RunTiming | None = None,
    status_code: int = 200,
    facts: GenerationFacts | None = FACTS,
) -> RequestTiming:
    """A whole request around a run."""
    receive = StageTiming("receive", START_NS, START_NS + MS)
    queue = StageTiming("queue", START_NS + MS, START_NS + 3 * MS)
    run = run if run is not None else run_timing(queue.end_ns)
    encode = StageTiming("image_encode", run.end_ns + MS, run.end_ns + 3 * MS)
    upload = StageTiming("upload", encode.end_ns, encode.end_ns + MS)
    respond = StageTiming("respond", upload.end_ns, upload.end_ns + MS)
    return RequestTiming(
        endpoint="/",
        method="POST",
        status_code=status_code,
        outcome=outcome,
        start_ns=START_NS,
        end_ns=respond.end_ns,
        stages=(receive, queue, encode, upload, respond),
        runs=(run,),
        observed_runs=(run,),
        facts=facts,
        failure=failure,
        image_bytes=(40_000,),
    )


def requests_with_every_attribute() -> list[RequestTiming]:
    """Requests whose spans have every attribute: one that failed, one that did not, one without a
    run that waited long."""
    facts = dataclasses.replace(FACTS, strength=0.5, prompt="a circle", loras=(("ink", 1.0),))
    run = dataclasses.replace(
        run_timing(START_NS + 3 * MS),
        eager_fallback=True,
        conditions=(GpuConditions(frozenset({"thermal"}), 1200, 1980),),
        profile="file.json.gz",
        error_type="out_of_memory",
    )
    drawn = dataclasses.replace(
        request_timing(run=run, facts=facts), api_key="alice", estimate=Estimate(START_NS, 1.0)
    )
    # Its last stage sticks out of it.
    drawn = dataclasses.replace(drawn, end_ns=drawn.end_ns - MS // 2)
    at_ns = run.start_ns + MS
    failed = dataclasses.replace(drawn, failure=Failure("out_of_memory", "X", "x", at_ns))
    long_wait = StageTiming("queue", START_NS, START_NS + 1000 * MS)
    refused = dataclasses.replace(
        drawn, runs=(), observed_runs=(), stages=(long_wait,), end_ns=long_wait.end_ns
    )
    return [drawn, failed, refused]
