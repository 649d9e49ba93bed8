"""The queue in front of the GPU thread: who shares a run, in which order, and who may wait."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from dataclasses import dataclass

import pytest

from kernels_warmup.shapes import CompiledShape
from metrics.records import LoraSet
from metrics.sampling import TraceIdentity
from serve.engine.call import Call
from serve.engine.cancellation import Cancellation
from serve.engine.gpu_run import GeneratedPixels, Outcome
from serve.engine.planning import PlannedRequest
from serve.engine.waiting import request_queue
from serve.engine.waiting.request_queue import (
    Batch,
    QueuedRequest,
    RequestQueue,
)
from serve.engine.waiting.run_order import coming_batches, first_batch, split
from serve.errors import ClientGone, DeadlineExceeded, Draining, OutOfMemory
from tests.serve.conftest import request

SHAPE = CompiledShape(128, 128)
WARM = (1, 2, 4, 8)
ANY = tuple(range(1, 9))


# Which requests share a run


@dataclass(eq=False)
class Waiting:
    run_key: str
    next_images: int = 1
    alone: bool = False
    loras: LoraSet = ()
    passed_over: int = 0


def batch_of(*waiting: Waiting, sizes: tuple[int, ...] = ANY) -> list[int]:
    """The places of the first run's requests."""
    return [waiting.index(each) for each in first_batch(waiting, sizes)]


@pytest.mark.parametrize(
    ("images", "sizes", "runs"),
    [
        (1, (1,), [1]),
        (4, (1,), [1, 1, 1, 1]),
        (4, ANY, [4]),
        (3, WARM, [2, 1]),
        (7, WARM, [4, 2, 1]),
        (11, ANY, [8, 3]),
        (11, WARM, [8, 2, 1]),
        (2, (4,), [1, 1]),
    ],
)
def test_a_request_has_one_run_if_its_size_is_warm(
    images: int, sizes: tuple[int, ...], runs: list[int]
) -> None:
    assert split(images, sizes) == runs


def test_a_run_takes_the_first_and_all_like_it() -> None:
    a, b = "a", "b"
    assert batch_of(Waiting(a), Waiting(b), Waiting(a), Waiting(b)) == [0, 2]
    assert batch_of(Waiting(b), Waiting(a), Waiting(a), Waiting(a)) == [0]
    assert batch_of(*(Waiting(a) for _ in range(12))) == list(range(8))


def test_a_run_has_a_warm_size() -> None:
    assert batch_of(*(Waiting("a") for _ in range(7)), sizes=WARM) == [0, 1, 2, 3]
    assert batch_of(*(Waiting("a") for _ in range(3)), sizes=WARM) == [0, 1]
    assert batch_of(Waiting("a"), Waiting("a", 2), sizes=WARM) == [0]
    assert batch_of(Waiting("a"), Waiting("a", 2), Waiting("a"), sizes=WARM) == [0, 1, 2]


def test_a_request_that_does_not_fit_lets_smaller_ones_in() -> None:
    assert batch_of(Waiting("a", 6), Waiting("a", 4), Waiting("a", 2)) == [0, 2]


def test_a_request_that_ran_out_of_memory_shares_no_run() -> None:
    assert batch_of(Waiting("a", alone=True), Waiting("a")) == [0]
    assert batch_of(Waiting("a"), Waiting("a", alone=True), Waiting("a")) == [0, 2]


@pytest.mark.parametrize("sizes", [(1,), WARM, ANY])
def test_every_request_is_drawn_once_and_the_first_goes_first(sizes: tuple[int, ...]) -> None:
    chance = random.Random(1)
    for _ in range(200):
        waiting = [
            Waiting(chance.choice("abc"), chance.choice(sizes), chance.random() < 0.1)
            for _ in range(chance.randrange(1, 20))
        ]
        left = list(waiting)
        for batch in coming_batches(waiting, lambda _: sizes):
            assert batch == first_batch(left, sizes)
            assert batch[0] is left[0]
            assert sum(each.next_images for each in batch) in sizes
            assert len({each.run_key for each in batch}) == 1
            left = [each for each in left if each not in batch]
        assert not left


# The queue


class Queue:
    """A queue and the requests that have joined it."""

    def __init__(self, max_waiting: int = 32, max_wait_seconds: float | None = 0.0) -> None:
        self.told: list[int] = []
        self.queue = RequestQueue(max_waiting, max_wait_seconds, self.told.append)

    def join(self, steps: int = 2, images: int = 1) -> QueuedRequest:
        planned = PlannedRequest(request(num_images=images), SHAPE, steps, 5.0, seed=1)
        call = Call("/", "POST", TraceIdentity(1, 1, exported=False))
        call.timeline.begin("queue")
        return self.queue.join(planned, call, None, ANY)

    def take(self) -> Batch:
        batch = self.queue.take(lambda _: ANY)
        assert batch is not None
        for part in batch.parts:
            part.call.timeline.end()
        return batch


PIXELS = GeneratedPixels("pixels", prompt_truncated=False, prompt_tokens=3)


def drawn(batch: Batch) -> list[Outcome]:
    return [[PIXELS] * len(part.images) for part in batch.parts]


def test_one_runs_and_the_allowed_number_waits() -> None:
    line = Queue(max_waiting=1)
    line.join(steps=1)
    assert not line.queue.full
    assert line.queue.waiting == 0  # it is about to run
    line.join(steps=2)
    assert line.queue.full
    assert line.queue.waiting == 1
    batch = line.take()
    assert line.queue.full
    assert line.queue.waiting == 1
    line.queue.end(batch, drawn(batch))
    batch = line.take()
    assert not line.queue.full
    assert line.queue.waiting == 0
    line.queue.end(batch, drawn(batch))
    assert line.told == [0, 1, 1, 0, 0, 0]


def test_none_may_wait() -> None:
    line = Queue(max_waiting=0)
    assert not line.queue.full
    line.join()
    assert line.queue.full


def test_a_request_of_several_runs_keeps_its_place() -> None:
    line = Queue()
    first = line.join(images=11)
    second = line.join(images=2)
    other = line.join(steps=3)
    seen = []
    for _ in range(3):
        batch = line.take()
        seen.append(
            [(each, part.images) for each, part in zip(batch.requests, batch.parts, strict=True)]
        )
        line.queue.end(batch, drawn(batch))
    assert seen == [
        [(first, range(8))],
        [(first, range(8, 11)), (second, range(2))],
        [(other, range(1))],
    ]
    assert line.queue.take(lambda _: ANY) is None
    assert first.future.result() == [PIXELS] * 11
    assert first.call.total_steps == 4
    assert [stage.name for stage in first.call.finish(200).stages] == ["queue", "queue"]


def test_a_cancelled_request_leaves_at_once() -> None:
    line = Queue()
    first, second = line.join(), line.join()
    first.call.cancellation.cancel(ClientGone())
    assert isinstance(first.future.result(0), ClientGone)
    assert line.take().requests == [second]


def test_a_cancelled_request_of_a_run_is_answered_when_the_run_has_ended() -> None:
    line = Queue()
    first, second = line.join(), line.join()
    batch = line.take()
    first.call.cancellation.cancel(DeadlineExceeded(1))
    assert not first.future.done()
    line.queue.end(batch, drawn(batch))
    assert isinstance(first.future.result(0), DeadlineExceeded)
    assert second.future.result(0) == [PIXELS]


def test_a_request_whose_images_are_there_is_cancelled_by_its_client_only() -> None:
    line = Queue()
    drawn_one, running = line.join(), line.join(steps=9)
    batch = line.take()
    line.queue.end(batch, drawn(batch))
    line.take()
    for queued in (drawn_one, running):
        line.queue.cancel_unless_drawn(queued.call, DeadlineExceeded(1))
    assert drawn_one.call.cancellation.reason is None
    assert isinstance(running.call.cancellation.reason, DeadlineExceeded)
    drawn_one.call.cancellation.cancel(ClientGone())
    assert isinstance(drawn_one.call.cancellation.reason, ClientGone)


def test_a_request_that_is_cancelled_between_its_runs_leaves() -> None:
    line = Queue()
    queued = line.join(images=9)
    batch = line.take()
    line.queue.end(batch, drawn(batch))
    queued.call.cancellation.cancel(ClientGone())
    assert isinstance(queued.future.result(0), ClientGone)
    assert line.queue.take(lambda _: ANY) is None


def test_a_failed_run_ends_the_request_with_its_further_runs() -> None:
    line = Queue()
    queued = line.join(images=9)
    batch = line.take()
    failure = DeadlineExceeded(1)
    line.queue.end(batch, [failure])
    assert queued.future.result(0) is failure
    assert line.queue.take(lambda _: ANY) is None


def test_an_exception_of_a_run_reaches_all_its_requests() -> None:
    line = Queue()
    both = [line.join(), line.join()]
    line.queue.fail(line.take(), KeyError())
    for queued in both:
        with pytest.raises(KeyError):
            queued.future.result(0)


def test_a_run_of_several_that_ran_out_of_memory_is_drawn_one_by_one() -> None:
    line = Queue()
    first, second, third = line.join(), line.join(images=2), line.join(steps=3)
    batch = line.take()
    assert batch.images == 3
    late = line.join()
    further = line.queue.end(batch, [OutOfMemory(), OutOfMemory()])
    assert further == 3
    order = []
    for _ in range(5):
        batch = line.take()
        order.append(batch.requests)
        line.queue.end(batch, drawn(batch))
    assert order == [[first], [second], [second], [third], [late]]
    assert second.future.result(0) == [PIXELS] * 2


def test_a_run_of_one_image_that_ran_out_of_memory_fails() -> None:
    line = Queue()
    queued = line.join()
    assert line.queue.end(line.take(), [OutOfMemory()]) == 0
    assert isinstance(queued.future.result(0), OutOfMemory)


def test_draining_cancels_waiting_requests_and_not_started_ones() -> None:
    line = Queue()
    started = line.join(images=9)
    batch = line.take()
    waiting = line.join()
    line.queue.drain()
    assert isinstance(waiting.future.result(0), Draining)
    line.queue.end(batch, drawn(batch))
    batch = line.take()
    line.queue.end(batch, drawn(batch))
    assert started.future.result(0) == [PIXELS] * 9


# Waiting for others


def test_the_first_waits_for_others_and_no_longer_than_allowed() -> None:
    line = Queue(max_wait_seconds=0.2)
    start = time.monotonic()
    first = line.join()
    threading.Timer(0.05, line.join).start()
    batch = line.take()
    assert time.monotonic() - start >= 0.19
    assert batch.requests[0] is first
    assert batch.images == 2


def test_by_default_a_run_waits_for_as_many_requests_as_shared_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_queue, "RETURN_SECONDS", 60)
    line = Queue(max_wait_seconds=None)

    def run(waits_for_another: bool = False) -> int:
        """Draw the next run, and return how many images it had."""
        if waits_for_another:
            threading.Timer(0.05, line.join).start()
        batch = line.take()
        line.queue.end(batch, drawn(batch))
        return batch.images

    line.join()
    assert run() == 1  # alone: it does not wait
    line.join()
    line.join()
    assert run() == 2
    line.join()
    assert run(waits_for_another=True) == 2  # for no third
    monkeypatch.setattr(request_queue, "RETURN_SECONDS", 0.05)
    line.join()
    assert run() == 1  # the other has left
    monkeypatch.setattr(request_queue, "RETURN_SECONDS", 60)
    line.join()
    assert run() == 1


def test_a_full_run_does_not_wait() -> None:
    line = Queue(max_wait_seconds=60)
    line.join()
    threading.Timer(0.05, lambda: line.join(images=7)).start()
    assert line.take().images == 8


def test_the_gpu_thread_does_not_wait_if_it_has_other_work() -> None:
    line = Queue(max_wait_seconds=60)
    line.join()
    threading.Timer(0.05, lambda: line.join(steps=3)).start()
    assert line.take().images == 1


@pytest.mark.parametrize("end", ["cancel", "drain"])
def test_the_gpu_thread_stops_waiting_when_the_request_has_left(end: str) -> None:
    line = Queue(max_wait_seconds=60)
    queued = line.join()
    leave = (
        line.queue.drain
        if end == "drain"
        else lambda: queued.call.cancellation.cancel(ClientGone())
    )
    threading.Timer(0.05, leave).start()
    assert line.queue.take(lambda _: ANY) is None


# Many threads


def test_every_request_gets_one_outcome_while_others_join_and_leave() -> None:
    line = Queue(max_waiting=10_000)
    chance = random.Random(2)
    tokens: deque[None] = deque()
    ended = threading.Event()

    def gpu_thread() -> None:
        while not ended.is_set() or tokens:
            if not tokens:
                time.sleep(0)
                continue
            tokens.popleft()
            batch = line.queue.take(lambda _: ANY)
            if batch is None:
                continue
            for part in batch.parts:
                part.call.timeline.end()
            tokens.extend([None] * line.queue.end(batch, drawn(batch)))

    thread = threading.Thread(target=gpu_thread)
    thread.start()
    joined = []
    for _ in range(2000):
        queued = line.join(steps=chance.randrange(1, 3), images=chance.choice([1, 1, 1, 9]))
        joined.append(queued)
        tokens.extend([None] * split(queued.planned.num_images, ANY).__len__())
        if chance.random() < 0.5:
            chance.choice(joined[-20:]).call.cancellation.cancel(ClientGone())
    ended.set()
    thread.join(30)
    assert not thread.is_alive()
    for queued in joined:
        outcome = queued.future.result(0)
        assert isinstance(outcome, ClientGone) or outcome == [PIXELS] * queued.planned.num_images
    assert line.queue.waiting == 0
    assert line.queue.idle


# Cancellation


def test_the_first_reason_stands_and_callbacks_run_once() -> None:
    cancellation = Cancellation()
    called: list[str] = []
    cancellation.when_cancelled(lambda: called.append("before"))
    cancellation.raise_if_cancelled()
    cancellation.cancel(ClientGone())
    cancellation.cancel(DeadlineExceeded(1))
    cancellation.when_cancelled(lambda: called.append("after"))
    assert isinstance(cancellation.reason, ClientGone)
    assert called == ["before", "after"]
    with pytest.raises(ClientGone):
        cancellation.raise_if_cancelled()
