"""Grouping waiting requests by their LoRAs: in which order runs come, and that nobody starves."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from metrics.records import LoraSet, StageTiming
from metrics.sampling import TraceIdentity
from serve.engine.call import Call
from serve.engine.gpu_run import GeneratedPixels
from serve.engine.planning import PlannedRequest
from serve.engine.waiting.estimates import Estimates
from serve.engine.waiting.request_queue import QueuedRuns, RequestQueue
from serve.engine.waiting.run_order import MOST_PASSED_OVER, coming_batches
from tests.serve.conftest import request
from tests.serve.engine.test_estimates import MS, SHAPE, Clock, run_of

INK: LoraSet = (("ink", 1.0),)
CHALK: LoraSet = (("chalk", 0.5),)
SETS: dict[str, LoraSet] = {"-": (), "i": INK, "c": CHALK}


def planned(loras: LoraSet, images: int = 1) -> PlannedRequest:
    return PlannedRequest(request(num_images=images), SHAPE, 10, 5.0, seed=1, loras=loras)


class Queue:
    """A queue without a GPU thread, whose requests are letters: each the key of its LoRAs."""

    def __init__(self, sizes: tuple[int, ...] = (1,)) -> None:
        self.queue = RequestQueue(1000, 0.0, lambda _: None, monotonic=Clock())
        self.sizes = sizes
        self.names: dict[Call, str] = {}

    def join(self, letters: str, images: int = 1) -> None:
        for letter in letters:
            call = Call("/", "POST", TraceIdentity(1, 1, exported=False))
            self.names[call] = letter
            self.queue.join(planned(SETS[letter], images), call, None, self.sizes)

    def forecast(self) -> list[list[Call]]:
        state = self.queue.state()
        runs = [run for each in state.waiting for run in each.runs()]
        batches = coming_batches(runs, lambda _: self.sizes, state.loras)
        return [[run.call for run in batch] for batch in batches]

    def run(self) -> list[Call]:
        batch = self.queue.take(lambda _: self.sizes)
        assert batch is not None
        pixels = GeneratedPixels(None, False, 0)
        self.queue.end(batch, [[pixels] * len(part.images) for part in batch.parts])
        return [each.call for each in batch.requests]

    def run_all(self) -> str:
        order = ""
        while self.queue.state().waiting:
            order += "".join(self.names[call] for call in self.run())
        return order


@pytest.mark.parametrize(
    ("waiting", "order"),
    [
        ("----", "----"),
        ("iiii", "iiii"),
        # The weights have none at first.
        ("i-i-i-i-", "--iiii--"),
        ("-i-i-i", "---iii"),
        ("ci", "ci"),
        # Two runs go before the first "c", though more of "i" wait.
        ("iciiii", "iiicii"),
        # "-" counts for all before it: the first "c" is passed over once more, and no further.
        ("icicic-", "-iiccci"),
    ],
)
def test_requests_of_one_set_are_grouped_within_the_bound(waiting: str, order: str) -> None:
    queue = Queue()
    queue.join(waiting)
    assert queue.run_all() == order


def test_without_loras_the_order_is_that_of_arrival() -> None:
    queue = Queue()
    queue.join("-" * 20)
    joined = list(queue.names)
    assert [queue.run() for _ in joined] == [[call] for call in joined]


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4)])
def test_nobody_is_passed_over_more_often_than_the_bound_and_forecasts_have_the_same_order(
    sizes: tuple[int, ...],
) -> None:
    chance = random.Random(3)
    for _ in range(30):
        queue = Queue(sizes)
        passed: dict[Call, int] = {}
        for _ in range(40):
            if not queue.queue.state().waiting or chance.random() < 0.5:
                queue.join(chance.choice("-iiic"), chance.choice(sizes))
                continue
            before = [each.call for each in queue.queue.state().waiting]
            forecast = queue.forecast()
            taken = queue.run()
            assert taken == forecast[0]
            for call in before[: before.index(taken[0])]:
                passed[call] = passed.get(call, 0) + 1
        assert max(passed.values(), default=0) <= MOST_PASSED_OVER
        forecast = queue.forecast()
        assert [queue.run() for _ in forecast] == forecast
        assert not queue.queue.state().waiting


def test_a_steady_stream_of_one_set_delays_another_by_the_bound_only() -> None:
    queue = Queue()
    queue.join("ii")
    queue.run()
    queue.join("c")
    runs = 0
    while "c" not in (queue.names[call] for call in queue.run()):
        runs += 1
        queue.join("i")  # the client comes back at once
    assert runs == 1 + MOST_PASSED_OVER  # one of them came before it


def test_an_estimate_adds_the_changes_of_the_runs_before_and_of_its_own() -> None:
    clock = Clock()
    queue = RequestQueue(32, 0.0, lambda _: None, monotonic=clock)
    estimates = Estimates(monotonic=clock)
    estimates.observe_run(run_of(), serving=True)
    seconds = (20 + 10 * 30 + 50) / 1e3
    # A run with a change of 15 ms before its text.
    run = run_of(at_ns=15 * MS)
    stages = (StageTiming("lora_swap", 0, 15 * MS), *run.stages)
    for _ in range(3):
        estimates.observe_run(replace(run, start_ns=0, stages=stages), serving=True)

    def done(loras: LoraSet, images: int = 1) -> float:
        call = Call("/", "POST", TraceIdentity(1, 1, exported=False))
        target = QueuedRuns(planned(loras, images), call, (1,) * images)
        found = estimates.seconds_until_done(target, queue.state(), lambda _: (1,))
        assert found is not None
        return found

    assert done(()) == pytest.approx(seconds)
    assert done(INK) == pytest.approx(seconds + 0.015)
    assert done(INK, images=2) == pytest.approx(2 * seconds + 0.015)
    queue.join(planned(INK), Call("/", "POST", TraceIdentity(1, 1, exported=False)), None, (1,))
    # It goes before "ink", which the weights do not have.
    assert done(()) == pytest.approx(seconds)
    assert done(CHALK) == pytest.approx(2 * (seconds + 0.015))
