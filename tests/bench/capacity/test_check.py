"""`python -m bench.capacity.check` against a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.capacity.check import Load, main
from tests.support.forked import self_hosted

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {"SDXL_DEVICE": "cpu", "SDXL_MAX_BATCH": "1", "OMP_NUM_THREADS": "1"}


def test_what_is_seen_is_compared_with_what_is_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "check.json"
    with self_hosted(SETTINGS) as server:
        server.wait_until_ready(240)
        arguments = ["--url", server.url, "--rate", "3", "--requests", "30", "--steps", "2"]
        status = main([*arguments, "--out", str(out)])
    found = json.loads(capsys.readouterr().out)
    load = Load.read(out)
    assert len(load.seen) == 30
    assert all(each.latency >= each.run > 0 for each in load.seen)
    assert found["utilisation"] == pytest.approx(load.utilisation)
    for each in found["percentiles"]:
        assert each["low"] <= each["median"] <= each["high"]
        # On a busy machine the ranges need not hold. With the very times the queue must.
        assert each["seen"] == pytest.approx(each["replayed"], rel=0.2)
    assert status == (0 if all(each["agrees"] for each in found["percentiles"]) else 1)


def test_a_service_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:9", "--rate", "5", "--requests", "1"]) == 2
    assert main(["--url", "http://192.0.2.1", "--rate", "5", "--requests", "1"]) == 2
    assert capsys.readouterr().err
