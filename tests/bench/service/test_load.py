"""Open-loop load: arrivals, latencies, the knee, rejections and wrong usage.

Servers here are real ones on loopback whose behaviour a test decides; the service itself is loaded
in tests/e2e/test_load.py.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from bench.__main__ import main
from bench.errors import BenchError
from bench.service import loopback
from bench.service.arrivals import Mix, arrivals
from bench.service.closed_loop import _parse_estimates
from bench.service.load import KEY_VARIABLE, UNLOADED, _sweep, checked_url, key_for
from bench.service.load_report import Level, RequestOutcome, knee, level
from bench.service.loopback import LoopbackHandler
from bench.service.processes import holds_image
from metrics.buckets import ESTIMATE_RATIO
from tests.support.processes import free_port

Capture = pytest.CaptureFixture[str]
Serve = Callable[[dict[str, object]], Awaitable[int]]
IMAGE = '{"image": {"url": "data:image/png;base64,iVBO", "width": 8, "height": 8}}'
REFUSAL = '{"detail": "said the server"}'
ONE = Mix((), ((20, 1.0),))


@contextmanager
def serving(answer: Serve, observed: float = 1.0) -> Iterator[str]:
    """A server whose POST / is `answer`, which returns a status; its histogram holds `observed`
    times what each took."""
    app, registry = FastAPI(), CollectorRegistry()
    duration = Histogram(
        "sdxl_request_duration_seconds",
        "",
        ("endpoint", "outcome"),
        registry=registry,
        buckets=[0.01 * 1.5**i for i in range(15)],
    )

    @app.post("/")
    async def generate(request: Request) -> Response:
        start = time.perf_counter()
        status = await answer(await request.json())
        outcome = "ok" if status == 200 else "rejected"
        duration.labels("/", outcome).observe(observed * (time.perf_counter() - start))
        return Response(IMAGE if status == 200 else REFUSAL, status, media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain")

    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="error", ws="none", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def loaded(url: str, *arguments: str, capsys: Capture) -> tuple[int, dict[str, object]]:
    status = main(["load", "--url", url, "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


# Arrivals ----------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process() -> None:
    """Exponential gaps: their mean is 1 / rate and their standard deviation the same."""
    at = np.array([arrival.at for arrival in arrivals(ONE, 50, 200, 100_000, seed=1)])
    gaps = np.diff(at)
    assert len(at) == pytest.approx(10_000, rel=0.03)
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.05)
    assert at[-1] < 200


def test_arrivals_repeat_by_seed_and_end_at_the_bound() -> None:
    assert arrivals(ONE, 5, 10, 100, seed=1) == arrivals(ONE, 5, 10, 100, seed=1)
    assert arrivals(ONE, 5, 10, 100, seed=1) != arrivals(ONE, 5, 10, 100, seed=2)
    assert len(arrivals(ONE, 5, 1000, 7, seed=1)) == 7


def test_a_mix_is_kept() -> None:
    mix = Mix.of([("1024x1024", 3.0), ("1152x896", 1.0)], [("20", 1.0), ("4", 1.0)])
    drawn = [arrival.body for arrival in arrivals(mix, 100, 100, 10_000, seed=1)]
    large = [body for body in drawn if body["width"] == 1024]
    assert len(large) / len(drawn) == pytest.approx(0.75, abs=0.02)
    short = [body for body in large if body["num_inference_steps"] == 4]
    assert len(short) / len(large) == pytest.approx(0.5, abs=0.03)
    assert len({body["seed"] for body in drawn}) > 0.99 * len(drawn)


def test_without_a_shape_the_server_chooses() -> None:
    assert "width" not in arrivals(ONE, 100, 1, 10, seed=1)[0].body


# Figures -----------------------------------------------------------------------------------------


def test_latency_counts_from_when_a_request_should_have_been_sent() -> None:
    late = RequestOutcome(meant=1.0, sent=3.0, ended=3.5, outcome="200")
    assert late.latency == 2.5
    figures = level(1.0, 10.0, [late], deadline=1.0)
    assert figures.latency_ms["p50"] == 2500
    assert figures.lag_ms == 2000
    assert (figures.ok, figures.in_time, figures.goodput) == (1, 0, 0)


def test_goodput_is_what_was_answered_in_time() -> None:
    answers = [
        *(RequestOutcome(i, i, i + 0.2, "200") for i in range(6)),
        RequestOutcome(6, 6, 9, "200"),
        RequestOutcome(7, 7, 7.01, "429"),
        RequestOutcome(8, 8, 8.01, "429"),
        RequestOutcome(9, 9, 12, "timeout"),
    ]
    figures = level(1.0, 10.0, answers, deadline=1.0)
    assert (figures.sent, figures.ok, figures.in_time) == (10, 7, 6)
    assert figures.goodput == 0.6
    assert figures.refused == {"429": 2, "timeout": 1}
    assert not figures.kept_up
    # A refusal is quick; it must not make latencies look better.
    assert figures.latency_ms["p50"] == pytest.approx(200)


def made_up_level(rate: float, in_time: int) -> Level:
    return Level(rate, 10, 100, 100, in_time, {}, {}, 0)


def test_the_knee_lies_below_the_first_rate_that_was_not_served() -> None:
    lucky = made_up_level(5, 99)
    levels = [made_up_level(1, 100), made_up_level(3, 97), made_up_level(4, 80), lucky]
    found = knee(levels)
    assert found is not None
    assert found.rate == 3
    assert knee(levels[2:3]) is None


@pytest.mark.parametrize(("capacity", "tried_to"), [(0.85, 1.1), (10.0, 1.3), (0.1, 0.3)])
def test_a_sweep_stops_far_past_the_knee_and_narrows_it_down(
    capacity: float, tried_to: float
) -> None:
    """A server that serves `capacity` times the rate of sequential requests."""
    tried: list[tuple[Level, list[RequestOutcome]]] = []

    async def attempt(rate: float) -> None:
        in_time = 100 if rate <= capacity else max(0, round(100 - 300 * (rate - capacity)))
        tried.append((made_up_level(rate, in_time), []))

    asyncio.run(_sweep(attempt, tried, 1.0))
    rates = [each.rate for each, _ in tried]
    assert max(rates) == tried_to
    if capacity == 0.85:
        assert rates[-1] == pytest.approx((0.8 + 0.9) / 2)


# Real servers ------------------------------------------------------------------------------------


@pytest.mark.timing
def test_a_stall_delays_every_request_that_arrives_in_it(capsys: Capture) -> None:
    """The server stalls for a second, once. A client that waits for each answer would send
    one slow request and call p90 fine; of those who arrive at 30 a second, 30 are kept waiting."""
    began: list[float] = []

    async def answer(_body: dict[str, object]) -> int:
        began.append(time.monotonic())
        if len(began) == 16:  # of the load; six come before it
            time.sleep(1.0)  # noqa: ASYNC251, RUF100 - blocks the whole loop on purpose
        return 200

    with serving(answer) as url:
        arguments = ("--rate", "30", "--seconds", "3", "--deadline", "0.3")
        _, report = loaded(url, *arguments, capsys=capsys)
    (found,) = report["levels"]  # type: ignore[misc]
    late = found["sent"] - found["in_time"]
    assert 15 <= late <= 45  # 21 or so, in 0.7 s of the stall
    assert found["latency_ms"]["p90"] > 300
    assert found["latency_ms"]["p50"] < 300


@pytest.mark.timing
def test_rejections_are_counted_by_status_and_the_histogram_is_compared(
    capsys: Capture,
) -> None:
    """One request at a time, 30 ms each, and one that may wait."""
    turn = asyncio.Lock()
    inside = 0

    async def answer(_body: dict[str, object]) -> int:
        nonlocal inside
        if inside >= 2:
            return 429
        inside += 1
        async with turn:
            await asyncio.sleep(0.03)
        inside -= 1
        return 200

    with serving(answer) as url:
        arguments = ("--rate", "5", "100", "--seconds", "1.5")
        status, report = loaded(url, *arguments, capsys=capsys)
    low, high = report["levels"]  # type: ignore[misc]
    assert low["rate"] == 5
    assert high["refused"]["429"] > 0.3 * high["sent"]
    assert high["kept_up"] is False
    assert high["ok"] + high["refused"]["429"] == high["sent"]
    assert (status, report["server_agrees"]) == (0, True)
    assert report["server"]["client_count"] == low["ok"] + high["ok"]  # type: ignore[index]


def test_a_histogram_that_disagrees_is_an_error(capsys: Capture) -> None:
    async def answer(_body: dict[str, object]) -> int:
        await asyncio.sleep(0.1)
        return 200

    with serving(answer, observed=0.3) as url:
        status = main(["load", "--url", url, "--rate", "20", "--seconds", "1"])
    said = capsys.readouterr().out
    assert status == 1
    assert "the server puts p50 between" in said


def test_a_server_without_metrics_is_not_compared(capsys: Capture, tmp_path: Path) -> None:
    async def answer(_body: dict[str, object]) -> int:
        return 200

    with serving(answer) as url:
        out = tmp_path / "load.json"
        arguments = ["--rate", "20", "--seconds", "0.5", "--deadline", "9", "--out", str(out)]
        status = main(["load", "--url", url, "--metrics-url", f"{url}/none", *arguments])
    said = capsys.readouterr().out
    assert status == 0
    assert "knee: not reached; 20 a second" in said
    assert f"note: {url}/none" in said
    assert json.loads(out.read_text())["server"] is None


@pytest.mark.parametrize(
    ("status", "said"), [(422, "422: said the server"), (503, "503: said the server")]
)
def test_a_server_that_refuses_the_requests_ends_it(
    status: int, said: str, capsys: Capture
) -> None:
    async def answer(_body: dict[str, object]) -> int:
        return status

    with serving(answer) as url:
        assert main(["load", "--url", url]) == 2
    assert said in capsys.readouterr().err


NOT_IMAGES = (
    b"",
    b"OK",
    b"<html>it works</html>",
    b"[]",
    b'{"image": null}',
    b'{"images": []}',
    b'{"image": {"url": ""}}',
    b'{"image": {"url": 7}}',
    b'{"image": {"url": "data:image/png;base64,"}}',
    b'{"image": {"url": "data:text/html;base64,iVBO"}}',
)


@pytest.mark.parametrize("content", NOT_IMAGES)
def test_a_200_without_an_image_is_not_an_answer(content: bytes) -> None:
    assert holds_image(IMAGE.encode())
    assert holds_image(b'{"image": {"url": "https://cdn.example/1.png"}}')
    assert not holds_image(content)


@pytest.mark.parametrize("load", [["--rate", "20", "--seconds", "0.5"], ["--clients", "2"]])
def test_a_server_that_is_no_stepspan_is_refused(load: list[str], capsys: Capture) -> None:
    class AnswersEverything(LoopbackHandler):
        def respond(self) -> None:
            self.send(b"", {})

    with loopback.serving(AnswersEverything) as url:
        assert main(["load", "--url", url, *load]) == 2
    captured = capsys.readouterr()
    assert url in captured.err
    assert "without an image" in captured.err
    assert captured.out == ""


def test_an_image_that_stops_coming_is_no_goodput(capsys: Capture) -> None:
    """Empty 200s begin after the unloaded requests, as when a proxy takes over."""
    answered: list[int] = []

    class Fades(LoopbackHandler):
        def respond(self) -> None:
            answered.append(1)
            self.send(IMAGE.encode() if len(answered) <= UNLOADED else b"", {})

    with loopback.serving(Fades) as url:
        arguments = ("--rate", "20", "--seconds", "0.5", "--metrics-url", f"{url}/none")
        _, report = loaded(url, *arguments, capsys=capsys)
    (found,) = report["levels"]  # type: ignore[misc]
    assert (found["ok"], found["in_time"], found["goodput"]) == (0, 0, 0)
    assert found["refused"] == {"no image": found["sent"]}


# Wrong usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "https://10.0.0.7:8080",
        "http://0.0.0.0:80",
        "http://localhost.example.com",
        "http://[2001:db8::1]:80",
    ],
)
def test_another_machine_needs_the_option_anywhere(url: str) -> None:
    with pytest.raises(BenchError, match="--anywhere"):
        checked_url(url, anywhere=False)
    assert checked_url(url + "/", anywhere=True) == url


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "http://localhost", "http://[::1]:80"])
def test_this_machine_needs_no_permission(url: str) -> None:
    assert checked_url(url, anywhere=False) == url


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://localhost", "http://", "http://[::1"])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(BenchError, match="http://HOST:PORT"):
        checked_url(url, anywhere=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "0"], "invalid number above 0 value: '0'"),
        (["--rate", "inf"], "invalid number above 0 value"),
        (["--max-requests", "0"], "invalid whole number above 0 value"),
        (["--shape", "big"], "--shape big is not allowed. Allowed: WIDTHxHEIGHT"),
        (["--shape", "64x64=-1"], "invalid NAME or NAME=SHARE value"),
        (["--seed", "-1"], "invalid whole number from 0 value: '-1'"),
        (["--steps", "few"], "--steps few is not allowed. Allowed: a whole number above 0"),
        (["--timeout", "1"], "cannot be reached: ConnectError"),
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], said: str, capsys: Capture) -> None:
    try:
        status = main(["load", "--url", f"http://127.0.0.1:{free_port()}", *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err


# Several clients ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_clients_at_once_are_compared_with_one(capsys: Capture) -> None:
    """A server that answers any number of requests in the same time: N clients get N times as
    many images a second."""

    async def answer(_: dict[str, object]) -> int:
        await asyncio.sleep(0.1)
        return 200

    with serving(answer) as url:
        status, told = loaded(url, "--clients", "4", "--blocks", "2", capsys=capsys)
    assert status == 0
    assert told["clients"] == 4
    rates = told["images_per_second"]
    assert isinstance(rates, dict)
    assert [len(rates[count]) for count in ("1", "4")] == [2, 2]
    ratio = told["ratio"]
    assert isinstance(ratio, dict)
    assert 2.5 < ratio["low"] <= ratio["point"] <= ratio["high"] < 4.2
    assert told["estimates"] is None  # this server makes none


def test_a_comparison_of_clients_needs_answers(capsys: Capture) -> None:
    async def full(_: dict[str, object]) -> int:
        return 429

    with serving(full) as url:
        assert main(["load", "--url", url, "--clients", "2"]) == 2
    assert "429" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--clients", "1"], ["--clients", "x"], ["--clients", "2", "--rate", "1"]]
)
def test_wrong_usage_of_clients(arguments: list[str], capsys: Capture) -> None:
    try:
        status = main(["load", "--url", "http://127.0.0.1:1", *arguments])
    except SystemExit as exit_:
        status = int(str(exit_.code))
    assert status == 2
    assert "--clients" in capsys.readouterr().err


def test_the_servers_estimates_are_read_from_its_histogram() -> None:
    registry = CollectorRegistry()
    ratio = Histogram("sdxl_estimate_ratio", "", buckets=ESTIMATE_RATIO, registry=registry)
    for actual in (0.5, 0.91, 1.0, 1.09, 1.5):
        ratio.observe(actual)
    assert _parse_estimates(generate_latest(registry).decode()) == (3, 5)
    assert _parse_estimates("") is None


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://127.0.0.1:8080/", True),
        ("http://127.0.0.1:8080/metrics", True),
        ("http://127.0.0.1:9090/metrics", False),
        ("https://127.0.0.1:8080/", False),
        ("http://elsewhere.test:8080/", False),
    ],
)
def test_a_key_goes_to_its_server_only(url: str, sent: bool) -> None:
    add = key_for(httpx.URL("http://127.0.0.1:8080"), "a-key-of-a-caller")
    assert ("authorization" in add(httpx.Request("GET", url)).headers) == sent
    without = key_for(httpx.URL("http://127.0.0.1:8080"), "")
    assert "authorization" not in without(httpx.Request("GET", url)).headers


def test_a_key_that_no_header_carries_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "hunter2\nhunter2")
    assert main(["load", "--url", f"http://127.0.0.1:{free_port()}"]) == 2
    said = capsys.readouterr().err
    assert KEY_VARIABLE in said
    assert "hunter2" not in said
