from __future__ import annotations

import pytest

from serve.engine.cancellation import Admission, Cancellation
from serve.errors import ClientGone, DeadlineExceeded, Draining, QueueFull


def admission(max_waiting: int) -> tuple[Admission, list[int]]:
    told: list[int] = []
    return Admission(max_waiting, told.append), told


def test_one_runs_and_the_allowed_number_waits() -> None:
    door, told = admission(1)
    with door.admit(Cancellation()), door.admit(Cancellation()):
        assert door.waiting == 1
        with pytest.raises(QueueFull) as caught, door.admit(Cancellation()):
            pass
        assert caught.value.status == 429
        assert int(caught.value.headers["Retry-After"]) >= 1
    assert door.waiting == 0
    assert told == [0, 1, 0, 0]


def test_none_may_wait() -> None:
    door, _ = admission(0)
    with door.admit(Cancellation()), pytest.raises(QueueFull), door.admit(Cancellation()):
        pass


def test_retry_after_follows_the_runs() -> None:
    door, _ = admission(0)
    for _ in range(200):
        door.run_took(8.0)
    with door.admit(Cancellation()), pytest.raises(QueueFull) as caught, door.admit(Cancellation()):
        pass
    assert caught.value.headers["Retry-After"] == "8"


def test_draining_cancels_waiting_requests_and_not_running_ones() -> None:
    door, _ = admission(5)
    running, waiting = Cancellation(), Cancellation()
    running.work_started = True
    with door.admit(running), door.admit(waiting):
        door.drain()
        assert running.reason is None
        assert isinstance(waiting.reason, Draining)
        with pytest.raises(Draining), door.admit(Cancellation()):
            pass


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
