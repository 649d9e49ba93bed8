"""The closed forms, against other formulas of the same quantities."""

from __future__ import annotations

import math

import pytest

from bench.capacity.queueing import MDc


def erlang_c(servers: int, load: float) -> float:
    """The probability that an arrival waits in M/M/c.

    Args:
        load: rate times mean service time, below `servers`.
    """
    blocked = 1.0  # Erlang B by its recursion, which does not overflow
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return servers * blocked / (servers - load * (1 - blocked))


def mmc_mean_wait(rate: float, service: float, servers: int) -> float:
    """The mean wait if service times are exponential: M/M/c."""
    load = rate * service
    return erlang_c(servers, load) * service / (servers - load)


def poisson_tail(mean: float, count: int) -> float:
    """The probability of at least this many."""
    below = sum(math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(count))
    return max(0.0, 1 - below)


def crommelin_mean_wait(load: float, servers: int) -> float:
    """M/D/c's mean wait in service times, as Crommelin's series of 1932 has it."""
    total, count = 0.0, 1
    while True:
        mean = count * load
        term = poisson_tail(mean, count * servers) - servers / load * poisson_tail(
            mean, count * servers + 1
        )
        if term < 1e-13:
            return total
        total, count = total + term, count + 1


@pytest.mark.parametrize("load", [0.1, 0.5, 0.8, 0.95])
def test_md1_has_pollaczek_and_khinchines_mean(load: float) -> None:
    assert MDc(load, 1, 1).mean_wait() == pytest.approx(load / (2 * (1 - load)), rel=1e-6)
    # The half of M/M/1's.
    assert mmc_mean_wait(load, 1, 1) == pytest.approx(load / (1 - load))


@pytest.mark.parametrize(("servers", "use"), [(2, 0.5), (2, 0.8), (4, 0.7), (10, 0.9), (50, 0.8)])
def test_mdc_has_crommelins_mean(servers: int, use: float) -> None:
    found = MDc(servers * use, 1, servers).mean_wait()
    assert found == pytest.approx(crommelin_mean_wait(servers * use, servers), rel=1e-5)


@pytest.mark.parametrize(("servers", "use"), [(1, 0.8), (3, 0.9), (20, 0.95)])
def test_the_waits_distribution_has_the_mean_of_littles_law(servers: int, use: float) -> None:
    queue = MDc(servers * use, 1, servers)
    step = 0.002
    waits = (index * step for index in range(60_000))
    integral = 0.0
    for wait in waits:
        above = 1 - queue.wait_at_most(wait)
        integral += above * step
        if above < 1e-7:
            break
    assert integral == pytest.approx(queue.mean_wait(), rel=0.01)


def test_md1s_wait_has_erlangs_distribution() -> None:
    load, wait = 0.7, 2.4
    terms = (
        math.exp(-load * (k - wait)) * (load * (k - wait)) ** k / math.factorial(k)
        for k in range(math.floor(wait) + 1)
    )
    assert MDc(load, 1, 1).wait_at_most(wait) == pytest.approx((1 - load) * sum(terms), rel=1e-9)


def test_a_percentile_is_the_wait_of_that_share() -> None:
    queue = MDc(9, 1, 10)
    wait = queue.wait_percentile(95)
    assert queue.wait_at_most(wait) == pytest.approx(0.95, abs=1e-6)
    assert queue.wait_percentile(30) == 0  # 35% do not wait
    # Units: the same queue in milliseconds.
    scaled = MDc(9 / 1000, 1000, 10).wait_percentile(95)
    assert scaled == pytest.approx(1000 * wait, rel=1e-6)


def test_erlang_c_has_the_values_of_its_table() -> None:
    # Two servers: load^2 / (2 + load); and a textbook's call centre: 10 agents, 8 erlangs, 40.9%.
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.409, abs=0.0005)


def test_a_queue_without_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="load"):
        MDc(2, 1, 2)
