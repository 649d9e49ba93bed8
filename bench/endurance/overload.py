"""Half to four times the load that a server can serve: what is answered, and how late.

    python -m bench overload
    python -m bench overload --batch 1 8 --seconds 30 --out overload.json

For each largest batch a self-hosted server of the demo model is started on the CPU. It behaves as
on a device whose steps always take 50 ms, with batches 150 ms (`paced_server`), and it takes 0.3 s
to upload an image, which is stored nowhere. Runs of each number of images come first, because each
fills buffers of its own. The capacity is measured with enough clients that the queue is never
empty. Then requests arrive at random (open loop, Poisson, seeded) at 4, 0.5, 0.9, 1.5 and again 4
times that capacity. One request in four has a deadline of half the time that a full queue takes.

What is checked:
- Answers: each is 200, 429 with Retry-After, or 504.
- Latency: the 99th percentile of requests with an image is at most the time of a full queue. That
  is the run in progress, of the largest batch, and all that wait, the request itself among them.
  Its time is the longest GPU time that so many images in a row took in that phase, divided by 97%.
  The 99th percentile of encoding and upload comes on top.
- Goodput: at 4 times the capacity it is at least 95% of the highest of any phase. Goodput is the
  images of whole runs over the time that these runs took, gaps between them included. The runs are
  those that end after the phase's first 2 s, up to the first that ends after its last arrival.
- Busy: at 4 times the capacity the GPU thread is busy for at least 97% of the time, because image
  encoding and upload overlap the next run. Busy time is the sum of the runs' stages, as the
  answers' `timings` have them; answers of one run have the same. It is compared with the time from
  the end of the first run to the end of the last. So time lost between runs counts, and a stage
  that encoding slows down does not.
- Memory and threads: after each phase memory is at most 2% above that after the first, and there is
  no thread more. (`bench soak` measures growth over thousands of requests.)
- Pace: the mean step of each phase is within 2% of that of every other. Otherwise the machine was
  too slow for the device's pace, and nothing said above of goodput can be trusted.

Exit status: 0 all of it holds; 1 not; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import numpy as np

from bench.endurance.growth import held
from bench.errors import BenchError
from bench.outputs import output_file, write_json
from bench.service.arrivals import Arrival, Mix, arrivals
from bench.service.processes import Server, running
from bench.terminal import table

MULTIPLES = (4.0, 0.5, 0.9, 1.5, 4.0)
"""Of the capacity. Memory and threads are compared with those after the first phase."""
SHAPE = "64x64"
STEP_MS = {False: 50.0, True: 150.0}
"""How long the device takes for a step, without and with batches. The model itself took 16 and
53 ms (medians) where both cores of the machine had other work."""
WAITING = 16
"""How many requests may wait."""
UPLOAD_SECONDS = 0.3
RAMP_SECONDS = 2.0
"""The start of a phase, in which the queue fills. Rates are those of the rest."""
SHORT_DEADLINES = 4
"""One request in so many has a deadline that a full queue cannot meet."""

ALLOWED = frozenset({"200", "429", "504"})
LEAST_GOODPUT = 0.95
LEAST_BUSY = 0.97
MOST_MEMORY = 1.02
MOST_PACE = 1.02


@dataclass(frozen=True)
class Answered:
    """One request; times in seconds from the start of its phase."""

    sent: float
    ended: float
    outcome: str
    """The status, or why there is none. A 429 without Retry-After is not `429`."""
    run_ms: tuple[float, ...] = ()
    """Text encoding, denoising and decoding of its run: the same for all requests of a run."""
    step_ms: float = 0.0
    """The mean step of its run."""
    answer_ms: float = 0.0
    """Image encoding and upload."""


@dataclass(frozen=True)
class Phase:
    """What one rate gave."""

    multiple: float
    rate: float
    outcomes: dict[str, int]
    goodput: float
    """Images a second."""
    p99_seconds: float
    bound_seconds: float
    """The time of a full queue, encoding and upload."""
    busy: float | None
    """The GPU thread's busy share while requests wait; None where the queue may be empty."""
    step_ms: float
    """The mean step of its runs."""
    memory_mib: float
    threads: int
    """Both after the phase."""
    most_threads: int


@dataclass(frozen=True)
class Overload:
    """All phases of one server."""

    batch: int
    capacity: float
    phases: tuple[Phase, ...]

    def problems(self) -> list[str]:
        """What does not hold; empty: all does."""
        found = []
        peak = max(phase.goodput for phase in self.phases)
        for phase in self.phases:
            name = f"at {phase.multiple:g} times the capacity"
            if wrong := set(phase.outcomes) - ALLOWED:
                found.append(f"{name} some were answered {', '.join(sorted(wrong))}")
            if phase.p99_seconds > phase.bound_seconds:
                found.append(
                    f"{name} p99 was {phase.p99_seconds:.2f} s, a full queue takes "
                    f"{phase.bound_seconds:.2f} s"
                )
            if phase.busy is not None and phase.busy < LEAST_BUSY:
                found.append(f"{name} the GPU thread was busy {100 * phase.busy:.1f}% of the time")
            if phase.multiple == max(MULTIPLES) and phase.goodput < LEAST_GOODPUT * peak:
                found.append(f"{name} goodput was {100 * phase.goodput / peak:.0f}% of the highest")
        steps = [phase.step_ms for phase in self.phases]
        if max(steps) > MOST_PACE * min(steps):
            found.append(
                f"a mean step took {min(steps):.1f} to {max(steps):.1f} ms: no steady pace"
            )
        first, *later = self.phases
        memory_mib = max(phase.memory_mib for phase in later)
        threads = max(phase.threads for phase in later)
        if memory_mib > MOST_MEMORY * first.memory_mib:
            found.append(f"memory grew from {first.memory_mib:.0f} to {memory_mib:.0f} MiB")
        if threads > first.threads:
            found.append(f"threads grew from {first.threads} to {threads}")
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 8], help="SDXL_MAX_BATCH (default: 1 8)")
    add("--seconds", type=float, default=30.0, help="of each phase (default: 30)")
    add("--steps", type=int, default=12, help="denoising steps (default: 12)")
    add("--seed", type=int, default=0, help="seed of the arrivals (default: 0)")
    add("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if options.seconds < 3 * RAMP_SECONDS or options.steps < 1 or min(options.batch) < 1:
        raise BenchError(
            f"--seconds must be at least {3 * RAMP_SECONDS:g}, --steps and --batch at least 1"
        )
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import where

    described = where("cpu")  # now: the checkout may be another at the end
    results = []
    with only_bench_on("cpu"):
        for batch in options.batch:
            settings = {
                "SDXL_MODEL": "demo",
                "SDXL_DEVICE": "cpu",
                "SDXL_SHAPES": SHAPE,
                "SDXL_MAX_BATCH": str(batch),
                "SDXL_MAX_IMAGES": str(batch),
                "SDXL_MAX_WAITING": str(WAITING),
                "OMP_NUM_THREADS": "1",
            }
            module = ["bench.service.paced_server", str(STEP_MS[batch > 1]), str(UPLOAD_SECONDS)]
            with running("the server", module, settings) as server:
                results.append(asyncio.run(_measure(server, batch, options)))
            print(report(results[-1]), flush=True)
    if options.out:
        write_json(options.out, described | {"servers": [asdict(each) for each in results]})
    return 1 if any(result.problems() for result in results) else 0


# Measuring ---------------------------------------------------------------------------------------


async def _measure(server: Server, batch: int, options: argparse.Namespace) -> Overload:
    mix = Mix((), ((options.steps, 1.0),))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=server.address, timeout=120, limits=limits, trust_env=False
    ) as client:
        await _fill_buffers(client, mix, batch)
        capacity = await _capacity(client, mix, batch, options.seconds / 2)
        full_queue = (WAITING + batch) / capacity
        phases = []
        for number, multiple in enumerate(MULTIPLES):
            rate = multiple * capacity
            most = round(2 * rate * options.seconds) + 20
            planned = arrivals(mix, rate, options.seconds, most, options.seed + number)
            for arrival in planned[::SHORT_DEADLINES]:
                arrival.body["deadline_seconds"] = full_queue / 2
            watch = asyncio.create_task(_most_threads(server.process.pid))
            answered = await _send(client, planned)
            watch.cancel()
            phases.append(
                _phase(multiple, rate, options.seconds, batch, answered, server, await watch)
            )
            print(f"{multiple:g} times {capacity:.2f} a second: done", file=sys.stderr, flush=True)
        return Overload(batch, capacity, tuple(phases))


async def _fill_buffers(client: httpx.AsyncClient, mix: Mix, batch: int) -> None:
    """Draw a run of each number of images, twice: each fills buffers of its own."""
    ((body, _),) = mix.bodies()
    for images in [*range(1, batch + 1)] * 2:
        answered = await _one(client, body | {"num_images": images, "num_inference_steps": 2}, 0.0)
        if answered.outcome != "200":
            raise BenchError(f"a request for {images} images was answered {answered.outcome}")


async def _capacity(client: httpx.AsyncClient, mix: Mix, batch: int, seconds: float) -> float:
    """Images a second while more requests wait than a run can have."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    answers: list[Answered] = []
    ((body, _),) = mix.bodies()

    async def one_client(seed: int) -> None:
        while loop.time() < start + seconds:
            answered = await _one(client, body | {"seed": seed}, start)
            if answered.outcome != "200":
                raise BenchError(f"a request within the capacity was answered {answered.outcome}")
            answers.append(answered)

    await asyncio.gather(*(one_client(number) for number in range(min(2 * batch + 2, WAITING))))
    return goodput(answers, seconds)


async def _send(client: httpx.AsyncClient, planned: Sequence[Arrival]) -> list[Answered]:
    """Send every request at its time, whether or not earlier ones have been answered."""
    loop = asyncio.get_running_loop()
    start = loop.time() + 0.05

    async def one(arrival: Arrival) -> Answered:
        await asyncio.sleep(start + arrival.at - loop.time())
        return await _one(client, arrival.body, start)

    return list(await asyncio.gather(*(one(arrival) for arrival in planned)))


async def _one(client: httpx.AsyncClient, body: dict[str, Any], start: float) -> Answered:
    loop = asyncio.get_running_loop()
    sent = loop.time() - start
    try:
        answer = await client.post("/", json=body)
    except httpx.TransportError as error:
        return Answered(sent, loop.time() - start, type(error).__name__)
    ended = loop.time() - start
    outcome = str(answer.status_code)
    if outcome == "429" and "retry-after" not in answer.headers:
        outcome = "429 without Retry-After"
    if outcome != "200":
        return Answered(sent, ended, outcome)
    timings = answer.json()["timings"]
    stages = tuple(timings[f"{name}_ms"] for name in ("text_encode", "denoise", "vae_decode"))
    answer_ms = timings["image_encode_ms"] + timings["upload_ms"]
    step_ms = float(np.mean(timings["steps_ms"]))
    return Answered(sent, ended, outcome, stages, step_ms, answer_ms)


async def _most_threads(pid: int) -> int:
    """The most threads that the process has, until this is cancelled."""
    most = 0
    with suppress(asyncio.CancelledError):
        while True:
            most = max(most, held(pid, 0, "").threads)
            await asyncio.sleep(0.25)
    return most


def _phase(
    multiple: float,
    rate: float,
    seconds: float,
    batch: int,
    answered: Sequence[Answered],
    server: Server,
    most_threads: int,
) -> Phase:
    ok = [each for each in answered if each.outcome == "200"]
    if not ok:
        raise BenchError(f"no request was answered with an image at {rate:.2f} a second")
    answer_seconds = float(np.percentile([each.answer_ms for each in ok], 99)) / 1000
    now = held(server.process.pid, 0, "")
    return Phase(
        multiple,
        rate,
        dict(Counter(each.outcome for each in answered)),
        goodput(ok, seconds),
        float(np.percentile([each.ended - each.sent for each in ok], 99)),
        full_queue_seconds(ok, batch) + answer_seconds,
        busy_share(ok, seconds) if multiple == max(MULTIPLES) else None,
        float(np.mean([each.step_ms for each in ok])),
        now.memory_mib,
        now.threads,
        most_threads,
    )


def full_queue_seconds(answered: Sequence[Answered], batch: int) -> float:
    """How long the last request of a full queue may wait for its images to be drawn.

    It is the longest time that runs in a row with as many images took, divided by the share of the
    time that the GPU thread must be busy.

    Args:
        answered: those with images.
        batch: images of the largest run. One has just begun when the request arrives. The request
            itself is one of those that wait.
    """
    images = Counter(each.run_ms for each in answered)
    runs = list(_ends_of_runs(answered))
    full = batch + WAITING
    # Of a phase with fewer images than a full queue has: at its mean.
    longest = full * sum(map(sum, runs)) / len(answered) if len(answered) < full else 0.0
    for first in range(len(runs)):
        missing, row = full, 0.0
        for run in runs[first:]:
            missing, row = missing - images[run], row + sum(run)
            if missing <= 0:
                longest = max(longest, row)
                break
    return longest / 1000 / LEAST_BUSY


def _ends_of_runs(answered: Iterable[Answered]) -> dict[tuple[float, ...], float]:
    """Each run's stages and when its first answer came, in that order."""
    ends: dict[tuple[float, ...], float] = {}
    for each in answered:
        ends[each.run_ms] = min(each.ended, ends.get(each.run_ms, each.ended))
    return dict(sorted(ends.items(), key=lambda run: run[1]))


def _measured_runs(answered: Iterable[Answered], seconds: float) -> dict[tuple[float, ...], float]:
    """The runs that ended after the ramp, to the first that ended after the last arrival: a gap in
    which nothing ends is between two of them."""
    runs = {run: end for run, end in _ends_of_runs(answered).items() if end >= RAMP_SECONDS}
    within = sum(end <= seconds for end in runs.values())
    if within < 2:
        raise BenchError("too few runs: a longer phase is needed (--seconds)")
    return dict(list(runs.items())[: within + 1])


def goodput(answered: Sequence[Answered], seconds: float) -> float:
    """Images a second, gaps between runs included. The first run is where the time begins."""
    ends = _measured_runs(answered, seconds)
    first, *later = ends
    images = Counter(each.run_ms for each in answered)
    return sum(images[run] for run in later) / (ends[later[-1]] - ends[first])


def busy_share(answered: Sequence[Answered], seconds: float) -> float:
    """The sum of the runs' stages over the time they took, while the queue was not empty."""
    ends = _measured_runs(answered, seconds)
    first, *later = ends
    return sum(map(sum, later)) / 1000 / (ends[later[-1]] - ends[first])


# Reporting ---------------------------------------------------------------------------------------


def report(result: Overload) -> str:
    header = ("load", "rate/s", "goodput/s", "p99 s", "full queue s", "GPU busy", "step ms", "MiB",
              "threads", "most", "answers")  # fmt: skip
    rows = [
        (
            f"{phase.multiple:g}x",
            f"{phase.rate:.2f}",
            f"{phase.goodput:.2f}",
            f"{phase.p99_seconds:.2f}",
            f"{phase.bound_seconds:.2f}",
            "" if phase.busy is None else f"{100 * phase.busy:.1f}%",
            f"{phase.step_ms:.1f}",
            f"{phase.memory_mib:.0f}",
            str(phase.threads),
            str(phase.most_threads),
            ", ".join(f"{count} x {name}" for name, count in sorted(phase.outcomes.items())),
        )
        for phase in result.phases
    ]
    problems = result.problems()
    return "\n".join(
        [
            f"batches of up to {result.batch}: capacity {result.capacity:.2f} images a second",
            "",
            table(header, rows),
            "",
            *(problems or ["it holds"]),
            "",
        ]
    )
