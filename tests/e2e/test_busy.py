"""A busy machine: each front door's threads, and the time of a request beside endless loops."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import httpx
import pytest

from bench.service.busy import TARGETS, measure, summarise
from kernels_warmup.cpu_threads import cores_given
from tests.e2e.conftest import COMMANDS, START_SECONDS
from tests.support.processes import ROOT

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(cores_given() < 2, reason="one core: no thread waits for another"),
]

QUOTA = """
import kernels_warmup.cpu_threads
kernels_warmup.cpu_threads.cpu_quota = lambda *_: 1.0
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("quota", [False, True])
@pytest.mark.parametrize("kind", COMMANDS)
def test_each_front_door_chooses_before_torch_is_loaded(
    tmp_path: Path, kind: str, quota: bool
) -> None:
    """torch by itself has a thread for each core. It has one, if a quota allows one and its OpenMP
    read what was chosen."""
    (tmp_path / "sitecustomize.py").write_text(QUOTA if quota else "")
    # An empty value is none: that of this process, if it has one, must not be inherited.
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "", "SDXL_DEVICE": "cpu"}
    with COMMANDS[kind](environment) as server:
        server.wait_until_ready(START_SECONDS)
        said = httpx.get(server.url + "/ready", timeout=60).json()["cpu_threads"]
        logged = server.output()
    expected = 1 if quota else cores_given()
    assert (said["threads"], said["cores"], said["set_by_user"]) == (expected, expected, {})
    assert said["waiting"] in (("as OpenMP does",) if quota else ("spinning", "yielding"))
    assert "threads on the CPU" in logged


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.timeout(1800)
def test_a_request_beside_endless_loops_takes_at_most_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    options = argparse.Namespace(rounds=10, baseline_rounds=1, steps=20, model="demo")
    samples = measure(options, {})
    figures = summarise(samples)
    assert figures["0"]["ships"]["low"] <= TARGETS[0], figures
    for load in ("1", "2"):
        assert figures[load]["ships"]["point"] <= TARGETS[int(load)], figures
    # What it is for: libgomp by itself is slower beside a loop.
    beside = samples.wall_ms["1"]
    assert beside["ships"][0] < beside["libgomp"][0]
