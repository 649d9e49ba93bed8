"""The noise that a stochastic scheduler draws on the device in every step."""

from __future__ import annotations

import pytest
import torch

from serve.schema import MAX_SEED

pytestmark = pytest.mark.gpu


def test_cudas_generator_takes_all_bits_of_a_seed() -> None:
    seeds = (0, 2**32, 1, 2**53 + 1, MAX_SEED)
    drawn = [
        torch.randn(64, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        for seed in seeds
    ]
    assert len({tuple(values.tolist()) for values in drawn}) == len(seeds)
