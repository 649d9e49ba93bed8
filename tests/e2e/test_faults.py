"""A failing tracing backend does not disturb requests: each kind of fault, on real servers."""

from __future__ import annotations

import math
import re
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx
import pytest

from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, environment
from tests.support.forked import fal_local, forked_servers
from tests.support.otlp_endpoint import Answer, OtlpEndpoint, otlp_endpoint
from tests.support.processes import ROOT, ServerProcess, read, refusing_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EXIT_SECONDS = 4.5
"""From SIGTERM to the process's end, at rest."""


@dataclass(frozen=True)
class Fault:
    """A fault of the backend, and the fate of the spans."""

    backend: str
    """The first column of the documented table."""
    fate: str
    """The second column: what happens to a batch."""
    result: str
    """The label by which the spans are counted while the server runs."""
    answer: Answer = field(default_factory=Answer)
    url: str = ""
    tls: bool = False
    holds: bool = False
    """Whether spans are still queued at SIGTERM."""


RETRIED = "retried for 10 s, then dropped"
DROPPED = "dropped at once"

FAULTS = (
    Fault("is healthy", "delivered", "exported"),
    Fault("refuses connections", RETRIED, "failed", url="http://127.0.0.1:{port}", holds=True),
    Fault(
        "accepts and never answers",
        "dropped after 10 s",
        "failed",
        Answer(seconds=math.inf),
        holds=True,
    ),
    Fault("answers after a second", "delivered", "exported", Answer(seconds=1)),
    Fault("answers 400", DROPPED, "failed", Answer(400)),
    Fault("answers 401", DROPPED, "failed", Answer(401)),
    Fault("answers 403", DROPPED, "failed", Answer(403)),
    Fault("answers 413", DROPPED, "failed", Answer(413)),
    Fault(
        "answers 429 with `Retry-After`",
        "retried after the time it names, for 10 s, then dropped",
        "failed",
        Answer(429, {"Retry-After": "4"}),
        holds=True,
    ),
    Fault("answers 503", RETRIED, "failed", Answer(503), holds=True),
    Fault(
        "answers 302",
        "not followed, dropped at once",
        "failed",
        Answer(302, {"Location": "/other"}),
    ),
    Fault(
        "accepts a batch except for some spans",
        "the rest delivered",
        "rejected",
        Answer(rejected=1),
    ),
    Fault("has a certificate that no trusted authority signed", DROPPED, "failed", tls=True),
    Fault(
        "has a name that does not resolve",
        RETRIED,
        "failed",
        url="http://backend.invalid:4318",
        holds=True,
    ),
)

REQUEST = {"prompt": "a red circle", "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 1}

ROUNDS = 6
SPANS = 11
"""Of one request: ten and a step."""


@dataclass
class Served:
    """A server whose backend has a fault, and the seconds of each request."""

    fault: Fault
    otlp: OtlpEndpoint
    process: ServerProcess
    seconds: list[float] = field(default_factory=list)

    def request(self) -> str:
        """Send one request and keep its duration; returns its trace id."""
        start = time.perf_counter()
        answer = httpx.post(self.process.url, json=REQUEST, timeout=ANSWER_SECONDS)
        self.seconds.append(time.perf_counter() - start)
        answer.raise_for_status()
        return str(answer.json()["trace_id"])

    def counts(self) -> SpanCounts:
        return SpanCounts.read(self.process)


@dataclass(frozen=True)
class SpanCounts:
    """The counts of spans in a scrape: the service's own and the SDK's."""

    ended: int
    results: dict[str, int]
    queued: int
    in_flight: int
    processed: int

    @classmethod
    def read(cls, process: ServerProcess) -> SpanCounts:
        text = read(process.metrics_url)

        def value(name: str) -> int:
            found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
            return round(sum(map(float, found)))

        results = re.findall(r'^sdxl_spans_total\{result="(\w+)"\} (\S+)$', text, re.MULTILINE)
        return cls(
            ended=value("sdxl_spans_ended_total"),
            results={name: round(float(count)) for name, count in results},
            queued=value("otel_sdk_processor_span_queue_size"),
            in_flight=value("otel_sdk_exporter_span_inflight"),
            processed=value("otel_sdk_processor_span_processed_total"),
        )

    @property
    def all_accounted_for(self) -> bool:
        settled = sum(self.results.values())
        waiting = self.queued + self.in_flight
        return self.ended == settled + waiting and self.processed == settled + self.in_flight


def settled_counts(served: Served, ended: int) -> SpanCounts:
    """The counts once `ended` spans have ended and all are accounted for.

    No count has a span that has left the queue and whose export has not begun, so this waits.
    """
    deadline = time.monotonic() + 20
    while True:
        counts = served.counts()
        if counts.ended >= ended and counts.all_accounted_for:
            return counts
        assert time.monotonic() < deadline, counts
        time.sleep(0.05)


def spans_of_the_start(served: Served) -> int:
    """The number of spans of the start, once it no longer grows."""
    seen = 0
    while True:
        now = settled_counts(served, 1).ended
        if now == seen:
            return now
        seen = now
        time.sleep(0.1)


def backend(stack: ExitStack, fault: Fault) -> tuple[OtlpEndpoint, str]:
    """An endpoint with the fault, and the URL that the server exports to."""
    if fault.url:
        return OtlpEndpoint(url=""), fault.url.format(port=stack.enter_context(refusing_port()))
    otlp = stack.enter_context(otlp_endpoint(fault.answer, fault.tls))
    return otlp, otlp.url


PUSHING = {"SDXL_OTLP_METRICS": "true", "OTEL_METRIC_EXPORT_INTERVAL": "1000"}
"""The metrics are pushed to the same backend."""

SILENT = next(fault for fault in FAULTS if fault.backend == "accepts and never answers")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Served]]:
    """A ready server for every fault, and one more whose backend of both signals is silent."""
    with ExitStack() as stack:
        faults = (*FAULTS, SILENT)
        backends = [backend(stack, fault) for fault in faults]
        settings = [
            environment(otlp, SDXL_SHAPES="64x64", OTEL_EXPORTER_OTLP_ENDPOINT=url)
            for otlp, url in backends
        ]
        settings[-1] |= PUSHING
        processes = stack.enter_context(forked_servers(settings))
        started = [
            Served(fault, otlp, process)
            for fault, (otlp, _), process in zip(faults, backends, processes, strict=True)
        ]
        for server in started:
            server.process.wait_until_ready(START_SECONDS)
        yield started


def test_the_whole_table(servers: list[Served]) -> None:
    """One test, because each server gets its requests, is read and is ended once."""
    table = servers[: len(FAULTS)]
    of_the_start = [spans_of_the_start(served) for served in table]
    for _ in range(ROUNDS):
        for served in table:  # in turn, so that all see the same machine
            served.request()

    healthy = statistics.median(table[0].seconds)
    for served in table:
        median = statistics.median(served.seconds)
        assert median < 2 * healthy + 0.1, (served.fault.backend, median, healthy)
        assert max(served.seconds) < 5, served.fault.backend

    for served, before in zip(table, of_the_start, strict=True):
        ended = before + ROUNDS * SPANS
        assert settled_counts(served, ended).ended == ended, served.fault.backend
        wait_for_result(served)

    ends = end_all(table)
    for served, seconds in zip(table, ends, strict=True):
        median_ms = statistics.median(served.seconds) * 1e3
        print(f"{served.fault.backend:<40} {median_ms:6.1f} ms, gone after {seconds:.2f} s")
    for served, seconds in zip(table, ends, strict=True):
        output = served.process.output()
        assert served.process.process.returncode == 0, output
        assert seconds < EXIT_SECONDS, (served.fault.backend, seconds)
        lost = re.findall(r"(\d+) spans were not exported within the .* allowed at", output)
        assert len(lost) == (1 if served.fault.holds else 0), (served.fault.backend, output)
        assert all(int(count) >= SPANS for count in lost), lost
        assert "Traceback" not in output


def wait_for_result(served: Served) -> None:
    """Wait for the first result, and assert that it is the table's."""
    deadline = time.monotonic() + 30
    while True:
        results = {name: count for name, count in served.counts().results.items() if count}
        if served.fault.result in results:
            break
        assert not results, (served.fault.backend, results)
        assert time.monotonic() < deadline, served.fault.backend
        time.sleep(0.2)
    allowed = {served.fault.result} | ({"exported"} if served.fault.answer.rejected else set())
    assert set(results) <= allowed, served.fault.backend


def end_all(table: list[Served]) -> list[float]:
    """Send each server a last request and SIGTERM; returns the seconds until each had ended.

    The signals are sent one after the other; the servers end in parallel.
    """
    ends = [0.0] * len(table)

    def end(number: int) -> None:
        ends[number] = table[number].process.terminate()

    threads = []
    for number, served in enumerate(table):
        last = served.request()
        threads.append(threading.Thread(target=end, args=(number,)))
        threads[-1].start()
        if served.fault.result == "exported":
            # A backend that accepts spans has received them all.
            threads[-1].join()
            assert len(served.otlp.trace(last)) == SPANS
    for thread in threads:
        thread.join()
    return ends


def test_sigterm_in_mid_request_with_a_silent_backend(servers: list[Served]) -> None:
    """The running request is answered as usual, and telemetry delays the end by a bounded time."""
    process = servers[-1].process
    running = {"prompt": "a red circle", "num_inference_steps": 60, "seed": 1}
    with httpx.stream(
        "POST", process.url + "/stream", json=running, timeout=ANSWER_SECONDS
    ) as answer:
        lines = answer.iter_lines()
        while next(lines) != "event: step":
            pass
        process.process.send_signal(signal.SIGTERM)
        assert "event: image" in list(lines)
        answered = time.monotonic()
    process.process.wait(60)
    seconds = time.monotonic() - answered
    print(f"traces' and metrics' backends silent: gone {seconds:.2f} s after the answer")
    assert seconds < EXIT_SECONDS
    assert process.process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS[1:3], ids=lambda fault: fault.backend)
def test_sigterm_with_both_backends_dead(fault: Fault) -> None:
    """The last spans and the last push are given up side by side, within the same time limit."""
    with ExitStack() as stack:
        otlp, url = backend(stack, fault)
        settings = environment(otlp, SDXL_SHAPES="64x64", OTEL_EXPORTER_OTLP_ENDPOINT=url)
        (process,) = stack.enter_context(forked_servers([settings | PUSHING]))
        process.wait_until_ready(START_SECONDS)
        served = Served(fault, otlp, process)
        for _ in range(ROUNDS):
            served.request()
        pushes = re.compile(r'^sdxl_otlp_pushes_total\{result="failed"\} [1-9]', re.MULTILINE)
        deadline = time.monotonic() + 30
        while not pushes.search(httpx.get(process.metrics_url, timeout=60).text):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        served.request()  # the spans of those before may have been given up, as the push was
        seconds = process.terminate()
        print(f"{fault.backend}: gone after {seconds:.2f} s")
        assert seconds < EXIT_SECONDS
        assert process.process.returncode == 0
        output = process.output()
        assert len(re.findall(r"spans were not exported within the", output)) == 1
        assert "Traceback" not in output


FAL_FAULTS = FAULTS[:3]  # healthy, closed and silent


@pytest.mark.slow
def test_under_fals_runtime() -> None:
    with ExitStack() as stack:
        table = []
        for fault in FAL_FAULTS:
            otlp, url = backend(stack, fault)
            settings = environment(otlp, SDXL_SHAPES="64x64", OTEL_EXPORTER_OTLP_ENDPOINT=url)
            table.append(Served(fault, otlp, stack.enter_context(fal_local(settings))))
        for served in table:
            served.process.wait_until_ready(START_SECONDS)
        of_the_start = [spans_of_the_start(served) for served in table]
        for _ in range(ROUNDS):
            for served in table:
                served.request()
        healthy = statistics.median(table[0].seconds)
        for served, before in zip(table, of_the_start, strict=True):
            assert statistics.median(served.seconds) < 2 * healthy + 0.1, served.fault.backend
            ended = before + ROUNDS * SPANS
            assert settled_counts(served, ended).ended == ended, served.fault.backend
        ends = end_all(table)
        for served, seconds in zip(table, ends, strict=True):
            output = served.process.output()
            assert seconds < EXIT_SECONDS, (served.fault.backend, seconds)
            assert ("spans were not exported" in output) == served.fault.holds, output


@pytest.mark.docs
def test_the_documented_table_is_this_one() -> None:
    page = (ROOT / "docs" / "tracing.md").read_text()
    shown = page.split("<!-- faults: begin -->")[1].split("<!-- faults: end -->")[0]
    assert shown.strip() == rendered().strip()


def rendered() -> str:
    """The table as docs/tracing.md shows it."""
    rows = [
        f"| {f.backend} | {f.fate} | `{f.result}` | {'`shutdown`' if f.holds else 'nothing'} |"
        for f in FAULTS
    ]
    head = "| the backend | a batch is | counted as | lost at SIGTERM |"
    return "\n".join([head, "|---|---|---|---|", *rows])
