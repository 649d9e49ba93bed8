"""How long a request will take, and which requests are refused because of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from kernels_warmup.shapes import CompiledShape
from metrics.records import RunTiming, StageTiming, StepTiming
from metrics.sampling import TraceIdentity
from serve.engine.call import Call
from serve.engine.gpu_run import GeneratedPixels
from serve.engine.planning import PlannedRequest
from serve.engine.waiting.admission import Admission
from serve.engine.waiting.estimates import (
    EVIDENCE_RUNS,
    EVIDENCE_SECONDS,
    NEWEST,
    Estimates,
    RunEstimate,
)
from serve.engine.waiting.request_queue import Batch, QueuedRuns, RequestQueue
from serve.errors import DeadlineExceeded, QueueFull
from tests.serve.conftest import request

MS = 1_000_000
SHAPE = CompiledShape(128, 128)


def run_of(
    images: int = 1, step_ms: float = 30, steps: int = 10, at_ns: int = 0, **changes: Any
) -> RunTiming:
    """A run with 20 ms before its steps and 50 ms after them."""
    begin = at_ns + 20 * MS
    each = round(step_ms * MS)
    timings = tuple(
        StepTiming(i, begin + i * each, begin + (i + 1) * each, 0) for i in range(steps)
    )
    end = begin + steps * each
    stages = (StageTiming("denoise", begin, end), StageTiming("vae_decode", end, end + 50 * MS))
    last = end + 50 * MS
    run = RunTiming("r", "host", str(SHAPE), True, images, at_ns, last, stages, timings)
    return dataclasses.replace(run, **changes)


def planned(steps: int = 10, images: int = 1, **changes: Any) -> PlannedRequest:
    scale = changes.pop("guidance_scale", 5.0)
    return PlannedRequest(request(num_images=images, **changes), SHAPE, steps, scale, seed=1)


def new_call() -> Call:
    return Call("/", "POST", TraceIdentity(1, 1, exported=False))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Server:
    """A queue with its estimates, and no GPU thread."""

    def __init__(self, sizes: tuple[int, ...] = (1,), max_waiting: int = 32) -> None:
        self.clock = Clock()
        self.sizes = sizes
        self.queue = RequestQueue(max_waiting, 0.0, lambda _: None, monotonic=self.clock)
        self.estimates = Estimates(monotonic=self.clock)
        self.admission = Admission(self.queue, self.estimates, lambda _: sizes)

    def learn(self, *runs: RunTiming) -> None:
        for run in runs:
            self.estimates.observe_run(run, serving=True)

    def queued(self, steps: int = 10, images: int = 1) -> Call:
        call = new_call()
        self.queue.join(planned(steps, images), call, None, self.sizes)
        return call

    def begun(self) -> Batch:
        batch = self.queue.take(lambda _: self.sizes)
        assert batch is not None
        return batch

    def seconds(self, steps: int = 10, images: int = 1) -> float | None:
        runs = QueuedRuns(planned(steps, images), new_call(), (images,))
        return self.estimates.seconds_until_done(runs, self.queue.state(), lambda _: self.sizes)


def test_a_run_is_estimated_by_its_steps() -> None:
    server = Server()
    assert server.seconds() is None
    server.learn(run_of())
    assert server.seconds(steps=10) == pytest.approx(0.02 + 10 * 0.03 + 0.05)
    assert server.seconds(steps=40) == pytest.approx(0.02 + 40 * 0.03 + 0.05)


def test_an_estimate_is_for_one_size_with_or_without_guidance() -> None:
    server = Server()
    server.learn(run_of())
    others = [
        planned(guidance_scale=1.0),
        dataclasses.replace(planned(), shape=CompiledShape(160, 96)),
    ]
    for other in others:
        assert server.estimates.run_estimate(other, 1) is None


def mixed_run_of(guided: int, steps: int, guided_ms: float, unguided_ms: float) -> RunTiming:
    """A run whose guidance ends early, with 20 ms before its steps and 50 ms after them."""
    at, timings = 20 * MS, []
    for index in range(steps):
        end = at + round(MS * (guided_ms if index < guided else unguided_ms))
        timings.append(StepTiming(index, at, end, 0))
        at = end
    stages = (StageTiming("denoise", 20 * MS, at), StageTiming("vae_decode", at, at + 50 * MS))
    return dataclasses.replace(
        run_of(), guided_steps=guided, steps=tuple(timings), stages=stages, end_ns=at + 50 * MS
    )


def test_a_run_whose_guidance_ends_is_estimated_by_steps_of_both_kinds() -> None:
    server = Server()
    mixed = planned(guidance_end=0.6)

    def seconds() -> float | None:
        runs = QueuedRuns(mixed, new_call(), (1,))
        return server.estimates.seconds_until_done(runs, server.queue.state(), lambda _: (1,))

    server.learn(run_of(step_ms=40))
    assert seconds() == pytest.approx(0.07 + 6 * 0.04 + 4 * 0.02)  # half, until one is measured
    server.learn(run_of(step_ms=25, guidance=False))
    assert seconds() == pytest.approx(0.07 + 6 * 0.04 + 4 * 0.025)
    server.queue.join(mixed, new_call(), None, (1,))
    batch = server.begun()
    left = [server.estimates.seconds_left(batch)]
    for _ in range(10):
        server.queue.step_ended(batch)
        left.append(server.estimates.seconds_left(batch))
    steps = [0.04] * 6 + [0.025] * 4
    assert left == pytest.approx(
        [0.07 + sum(steps), *(0.05 + sum(steps[done:]) for done in range(1, 11))]
    )


def test_a_run_whose_guidance_ends_teaches_the_steps_of_both_kinds() -> None:
    server = Server()
    server.learn(mixed_run_of(guided=3, steps=5, guided_ms=40, unguided_ms=15))

    def estimate(scale: float, **fields: Any) -> RunEstimate | None:
        return server.estimates.run_estimate(planned(guidance_scale=scale, **fields), 1)

    mixed, guided = estimate(5.0, guidance_end=0.5), estimate(5.0)
    assert mixed is not None
    assert guided is not None
    assert mixed.seconds == pytest.approx(0.07 + 5 * 0.04 + 5 * 0.015)
    assert guided.seconds == pytest.approx(0.07 + 10 * 0.04)
    # Of a run without guidance it does not say how long the text takes.
    assert estimate(1.0) is None
    server.learn(run_of(step_ms=25, guidance=False))
    unguided = estimate(1.0)
    assert unguided is not None
    assert unguided.seconds == pytest.approx(0.07 + 10 * 0.02)  # the median of 15 and 25


def test_slow_runs_do_not_move_the_estimate_until_they_are_usual() -> None:
    server = Server()
    server.learn(*(run_of() for _ in range(NEWEST)))
    usual = server.seconds()
    server.learn(run_of(step_ms=900), run_of(step_ms=900))
    assert server.seconds() == usual
    server.learn(*(run_of(step_ms=60) for _ in range(NEWEST)))
    assert server.seconds() == pytest.approx(0.02 + 10 * 0.06 + 0.05)


@pytest.mark.parametrize("change", [{"profile": "a.json"}, {"eager_fallback": True}, {"steps": ()}])
def test_a_run_that_is_not_as_usual_is_not_learnt_from(change: dict[str, Any]) -> None:
    server = Server()
    server.learn(dataclasses.replace(run_of(), **change))
    assert server.seconds() is None


def test_only_the_last_run_of_the_warm_up_counts() -> None:
    server = Server()
    for step_ms in (90_000, 30):  # the first compiles
        server.estimates.observe_run(run_of(step_ms=step_ms), serving=False)
    assert server.seconds() == pytest.approx(0.37)


def test_a_number_of_images_that_was_not_measured() -> None:
    estimates = Server().estimates
    for images, step_ms in ((2, 40), (4, 60)):
        for _ in range(EVIDENCE_RUNS):
            estimates.observe_run(run_of(images, step_ms), serving=True)

    def step_ms(images: int, fastest: bool = False) -> float:
        run = estimates.run_estimate(planned(), images, fastest)
        assert run is not None
        return 1e3 * run.guided_step

    assert [step_ms(images) for images in (1, 2, 3, 4, 8)] == pytest.approx([40, 40, 50, 60, 120])
    assert [step_ms(images, True) for images in (1, 8)] == pytest.approx([20, 60])


def test_a_request_waits_for_the_runs_before_it() -> None:
    server = Server()
    server.learn(run_of())
    one = 0.37
    server.queued()
    server.queued()
    assert server.seconds() == pytest.approx(3 * one)
    batch = server.begun()
    assert server.seconds() == pytest.approx(3 * one)
    server.clock.now += 0.02
    assert server.seconds() == pytest.approx(3 * one - 0.02)
    for _ in range(4):
        server.clock.now += 0.03
        server.queue.step_ended(batch)
    assert server.seconds() == pytest.approx(3 * one - 0.14)
    server.clock.now += 9  # a step hangs: at least the steps after it are left
    assert server.seconds() == pytest.approx(2 * one + 5 * 0.03 + 0.05)
    server.queue.end(batch, [[GeneratedPixels("", False, 3)]])
    assert server.seconds() == pytest.approx(2 * one)


def test_requests_that_will_share_a_run_wait_for_one() -> None:
    server = Server(sizes=tuple(range(1, 9)))
    server.learn(run_of(1, 30), run_of(4, 60))
    for _ in range(4):
        server.queued()
    assert server.seconds() == pytest.approx(1.25 * 0.67)
    assert server.seconds(steps=20) == pytest.approx(0.67 + (0.02 + 20 * 0.03 + 0.05))


def test_others_are_expected_to_join_as_they_did_before() -> None:
    """Eight clients whose runs have one and seven images in turn."""
    server = Server(sizes=tuple(range(1, 9)))
    at = 0
    for number in range(10):
        images = 7 if number % 2 else 1
        run = run_of(images, 60 if images == 7 else 30, at_ns=at)
        server.learn(run)
        at = run.end_ns + MS
    one, seven = 0.37, 0.67
    server.clock.now += 1
    assert server.seconds() == pytest.approx(one)  # it begins at once, alone
    server.queued()
    batch = server.begun()
    assert server.seconds() == pytest.approx(one + seven)
    server.queue.end(batch, [[GeneratedPixels("", False, 3)]])
    for _ in range(7):
        server.queued()
    server.begun()
    assert server.seconds() == pytest.approx(seven + one)


def test_runs_with_a_pause_between_them_say_nothing_of_each_other() -> None:
    server = Server(sizes=tuple(range(1, 9)))
    for number, images in enumerate((1, 7) * 3):
        server.learn(run_of(images, at_ns=number * 10**10))
    assert server.estimates.images_after(planned(), 1) == 1


def test_an_answer_takes_as_long_as_the_last_ones() -> None:
    server = Server()
    server.learn(run_of())
    for seconds in (0.1, 0.2, 9.0):
        server.estimates.observe_answer(planned(), seconds)
    assert server.seconds() == pytest.approx(0.37 + 0.2)


def test_the_time_that_is_left_to_a_request() -> None:
    server = Server()
    server.learn(run_of())
    calls = [server.queued() for _ in range(3)]
    server.begun()
    left = [server.admission.eta_ms(planned(), call) for call in calls]
    assert left == pytest.approx([370, 740, 1110])


def test_a_full_queue_says_when_a_place_is_free_and_when_the_image_would_be_done() -> None:
    server = Server(max_waiting=1)
    server.learn(run_of(step_ms=300))
    server.queued()
    server.begun()
    server.queued()
    with pytest.raises(QueueFull) as caught:
        server.admission.admit(planned(), new_call(), 60)
    assert caught.value.headers["Retry-After"] == str(math.ceil(3.07))
    assert caught.value.eta_ms == pytest.approx(3 * 3070)


def admitted(server: Server, deadline_seconds: float, **fields: Any) -> bool:
    try:
        server.admission.admit(planned(**fields), new_call(), deadline_seconds)
    except DeadlineExceeded as refused:
        return refused.eta_ms is None  # a refusal says how long it would take
    return True


def test_a_request_that_cannot_meet_its_deadline_is_refused() -> None:
    server = Server()
    server.learn(*(run_of() for _ in range(EVIDENCE_RUNS)))
    server.queued()
    server.begun()
    assert not admitted(server, 0.6)  # of 0.74 s
    assert admitted(server, 0.75)
    call = new_call()
    server.admission.admit(planned(), call, 60)
    assert call.estimate is not None
    assert call.estimate.seconds == pytest.approx(0.74)


def test_without_evidence_none_is_refused() -> None:
    server = Server()
    for _ in range(10):
        server.estimates.observe_run(run_of(), serving=False)
    server.learn(*(run_of() for _ in range(EVIDENCE_RUNS - 1)))
    assert admitted(server, 0.01)
    server.learn(run_of())
    assert not admitted(server, 0.01)
    server.clock.now += EVIDENCE_SECONDS + 1
    assert admitted(server, 0.01)


def test_storage_that_was_slow_refuses_nothing() -> None:
    """The deadline ends when the images are drawn."""
    server = Server()
    server.learn(*(run_of() for _ in range(EVIDENCE_RUNS)))
    for _ in range(NEWEST):
        server.estimates.observe_answer(planned(), 9.0)
    assert admitted(server, 0.38)
    assert server.seconds() == pytest.approx(0.37 + 9)


def test_an_old_spell_of_slow_runs_refuses_nothing_while_others_run() -> None:
    server = Server(sizes=(1, 2, 3, 4))
    server.learn(*(run_of(4, step_ms=900) for _ in range(NEWEST)))
    assert not admitted(server, 2, images=4)
    assert not admitted(server, 0.1)  # by a quarter of their time
    server.clock.now += EVIDENCE_SECONDS + 1
    server.learn(*(run_of() for _ in range(EVIDENCE_RUNS)))
    assert admitted(server, 2, images=4)
    assert not admitted(server, 0.1, images=4)  # it takes no less than one image
    server.learn(*(run_of(4, step_ms=900) for _ in range(EVIDENCE_RUNS)))
    assert not admitted(server, 2, images=4)


def test_steps_of_other_runs_are_no_evidence_of_whole_runs() -> None:
    server = Server()
    slow_text = run_of(guidance=False, start_ns=-9_000 * MS)
    server.learn(*(slow_text for _ in range(NEWEST)))
    assert not admitted(server, 2, guidance_scale=1.0)
    server.clock.now += EVIDENCE_SECONDS + 1
    mixed = mixed_run_of(guided=3, steps=5, guided_ms=40, unguided_ms=15)
    server.learn(*(mixed for _ in range(EVIDENCE_RUNS)))
    assert admitted(server, 2, guidance_scale=1.0)
    assert not admitted(server, 0.1)


def test_a_run_before_it_without_evidence_counts_as_no_time() -> None:
    server = Server()
    server.learn(*(run_of() for _ in range(EVIDENCE_RUNS)))
    other = dataclasses.replace(planned(), shape=CompiledShape(160, 96))
    slow = run_of(step_ms=900, shape="160x96")
    server.estimates.observe_run(slow, serving=False)
    server.queue.join(other, new_call(), None, (1,))
    assert admitted(server, 0.35)  # of 0.37 s and what is not known
    assert not admitted(server, 0.3)
    server.begun()
    assert not admitted(server, 0.3)
    assert admitted(server, 2)
    server.learn(*(slow for _ in range(EVIDENCE_RUNS)))
    assert not admitted(server, 2)


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        ("lora_swap", dataclasses.replace(planned(), loras=(("ink", 1.0),))),
        ("vae_encode", dataclasses.replace(planned(), strength=1.0)),
    ],
)
def test_a_stage_that_was_slow_long_ago_refuses_nothing(stage: str, wanted: PlannedRequest) -> None:
    server = Server()
    run = run_of(at_ns=9_000 * MS)
    slow = dataclasses.replace(
        run, start_ns=0, stages=(StageTiming(stage, 0, 9_000 * MS), *run.stages)
    )
    server.learn(*(slow for _ in range(NEWEST)))

    def is_admitted() -> bool:
        try:
            server.admission.admit(wanted, new_call(), 2)
        except DeadlineExceeded:
            return False
        return True

    assert not is_admitted()
    server.clock.now += EVIDENCE_SECONDS + 1
    server.learn(*(run_of() for _ in range(EVIDENCE_RUNS)))
    assert is_admitted()


def test_slow_runs_among_fast_ones_refuse_nothing() -> None:
    server = Server()
    server.learn(*(run_of(step_ms=900) for _ in range(NEWEST - 1)), run_of())
    assert admitted(server, 0.5)
    server.queued()
    server.begun()
    assert admitted(server, 0.75)


def test_an_idle_server_refuses_only_what_takes_twice_as_long() -> None:
    server = Server()
    server.learn(*(run_of() for _ in range(EVIDENCE_RUNS)))
    assert admitted(server, 0.2)
    assert not admitted(server, 0.18)
