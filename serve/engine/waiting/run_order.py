"""Which waiting requests the next run takes, and in which order the runs come.

The queue takes its next run by these rules, and the estimates simulate all coming runs by them. So
a forecast has the order that the queue will have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from metrics.records import LoraSet


def split(images: int, sizes: Sequence[int]) -> list[int]:
    """The images of each run of one request: as many as a run may have, the largest run first."""
    runs = []
    while images > 0:
        runs.append(max((size for size in sizes if size <= images), default=1))
        images -= runs[-1]
    return runs


class Batchable(Protocol):
    """What decides whether requests share a run."""

    @property
    def run_key(self) -> object: ...
    @property
    def next_images(self) -> int:
        """Images of its next run."""

    @property
    def alone(self) -> bool:
        """Whether it shares no run."""

    @property
    def loras(self) -> LoraSet: ...

    passed_over: int
    """How many runs were begun before it that came after it."""


B = TypeVar("B", bound=Batchable)


MOST_PASSED_OVER = 2
"""How many runs may go before a request that came earlier, so that the weights need not change.

The bound is small, because a change of the weights takes less time than a few steps, and each run
that goes first makes the earlier request wait for a whole run. Grouping gains most with few-step
models, whose runs are short. If requests of two sets alternate and a run takes one of them, the
weights change after every third run instead of after every one."""


def first_of(waiting: Sequence[B], loras: LoraSet) -> int:
    """The place of the request that the next run begins with: the first, or the first with the
    LoRAs that the weights have, unless the first was passed over `MOST_PASSED_OVER` times."""
    head = waiting[0]
    if head.loras == loras or head.passed_over >= MOST_PASSED_OVER:
        return 0
    return next((place for place, each in enumerate(waiting) if each.loras == loras), 0)


def begun_with(waiting: Sequence[B], place: int) -> list[B]:
    """The waiting requests as the next run takes them, if it begins with the one at this place."""
    return [waiting[place], *waiting[:place], *waiting[place + 1 :]]


def pass_over(waiting: Sequence[B], place: int) -> None:
    """A run begins with the request at this place: count it for those before it."""
    for each in waiting[:place]:
        each.passed_over += 1


def first_batch(waiting: Iterable[B], sizes: Sequence[int]) -> list[B]:
    """The requests of the next run: the first that waits, and those that it can share a run with.

    Args:
        sizes: the allowed numbers of images, ascending.
    """
    queue = iter(waiting)
    head = next(queue)
    batch, images = [head], head.next_images
    if head.alone:
        return batch
    for other in queue:
        if images >= sizes[-1]:
            break
        same = other.run_key == head.run_key and not other.alone
        if same and images + other.next_images <= sizes[-1]:
            batch.append(other)
            images += other.next_images
    while images not in sizes and len(batch) > 1:
        images -= batch.pop().next_images
    return batch


def coming_batches(
    waiting: Iterable[B], sizes: Callable[[B], Sequence[int]], loras: LoraSet = ()
) -> Iterator[list[B]]:
    """The runs in which the waiting requests will be drawn if no other joins them.

    Args:
        loras: what the weights have before the first of them.
    """
    waiting = list(waiting)
    if any(each.loras != loras for each in waiting):
        yield from _coming_batches_of_loras(waiting, sizes, loras)
        return
    queues: dict[object, deque[B]] = {}
    for each in waiting:
        queues.setdefault(each.run_key, deque()).append(each)
    done: set[int] = set()
    for head in waiting:
        if id(head) in done:
            continue
        batch = first_batch(queues[head.run_key], sizes(head))
        for each in batch:
            queues[head.run_key].remove(each)
            done.add(id(each))
        yield batch


def _coming_batches_of_loras(
    waiting: list[B], sizes: Callable[[B], Sequence[int]], loras: LoraSet
) -> Iterator[list[B]]:
    """The same where LoRAs differ; counts in the requests themselves who is passed over."""
    while waiting:
        place = first_of(waiting, loras)
        head = waiting[place]
        batch = first_batch(begun_with(waiting, place), sizes(head))
        loras = head.loras
        pass_over(waiting, place)
        taken = set(map(id, batch))
        waiting = [each for each in waiting if id(each) not in taken]
        yield batch
