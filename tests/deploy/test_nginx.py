"""Two real servers behind a real nginx with the shipped configuration, one process a GPU."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.nginx import NGINX, Nginx, nginx
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body
from tests.support.forked import forked_servers
from tests.support.processes import ServerProcess, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

if NGINX is None:
    if os.environ.get("CI") == "true":
        raise RuntimeError("CI must have Debian's nginx package; .ci/run installs it")
    pytest.skip("nginx is not installed (apt-get install nginx)", allow_module_level=True)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
LONG = {"num_inference_steps": 100}


@contextmanager
def two_servers(folder: Path, **settings: str) -> Iterator[tuple[Nginx, list[ServerProcess]]]:
    """Both ready. A run has one image, so that two requests at one server wait for each other."""
    environment = {
        "SDXL_DEVICE": "cpu",
        "SDXL_MAX_BATCH": "1",
        "SDXL_PLAYGROUND": "false",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    with forked_servers([environment, environment]) as servers:
        for server in servers:
            server.wait_until_ready(START_SECONDS)
        with nginx([port(server) for server in servers], folder) as front:
            yield front, servers


def port(server: ServerProcess) -> int:
    return int(server.url.rpartition(":")[2])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nginx, list[ServerProcess]]]:
    """Shared by the tests that end no server. A server whose one place is taken refuses."""
    with two_servers(tmp_path_factory.mktemp("nginx"), SDXL_MAX_WAITING="0") as both:
        yield both


def post(url: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return httpx.post(url, json=body(**fields), headers=headers, timeout=ANSWER_SECONDS)


def images(server: ServerProcess) -> float:
    return metric(server, "sdxl_images_total")


def metric(server: ServerProcess, name: str) -> float:
    for line in httpx.get(server.metrics_url, timeout=30).text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    raise AssertionError(f"no {name}")


@contextmanager
def in_background(*calls: Callable[[], Any]) -> Iterator[list[Future[Any]]]:
    with ThreadPoolExecutor(len(calls)) as pool:
        yield [pool.submit(call) for call in calls]


def events(url: str, arrived: list[tuple[float, dict[str, Any]]], **fields: Any) -> None:
    """Read a stream; each event is appended with the time at which it arrived."""
    with (
        httpx.Client(timeout=ANSWER_SECONDS) as client,
        client.stream("POST", url + "/stream", json=body(**fields)) as answer,
    ):
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: "):
                arrived.append((time.monotonic(), json.loads(line.removeprefix("data: "))))


def test_requests_spread(pair: tuple[Nginx, list[ServerProcess]]) -> None:
    front, servers = pair
    before = [images(server) for server in servers]
    for _ in range(2):
        with in_background(*[lambda: post(front.url, num_inference_steps=20)] * 2) as answers:
            assert [answer.result().status_code for answer in answers] == [200, 200]
    wait_until(lambda: sum(map(images, servers)) == sum(before) + 4)
    assert [images(server) - was for server, was in zip(servers, before, strict=True)] == [2, 2]


def test_a_request_goes_to_the_server_with_fewest(pair: tuple[Nginx, list[ServerProcess]]) -> None:
    front, servers = pair
    seen = len(front.attempts())
    with in_background(lambda: post(front.url, **LONG)) as [running]:
        wait_until(lambda: any(metric(each, "sdxl_requests_in_flight") == 1 for each in servers))
        [idle] = [each for each in servers if metric(each, "sdxl_requests_in_flight") == 0]
        for _ in range(3):
            assert post(front.url, num_inference_steps=1).status_code == 200
        assert not running.done(), "the other was not busy for as long as this needs"
    # In turn, one of the three would have come to the busy server, and been refused.
    assert front.attempts()[seen : seen + 3] == [[(port(idle), 200)]] * 3


def test_a_full_servers_requests_go_to_the_other(pair: tuple[Nginx, list[ServerProcess]]) -> None:
    front, servers = pair
    full = servers[0]
    seen = len(front.attempts())
    with in_background(lambda: post(full.url, **LONG)) as [running]:
        wait_until(lambda: metric(full, "sdxl_requests_in_flight") == 1)
        # nginx does not know of that request, and tries both in turn.
        for _ in range(3):
            assert post(front.url, num_inference_steps=1).status_code == 200
        assert not running.done(), "the server was not full for as long as this needs"
        assert running.result().status_code == 200
    passed_on = [attempts for attempts in front.attempts()[seen:] if len(attempts) > 1]
    assert passed_on
    assert {tuple(attempts) for attempts in passed_on} == {
        ((port(full), 429), (port(servers[1]), 200))
    }


def test_a_stream_arrives_event_by_event(pair: tuple[Nginx, list[ServerProcess]]) -> None:
    front, _ = pair
    arrived: list[tuple[float, dict[str, Any]]] = []
    events(front.url, arrived, num_inference_steps=20)
    steps = [(at, data) for at, data in arrived if data["type"] == "step"]
    assert [data["index"] for _, data in steps] == list(range(20))
    assert arrived[-1][1]["type"] == "image"
    drawing = sum(data["gpu_ms"] for _, data in steps) / 1000
    # Held back, they would all arrive at the end.
    assert steps[-1][0] - steps[0][0] > drawing / 2


def test_a_callers_trace_is_continued(pair: tuple[Nginx, list[ServerProcess]]) -> None:
    front, _ = pair
    answer = post(front.url, {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"})
    assert answer.json()["trace_id"] == TRACE_ID
    assert front.log.read_text().splitlines()[-1].endswith(f"trace {TRACE_ID}")


def test_what_belongs_to_one_process_is_not_served(pair: tuple[Nginx, list[ServerProcess]]) -> None:
    front, servers = pair
    for path in ("/metrics", "/debug/requests", "/debug/profile"):
        assert httpx.get(front.url + path, timeout=30).status_code == 404
    assert httpx.get(servers[0].metrics_url, timeout=30).status_code == 200
    # Another path that leads to the same: nginx names its client, so nobody is an operator.
    assert httpx.get(front.url + "//debug/requests", timeout=30).status_code in (403, 404)
    assert httpx.get(front.url + "/ready", timeout=30).status_code == 200


def test_the_server_says_that_a_body_is_too_large(pair: tuple[Nginx, list[ServerProcess]]) -> None:
    front, _ = pair
    for path, size in (("/", 100_000), ("/image-to-image", 10 * 1024 * 1024 + 1)):
        answer = httpx.post(
            front.url + path,
            content=b" " * size,
            headers={"content-type": "application/json"},
            timeout=ANSWER_SECONDS,
        )
        assert answer.status_code == 413
        assert answer.json()["error_type"] == "body_too_large"


def test_a_draining_servers_waiting_requests_go_to_the_other(tmp_path: Path) -> None:
    with two_servers(tmp_path) as (front, (ending, other)):
        # Its one run is taken, so what nginx sends there waits.
        with in_background(lambda: post(ending.url, **LONG)) as [direct]:
            wait_until(lambda: metric(ending, "sdxl_requests_in_flight") == 1)
            with in_background(*[lambda: post(front.url, **LONG)] * 2) as sent:
                wait_until(lambda: metric(ending, "sdxl_requests_waiting") == 1)
                ending.process.send_signal(signal.SIGTERM)
                assert [each.result().status_code for each in sent] == [200, 200]
            assert direct.result().status_code == 200  # it ran, and was finished
        ending.process.wait(30)
        assert ending.process.returncode == 0
        moved = [attempts for attempts in front.attempts() if len(attempts) > 1]
        assert moved == [[(port(ending), 503), (port(other), 200)]]
        assert all(post(front.url).status_code == 200 for _ in range(3))


def test_a_killed_servers_requests_are_drawn_by_the_other(tmp_path: Path) -> None:
    with two_servers(tmp_path) as (front, (killed, other)):
        with in_background(*[lambda: post(front.url, seed=7, **LONG)] * 2) as sent:
            wait_until(lambda: metric(killed, "sdxl_requests_in_flight") == 1)
            killed.process.send_signal(signal.SIGKILL)
            answers = [each.result() for each in sent]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json()["image"] == answers[1].json()["image"]
        moved = [attempts for attempts in front.attempts() if len(attempts) > 1]
        assert moved == [[(port(killed), 502), (port(other), 200)]]
        assert all(post(front.url).status_code == 200 for _ in range(3))


def test_a_killed_servers_streams_break_off(tmp_path: Path) -> None:
    with two_servers(tmp_path) as (front, (killed, _)):
        arrived: list[list[tuple[float, dict[str, Any]]]] = [[], []]
        begun = threading.Barrier(3, timeout=60)

        def read(index: int) -> None:
            begun.wait()
            events(front.url, arrived[index], **LONG)

        with in_background(lambda: read(0), lambda: read(1)) as streams:
            begun.wait()
            wait_until(lambda: all(len(each) > 2 for each in arrived))
            killed.process.send_signal(signal.SIGKILL)
            failures = [stream.exception() for stream in streams]
        # The answer had begun, so no other server can go on with it: the caller sees it end early.
        [broken] = [index for index, failure in enumerate(failures) if failure is not None]
        assert isinstance(failures[broken], httpx.RemoteProtocolError)
        assert arrived[broken][-1][1]["type"] == "step"
        assert arrived[1 - broken][-1][1]["type"] == "image"
