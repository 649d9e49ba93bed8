"""Clients that leave while they wait, while their image is drawn, decoded and sent, among clients
that stay and share runs with them."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment
from tests.support.forked import self_hosted
from tests.support.otlp_endpoint import otlp_endpoint
from tests.support.processes import ServerProcess, read

pytestmark = pytest.mark.e2e

CLIENTS = 12
STEPS = 4
LEAVES = ("queue", "step", "decode", "stream")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with (
        otlp_endpoint() as otlp,
        self_hosted(environment(otlp, SDXL_SHAPES="64x64", SDXL_MAX_WAITING="64")) as process,
    ):
        process.wait_until_ready(START_SECONDS)
        yield process


def wanted(seed: int) -> dict[str, Any]:
    return body(seed=seed, num_inference_steps=STEPS, num_images=1 + seed % 2)


async def leave(client: httpx.AsyncClient, when: str, seed: int) -> None:
    """Send a request and close its connection at this moment of its life."""
    async with client.stream("POST", "/stream", json=wanted(seed)) as answer:
        assert answer.status_code == 200
        event = ""
        async for line in answer.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                event = value
                if when == "queue" or (when, event) in (("step", "step"), ("stream", "image")):
                    return
            if when == "decode" and event == "step" and name == "data":
                step = json.loads(value)
                if step["index"] == step["total"] - 1:
                    return


async def stay(client: httpx.AsyncClient, seed: int) -> str:
    answer = await client.post("/", json=wanted(seed))
    assert answer.status_code == 200, answer.text
    images = answer.json()["images"]
    assert len(images) == 1 + seed % 2
    return str(images[0]["url"])


async def mixed(url: str, count: int) -> tuple[Counter[str], int]:
    """`count` clients leave while others stay; returns when they left and how many stayed."""
    chance = random.Random(0)
    left: Counter[str] = Counter()
    stayed = 0
    numbers = iter(range(2 * count))

    async with httpx.AsyncClient(
        base_url=url,
        timeout=ANSWER_SECONDS,
        trust_env=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    ) as client:

        async def worker() -> None:
            nonlocal stayed
            for number in numbers:
                if number % 2:
                    when = chance.choice(LEAVES)
                    await leave(client, when, number)
                    left[when] += 1
                else:
                    await stay(client, number)
                    stayed += 1

        await asyncio.gather(*(worker() for _ in range(CLIENTS)))
    return left, stayed


def cancellations(text: str) -> float:
    found = re.findall(r'^sdxl_cancelled_total\{during="\w+"\} (\S+)$', text, re.MULTILINE)
    return sum(map(float, found))


def gauge(text: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def at_rest(server: ServerProcess) -> str:
    """The metrics once nothing is in flight; fails if that does not come about."""
    deadline = time.monotonic() + 60
    while True:
        text = read(server.metrics_url)
        names = ("sdxl_requests_in_flight", "sdxl_requests_waiting")
        if all(gauge(text, name) == 0 for name in names):
            return text
        assert time.monotonic() < deadline, [(name, gauge(text, name)) for name in names]
        time.sleep(0.1)


def check(server: ServerProcess, count: int) -> None:
    before = at_rest(server)
    left, stayed = asyncio.run(mixed(server.url, count))
    assert left.total() == stayed == count
    assert set(left) == set(LEAVES)
    after = at_rest(server)
    cancelled = cancellations(after) - cancellations(before)
    assert 0 < cancelled <= count
    assert httpx.get(server.url + "/health", timeout=60).status_code == 200
    errors = re.findall(r'^sdxl_errors_total\{error_type="(\w+)"\} (\S+)$', after, re.MULTILINE)
    assert {name for name, value in errors if float(value)} <= {"client_gone"}
    assert "Traceback" not in server.output()


@pytest.mark.timeout(300)
def test_clients_that_leave_disturb_no_other(server: ServerProcess) -> None:
    check(server, 24)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_clients_that_leave_disturb_no_other(server: ServerProcess) -> None:
    check(server, 1000)
