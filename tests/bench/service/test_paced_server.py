"""The server of `bench overload`, whose steps and uploads take as long as they are told to."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from bench.service import paced_server


def test_an_upload_takes_its_time_and_gives_the_image() -> None:
    started = time.monotonic()
    store = paced_server.slow_storage(0.05)
    assert store(b"\x00", "png") == "data:image/png;base64,AA=="
    assert time.monotonic() - started >= 0.05


class Clock:
    """Time that only passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.mark.parametrize(("computing", "takes"), [(0.0, 0.08), (0.03, 0.08), (0.12, 0.12)])
def test_a_step_takes_its_time_whatever_it_computes_within_it(
    computing: float, takes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(paced_server, "time", clock)

    class UNet(torch.nn.Module):
        def forward(self) -> str:
            clock.sleep(computing)
            return "noise"

    unet = UNet()
    paced_server.paced(0.08)(SimpleNamespace(pipeline=SimpleNamespace(unet=unet)))  # type: ignore[arg-type]
    for _ in range(2):
        started = clock.now
        assert unet() == "noise"
        assert clock.now - started == pytest.approx(takes)
