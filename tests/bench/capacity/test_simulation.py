"""The simulation, against closed forms and against what must hold of any queue."""

from __future__ import annotations

import numpy as np
import pytest

from bench.capacity.queueing import MDc
from bench.capacity.service_times import ServiceTimes
from bench.capacity.simulation import replay, simulate
from tests.bench.capacity.test_queueing import mmc_mean_wait

REQUESTS = 30_000


def times(*seconds: float, **batches: float) -> ServiceTimes:
    """Runs of one image with these times; `two=` and so on: longer runs."""
    sizes = {"two": 2, "four": 4, "eight": 8}
    runs = {1: np.sort(np.array(seconds))}
    runs |= {sizes[name]: np.array([value]) for name, value in batches.items()}
    return ServiceTimes("made up", "here", "none", 20, runs, np.array([0.0]))


def exponential(mean: float) -> ServiceTimes:
    """Quantiles of the distribution, so close that a sample of them is one of it."""
    shares = (np.arange(20_000) + 0.5) / 20_000
    return times(*(-mean * np.log(1 - shares)))


@pytest.mark.parametrize(("replicas", "use"), [(1, 0.5), (1, 0.8), (4, 0.8), (20, 0.9)])
def test_one_queue_and_constant_times_are_mdc(replicas: int, use: float) -> None:
    rate = replicas * use / 0.25
    found = simulate(
        times(0.25), rate, replicas, requests=REQUESTS, max_waiting=10_000, routing="shared"
    )
    exact = MDc(rate, 0.25, replicas)
    assert found.waits.mean() == pytest.approx(exact.mean_wait(), rel=0.12)
    assert found.percentile(95) == pytest.approx(exact.wait_percentile(95) + 0.25, rel=0.1)
    assert np.mean(found.waits <= 1e-12) == pytest.approx(exact.wait_at_most(0), abs=0.03)
    assert found.busy == pytest.approx(use, rel=0.03)


@pytest.mark.parametrize(("replicas", "use"), [(1, 0.7), (5, 0.8)])
def test_one_queue_and_exponential_times_are_mmc(replicas: int, use: float) -> None:
    rate = replicas * use
    found = simulate(
        exponential(1.0), rate, replicas, requests=REQUESTS, max_waiting=10_000, routing="shared"
    )
    assert found.waits.mean() == pytest.approx(mmc_mean_wait(rate, 1.0, replicas), rel=0.12)


def test_random_routing_is_that_many_queues_of_their_own() -> None:
    found = simulate(
        times(1.0), 5 * 0.6, 5, requests=REQUESTS, max_waiting=10_000, routing="random"
    )
    alone = MDc(0.6, 1.0, 1)
    assert found.waits.mean() == pytest.approx(alone.mean_wait(), rel=0.1)
    assert found.percentile(95) == pytest.approx(1 + alone.wait_percentile(95), rel=0.1)


def test_the_fewest_outstanding_is_between_one_queue_and_random() -> None:
    p95 = [
        simulate(times(1.0), 6.4, 8, requests=REQUESTS, routing=routing).percentile(95)
        for routing in ("shared", "least", "random")
    ]
    assert p95 == sorted(p95)
    assert p95[1] < 0.7 * p95[2]


def test_shared_runs_carry_what_single_ones_cannot() -> None:
    # Eight images take twice the time of one: up to four times the rate.
    batched = times(1.0, two=1.15, four=1.4, eight=2.0)
    alone = simulate(batched, 3.0, 1, requests=4000, max_waiting=32)
    together = simulate(batched, 3.0, 1, requests=4000, max_waiting=32, most_images=8)
    assert alone.refused > 0.5
    assert together.refused < 0.01
    assert 3 < together.images_a_run < 8
    # A replica that is hardly used draws each by itself.
    assert simulate(batched, 0.05, 1, requests=2000, most_images=8).images_a_run < 1.2


def test_sizes_between_the_measured_lie_between_their_times() -> None:
    known = times(1.0, two=1.2, eight=2.4)
    assert known.run_seconds(5, 0.5) == pytest.approx(1.8)
    assert known.run_seconds(2, 0.9) == 1.2


def test_a_full_queue_refuses() -> None:
    # Twice what it can draw: half is refused, and whoever is served waited for a full queue.
    found = simulate(times(1.0), 2.0, 1, requests=8000, max_waiting=4)
    assert found.refused == pytest.approx(0.5, abs=0.03)
    assert found.waits.max() <= 5.0
    assert found.busy > 0.99


def test_every_request_is_served_once_and_the_rest_of_it_is_added() -> None:
    quick = times(0.001)
    quick = ServiceTimes("made up", "", "", 20, quick.runs, np.array([0.5]))
    found = simulate(quick, 1.0, 3, requests=1000)
    assert len(found.latencies) == 900
    assert np.allclose(found.latencies - found.waits, 0.501)


def test_a_replay_has_each_requests_own_time() -> None:
    # The second waits for the first, the third for nobody, on one replica; on two, nobody waits.
    arrivals, runs = [0.0, 1.0, 10.0, 10.5], [3.0, 1.0, 0.5, 0.25]
    assert replay(arrivals, runs, 1).tolist() == [0.0, 2.0, 0.0, 0.0]
    assert replay(arrivals, runs, 2).tolist() == [0.0, 0.0, 0.0, 0.0]
    # Each goes where the fewest are: the third behind the first, the fourth behind the second.
    together = replay([0.0, 0.1, 0.2, 0.3], [4.0, 1.0, 1.0, 1.0], 2)
    assert together == pytest.approx([0.0, 0.0, 3.8, 0.8])


def test_the_same_arguments_give_the_same_result() -> None:
    one, other = (simulate(exponential(1.0), 2.0, 4, requests=500) for _ in range(2))
    assert np.array_equal(one.latencies, other.latencies)
