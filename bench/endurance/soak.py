"""Thousands of requests of every kind, and whether the server's process grows with them.

    python -m bench soak
    python -m bench soak --requests 30000 --out soak.json

A self-hosted server of the demo model on the CPU, with batches, serves several clients at once.
Each request is of a random kind (seeded): text to image in several sizes, steps and guidances,
batches of images, streams with previews, image to image, a LoRA, OpenAI's API, clients that leave,
deadlines that pass, bodies, keys and pictures that are refused, and the pages that an operator
reads. All but the pages and wrong keys have a caller's key. Spans go to a receiver on loopback.
Each kind has the answers that it may get; any other fails the soak.

A hundred times in a run the clients wait for their answers and leave, and the process is measured:
resident memory without the pages of files, threads, open files, and the series in its metrics. Its
malloc returns what is freed to the kernel, so that resident memory is what the process holds. The
growth of each is a slope in 1,000 requests with its 95% interval, over the second half of the run
(`bench.endurance.growth`).

Exit status: 0 all four are flat and every answer was a right one; 1 not; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from bench.endurance.growth import ALLOWED, BLOCKS, Growth, Held, growth, held
from bench.errors import BenchError
from bench.outputs import output_file, write_json
from bench.service.arrivals import PROMPT
from bench.service.processes import Server, running
from bench.terminal import table

CLIENTS = 8
SAMPLES = 100
"""How often the process is measured in a run."""
SHAPES = ("64x64", "96x64")
KEY, LIMITED_KEY = "soak-key-without-limit", "soak-key-for-one-request"
NOBODY = "127.0.0.1:1"
"""A host that pictures may be fetched from and that refuses connections."""
SETTINGS = {
    "SDXL_MODEL": "demo",
    "SDXL_DEVICE": "cpu",
    "SDXL_SHAPES": ",".join(SHAPES),
    "SDXL_MAX_BATCH": "4",
    "SDXL_MAX_WAITING": "64",
    "SDXL_LORAS": "night=demo:night",
    "SDXL_API_KEYS": f"soak={KEY},limited:1={LIMITED_KEY}",
    "SDXL_IMAGE_HOSTS": NOBODY,
    "OMP_NUM_THREADS": "1",
    # glibc's default, but set: otherwise malloc raises its thresholds as it goes, and at one sample
    # it keeps 10 MiB that are free, at the next none. Other C libraries ignore it.
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
WHITE_PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)
LEFT = "left"
"""The outcome of a client that closed its connection before the answer."""

Draw = random.Random
Send = Callable[[httpx.AsyncClient, Draw], Awaitable[str]]


def _drawn(draw: Draw, **more: Any) -> dict[str, Any]:
    """A small valid request."""
    width, height = draw.choice(SHAPES).split("x")
    return {
        "prompt": PROMPT,
        "width": int(width),
        "height": int(height),
        "num_inference_steps": draw.randint(1, 4),
        "guidance_scale": draw.choice((0.0, 5.0)),
        "seed": draw.randrange(2**31),
        **more,
    }


# Kinds of requests -------------------------------------------------------------------------------


async def _post(client: httpx.AsyncClient, path: str, body: Any, **headers: str) -> str:
    return str((await client.post(path, json=body, headers=headers)).status_code)


async def _text(client: httpx.AsyncClient, draw: Draw) -> str:
    image_format = draw.choice(("jpeg", "png", "webp"))
    return await _post(client, "/", _drawn(draw, format=image_format))


async def _images(client: httpx.AsyncClient, draw: Draw) -> str:
    return await _post(client, "/", _drawn(draw, num_images=draw.randint(2, 4)))


async def _as_image(client: httpx.AsyncClient, draw: Draw) -> str:
    return await _post(client, "/", _drawn(draw), accept="image/png")


async def _from_picture(client: httpx.AsyncClient, draw: Draw) -> str:
    body = _drawn(draw, image_url=WHITE_PIXEL, num_inference_steps=4, strength=0.5)
    return await _post(client, "/image-to-image", body)


async def _unfetched_picture(client: httpx.AsyncClient, draw: Draw) -> str:
    return await _post(client, "/image-to-image", _drawn(draw, image_url=f"https://{NOBODY}/"))


async def _lora(client: httpx.AsyncClient, draw: Draw) -> str:
    lora = {"path": "night", "scale": draw.choice((0.5, 1.0))}
    return await _post(client, "/", _drawn(draw, loras=[lora]))


async def _limited_key(client: httpx.AsyncClient, draw: Draw) -> str:
    return await _post(client, "/", _drawn(draw), authorization=f"Key {LIMITED_KEY}")


async def _wrong_key(client: httpx.AsyncClient, draw: Draw) -> str:
    wrong = draw.choice(("", "Key", f"Basic {KEY}", f"Key {draw.randbytes(16).hex()}"))
    return await _post(client, draw.choice(("/", "/stream")), _drawn(draw), authorization=wrong)


async def _stream(client: httpx.AsyncClient, draw: Draw) -> str:
    answer = await client.post("/stream", json=_drawn(draw, preview=draw.random() < 0.5))
    ended = answer.text.rstrip().rpartition("event: ")[2].partition("\n")[0]
    return "200" if answer.status_code == 200 and ended == "image" else f"stream:{ended}"


async def _leaves_a_stream(client: httpx.AsyncClient, draw: Draw) -> str:
    event = draw.choice(("queued", "step"))
    async with client.stream("POST", "/stream", json=_drawn(draw)) as answer:
        async for line in answer.aiter_lines():
            if line == f"event: {event}":
                break
    return LEFT


async def _leaves(client: httpx.AsyncClient, draw: Draw) -> str:
    try:
        async with asyncio.timeout(draw.uniform(0.001, 0.1)):
            return await _post(client, "/", _drawn(draw))
    except TimeoutError:
        return LEFT


async def _openai(client: httpx.AsyncClient, draw: Draw) -> str:
    body = {"prompt": PROMPT, "size": draw.choice(SHAPES), "n": draw.randint(1, 2)}
    return await _post(client, "/v1/images/generations", body | {"num_inference_steps": 2})


async def _openai_stream(client: httpx.AsyncClient, draw: Draw) -> str:
    body = {"prompt": PROMPT, "stream": True, "partial_images": 2, "num_inference_steps": 3}
    answer = await client.post("/v1/images/generations", json=body)
    done = "image_generation.completed" in answer.text
    return "200" if answer.status_code == 200 and done else "stream without an image"


async def _deadline(client: httpx.AsyncClient, draw: Draw) -> str:
    return await _post(client, "/", _drawn(draw, deadline_seconds=draw.choice((0.001, 0.05, 5))))


async def _wrong_field(client: httpx.AsyncClient, draw: Draw) -> str:
    wrong: dict[str, Any] = draw.choice(
        ({"width": 63}, {"prompt": ""}, {"num_images": 99}, {"nonsense": 1}, {"seed": "1"})
    )
    return await _post(client, "/", _drawn(draw) | wrong)


async def _no_json(client: httpx.AsyncClient, draw: Draw) -> str:
    content = draw.choice((b"", b"{", b"[" * 5000, b'{"a": 1, "a": 2}', b"\xff"))
    headers = {"content-type": "application/json"}
    return str((await client.post("/", content=content, headers=headers)).status_code)


async def _too_large(client: httpx.AsyncClient, draw: Draw) -> str:
    headers = {"content-type": "application/json"}
    return str((await client.post("/", content=b" " * 100_000, headers=headers)).status_code)


async def _nowhere(client: httpx.AsyncClient, draw: Draw) -> str:
    # A path of its own each time: nothing may be kept for each.
    return await _post(client, f"/{draw.randrange(10**9)}", {})


async def _page(client: httpx.AsyncClient, draw: Draw) -> str:
    path = draw.choice(("/", "/stats", "/debug/requests", "/ready", "/health", "/metrics"))
    return str((await client.get(path)).status_code)


@dataclass(frozen=True)
class Kind:
    """A kind of request, its weight in the mix, and the outcomes that it may have."""

    send: Send
    weight: int
    allowed: frozenset[str]


def _kind(send: Send, weight: int, *allowed: str) -> Kind:
    return Kind(send, weight, frozenset(allowed))


KINDS = {
    "text": _kind(_text, 20, "200"),
    "images": _kind(_images, 6, "200"),
    "image": _kind(_as_image, 5, "200"),
    "picture": _kind(_from_picture, 6, "200"),
    "unfetched picture": _kind(_unfetched_picture, 2, "422"),
    "lora": _kind(_lora, 6, "200"),
    "limited key": _kind(_limited_key, 4, "200", "429"),
    "wrong key": _kind(_wrong_key, 4, "401"),
    "stream": _kind(_stream, 12, "200"),
    "leaves a stream": _kind(_leaves_a_stream, 8, LEFT),
    "leaves": _kind(_leaves, 8, LEFT, "200"),
    "openai": _kind(_openai, 6, "200"),
    "openai stream": _kind(_openai_stream, 4, "200"),
    "deadline": _kind(_deadline, 6, "504", "200"),
    "wrong field": _kind(_wrong_field, 6, "422"),
    "no json": _kind(_no_json, 4, "422"),
    "too large": _kind(_too_large, 2, "413"),
    "nowhere": _kind(_nowhere, 2, "404", "405"),
    "page": _kind(_page, 5, "200"),
}


# Running -----------------------------------------------------------------------------------------


@dataclass
class Soak:
    """What a soak has seen."""

    requests: int
    clients: int
    settings: dict[str, str]
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    """How often, by kind and outcome."""
    samples: list[Held] = field(default_factory=list)
    seconds: float = 0.0
    in_flight: float = 0.0
    """Requests that the server still counts as in flight at the end: none should be."""
    tracebacks: int = 0
    """In the server's log."""

    @property
    def wrong(self) -> list[str]:
        """The outcomes that a kind may not have."""
        return [
            f"{count} x {outcome} of {name}"
            for name, counts in self.outcomes.items()
            for outcome, count in counts.items()
            if outcome not in KINDS[name].allowed
        ]

    def growths(self) -> list[Growth]:
        return [growth(self.samples, quantity) for quantity in ALLOWED]

    @property
    def holds(self) -> bool:
        flat = all(each.verdict == "flat" for each in self.growths())
        return flat and not (self.wrong or self.in_flight or self.tracebacks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=9000, help="how many (default: 9000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kinds (default: 0)")
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if options.requests < 2 * BLOCKS:
        raise BenchError(f"--requests: {2 * BLOCKS} and more are allowed")
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import where

    described = where("cpu")  # now: the checkout may be another at the end
    with (
        only_bench_on("cpu"),
        running("the OTLP receiver", ["bench.service.otlp_receiver"]) as receiver,
        running(
            "the server",
            ["serve", "--port", "0"],
            SETTINGS | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.address},
        ) as server,
    ):
        soak = asyncio.run(measure(server, options.requests, options.seed))
    print(report(soak))
    if options.out:
        judged = [asdict(each) | {"verdict": each.verdict} for each in soak.growths()]
        write_json(options.out, described | asdict(soak) | {"judged": judged})
    return 0 if soak.holds else 1


async def measure(server: Server, requests: int, seed: int) -> Soak:
    """Send the requests, and measure the process between them, at rest."""
    soak = Soak(requests, CLIENTS, SETTINGS)
    every = max(1, requests // SAMPLES)
    draw = random.Random(seed)
    names = draw.choices(list(KINDS), [kind.weight for kind in KINDS.values()], k=requests)
    numbered = list(enumerate(names))
    started = time.monotonic()
    for first in range(0, requests, every):
        async with _client(server) as client:
            if first == 0:
                await _fill_pools(client)
            waiting = iter(numbered[first : first + every])
            await asyncio.gather(
                *(_one_client(client, soak, waiting, seed) for _ in range(CLIENTS))
            )
            # At rest, because what runs holds now one image and now eight.
            soak.in_flight = await _in_flight(client)
            metrics = await client.get("/metrics")
        await _without_connections(server)
        soak.samples.append(held(server.process.pid, first + every, metrics.text))
        if first % (20 * every) == 0:
            print(f"{first} of {requests} requests", file=sys.stderr, flush=True)
    soak.seconds = time.monotonic() - started
    soak.tracebacks = server.output.read_text(errors="replace").count("Traceback")
    return soak


def _client(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=server.address,
        headers={"authorization": f"Key {KEY}"},
        timeout=120,
        trust_env=False,
        limits=httpx.Limits(max_keepalive_connections=CLIENTS),
    )


async def _one_client(
    client: httpx.AsyncClient, soak: Soak, waiting: Iterator[tuple[int, str]], seed: int
) -> None:
    for number, name in waiting:
        outcome = await _outcome(KINDS[name], client, random.Random(f"{seed} {number}"))
        counts = soak.outcomes.setdefault(name, {})
        counts[outcome] = counts.get(outcome, 0) + 1


async def _without_connections(server: Server) -> None:
    """Wait until the server has no client's connection, or five seconds have passed: those that are
    open are among its open files, now more and now fewer."""
    import psutil

    process = psutil.Process(server.process.pid)
    port = urlsplit(server.address).port
    for _ in range(50):
        connections = process.net_connections("tcp")
        if not any(each.laddr.port == port and each.raddr for each in connections):
            break
        await asyncio.sleep(0.1)


async def _fill_pools(client: httpx.AsyncClient) -> None:
    """Make the process start all of its worker threads, which it otherwise does now and then in
    thousands of requests. Each has an arena of memory of its own."""
    for shape in SHAPES * 2:
        width, height = map(int, shape.split("x"))
        body = _drawn(random.Random(0), num_images=4, width=width, height=height, format="png")
        answers = [client.post("/", json=body) for _ in range(2 * CLIENTS)]
        for answer in await asyncio.gather(*answers):
            answer.raise_for_status()


async def _outcome(kind: Kind, client: httpx.AsyncClient, draw: Draw) -> str:
    try:
        return await kind.send(client, draw)
    except httpx.TransportError as error:
        return type(error).__name__


async def _in_flight(client: httpx.AsyncClient) -> float:
    """What the server says of requests in flight, once that is 0 or ten seconds have passed."""
    value = 0.0
    for _ in range(100):
        text = (await client.get("/metrics")).text
        found = re.search(r"^sdxl_requests_in_flight (\S+)$", text, re.MULTILINE)
        value = float(found[1]) if found else 0.0
        if not value:
            break
        await asyncio.sleep(0.1)
    return value


# Reporting ---------------------------------------------------------------------------------------


def report(soak: Soak) -> str:
    kinds = [
        (name, str(sum(counts.values())), ", ".join(f"{n} x {o}" for o, n in counts.items()))
        for name, counts in sorted(soak.outcomes.items())
    ]
    grown = [
        (
            each.quantity,
            f"{each.first:.4g}",
            f"{each.last:.4g}",
            f"{each.slope.point:+.2f} ({each.slope.low:+.2f} to {each.slope.high:+.2f})",
            f"{ALLOWED[each.quantity]:g}",
            each.verdict,
        )
        for each in soak.growths()
    ]
    rate = soak.requests / soak.seconds if soak.seconds else 0
    lines: Sequence[str] = [
        f"{soak.requests} requests of {soak.clients} clients in {soak.seconds:.0f} s, {rate:.1f}/s",
        "",
        table(("kind", "requests", "outcomes"), kinds),
        "",
        table(("held", "first", "last", "growth in 1,000 requests", "allowed", "verdict"), grown),
        "",
        f"answers that were not expected: {', '.join(soak.wrong) or 'none'}",
        f"left in flight: {soak.in_flight:g}; tracebacks in the log: {soak.tracebacks}",
        "it holds" if soak.holds else "it does not hold",
    ]
    return "\n".join(lines)
