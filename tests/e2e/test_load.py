"""The service under load: clients that leave make room, no kind of request waits for ever, and the
bench's own measurements of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.__main__ import main
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, Server, body
from tests.support.forked import self_hosted

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_the_service_is_measured_and_its_histogram_agrees(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    status = main(
        [
            "load", "--url", server.process.url, "--metrics-url", server.process.metrics_url,
            "--rate", "1", "--seconds", "4", "--steps", "1=3", "2", "--out", str(out),
        ]
    )  # fmt: skip
    result = json.loads(out.read_text())
    (level,) = result["levels"]
    assert level["sent"] > 0
    assert level["ok"] + sum(level["refused"].values()) == level["sent"]
    # One request may wait; the server may refuse others.
    assert set(level["refused"]) <= {"429"}
    assert result["server"]["server_count"] == result["server"]["client_count"] == level["ok"]
    assert result["server_agrees"] is True
    # The clients' time beyond the server's: the connection, and the last bytes.
    assert result["server"]["mean_overhead_ms"] > 0
    assert status == 0


NUMBERS_OF_STEPS = iter(range(99, 1, -1))


@contextmanager
def waiting_for(server: Server, event: str) -> Iterator[int]:
    """A client of a long stream that has come to an event or was refused; gives its status. Each
    has its own number of steps, so that no two share a run."""
    wanted = body(num_inference_steps=next(NUMBERS_OF_STEPS))
    with server.client.stream("POST", "/stream", json=wanted) as answer:
        lines = answer.iter_lines()  # the client stays for as long as these are kept
        if answer.status_code == 200:
            while next(lines) != f"event: {event}":
                pass
        yield answer.status_code


def test_a_client_that_leaves_the_queue_frees_its_place_at_once(server: Server) -> None:
    with waiting_for(server, "step"):
        with waiting_for(server, "queued"):
            assert server.generate(num_inference_steps=1).status_code == 429
        left = time.monotonic()
        refused = True
        while refused:
            # The server learns of it from the closed connection; a busy machine takes its time.
            assert time.monotonic() - left < 1
            with waiting_for(server, "queued") as status:
                refused = status == 429
                if not refused:
                    print(f"the place was free after {time.monotonic() - left:.3f} s")
                    # It waits, so the first client's run has not ended.
                    assert "\nsdxl_requests_waiting 1.0\n" in server.metrics()


# Floods


ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "size": ("/", {"width": 96, "height": 64}),
    "steps": ("/", {"num_inference_steps": 3}),
    "guidance": ("/", {"guidance_scale": 0.0}),
    "images": ("/", {"num_images": 3}),
    "lora": ("/", {"loras": [{"path": "ink"}]}),
    "stream": ("/stream", {"preview": True}),
}


@pytest.mark.slow
def test_no_kind_waits_for_ever_beside_a_flood_of_another() -> None:
    """Twelve clients always have a request waiting, and four of theirs share a run. Another kind
    waits no longer than they do, but for its own run and for two that may pass a LoRA."""
    flood_seconds: list[float] = []
    odd_seconds: dict[str, float] = {}

    async def timed(client: httpx.AsyncClient, path: str, **fields: Any) -> float:
        start = time.monotonic()
        small = {"width": 64, "height": 64, "num_inference_steps": 4}
        answer = await client.post(path, json=body(**small | fields))
        assert answer.status_code == 200, answer.text
        assert "event: error" not in answer.text
        return time.monotonic() - start

    async def flood(client: httpx.AsyncClient, seed: int) -> None:
        while len(odd_seconds) < len(ODD):
            flood_seconds.append(await timed(client, "/", seed=seed))

    async def odd(client: httpx.AsyncClient) -> None:
        await asyncio.sleep(3)
        for name, (path, fields) in ODD.items():
            odd_seconds[name] = await timed(client, path, **fields)

    async def together(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:
            await asyncio.gather(odd(client), *(flood(client, seed) for seed in range(12)))

    settings = {
        "SDXL_DEVICE": "cpu",
        "SDXL_SHAPES": "64x64,96x64",
        "SDXL_MAX_BATCH": "4",
        "SDXL_LORAS": "ink=demo:night",
        "OMP_NUM_THREADS": "1",
    }
    with self_hosted(settings) as server:
        server.wait_until_ready(START_SECONDS)
        asyncio.run(together(server.url))
    longest = max(flood_seconds)
    print(f"flood: {len(flood_seconds)} requests, {longest:.2f} s at most; {odd_seconds}")
    assert max(odd_seconds.values()) < 3 * longest


# The measurements of docs/reliability.md


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.timeout(1800)
def test_an_overloaded_server_holds() -> None:
    assert main(["overload"]) == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_soaked_server_holds() -> None:
    assert main(["soak"]) == 0
