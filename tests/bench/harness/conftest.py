"""One thread, and ceilings that are not measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.harness import environment
from bench.harness.result_file import Ceilings

CEILINGS = Ceilings({"float32": 0.1}, 1.0)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also skip measuring ceilings, which takes a second a test."""
    monkeypatch.setattr(environment, "measure_ceilings", lambda _: CEILINGS)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
