"""The noise that a seed means: of its own for each seed, normal, and unchanged below 2^32."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from serve.model.noise import cpu_generator
from serve.schema import MAX_SEED

FIGURES = random.Random(16)
PAIRS = (
    (0, 2**32),
    (1, 2**53 + 1),
    (1, 2**32),
    (2**32, 2**33),
    (2**32 - 1, MAX_SEED),
    (MAX_SEED - 1, MAX_SEED),
    # The two words exchanged.
    (3 * 2**32 + 5, 5 * 2**32 + 3),
    *((low, low + 2**32 * FIGURES.randrange(1, 2**31)) for low in (0, 7, 2**32 - 1)),
    *((FIGURES.randrange(MAX_SEED), FIGURES.randrange(MAX_SEED)) for _ in range(20)),
)
LARGE = (2**32, 2**53 + 1, MAX_SEED, 2**32 * 12345)


def noise(seed: int, values: int = 4 * 16 * 16) -> torch.Tensor:
    return torch.randn(values, generator=cpu_generator(seed))


@pytest.mark.parametrize("pair", PAIRS)
def test_two_seeds_are_two_noises(pair: tuple[int, int]) -> None:
    first, second = (noise(seed, 65536) for seed in pair)
    # Not even alike: independent values have a correlation of 0 +- 1/256.
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / 256
    for seed in pair:
        assert torch.equal(noise(seed), noise(seed))


def test_many_seeds_with_the_same_lower_bits_are_many_noises() -> None:
    starts = {tuple(noise(9 + 2**32 * high, 16).tolist()) for high in range(2000)}
    assert len(starts) == 2000


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1])
def test_below_2_to_the_32_a_seed_is_torchs_own(seed: int) -> None:
    theirs = torch.Generator("cpu").manual_seed(seed)
    assert torch.equal(noise(seed), torch.randn(4 * 16 * 16, generator=theirs))


@pytest.mark.parametrize("seed", LARGE)
def test_a_large_seeds_noise_is_normal(seed: int) -> None:
    values = noise(seed, 1 << 18).double()
    error = 1 / math.sqrt(len(values))
    assert abs(float(values.mean())) < 4 * error
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2) * error
    # Kolmogorov and Smirnov's statistic; a normal sample exceeds this once in a thousand times.
    expected = torch.special.ndtr(values.sort().values)
    steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    distance = max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))
    assert distance < 1.95 * error
    neighbours = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert abs(float(neighbours)) < 4 * error


@pytest.mark.parametrize("seed", LARGE)
def test_a_large_seeds_stream_is_the_mersenne_twisters(seed: int) -> None:
    """Word by word what another implementation draws: the state is where torch keeps it."""
    ours = torch.randint(0, 2**16, (2000,), generator=cpu_generator(seed))
    theirs = np.random.RandomState([seed % 2**32, seed // 2**32])
    words = theirs.randint(0, 2**32, 2000, dtype=np.uint32)
    assert ours.tolist() == (words % 2**16).tolist()
