"""`bench busy`: the ratios, and what is refused."""

from __future__ import annotations

import pytest

from bench.__main__ import main
from bench.service.busy import Samples, report, summarise


def test_ratios_compare_requests_of_one_round(capsys: pytest.CaptureFixture[str]) -> None:
    threads = {"threads": 2, "cores": 2, "waiting": "spinning", "set_by_user": {}}
    samples = Samples(
        steps=20,
        model="demo",
        cpu_threads={"ships": threads, "libgomp": threads},
        load_average=[0.1, 2.0],
        wall_ms={
            "0": {"ships": [100.0, 200.0, 400.0], "libgomp": [100.0, 200.0, 400.0]},
            "1": {"ships": [150.0, 300.0, 600.0], "libgomp": [1000.0]},
            "2": {"ships": [250.0, 500.0, 1000.0], "libgomp": []},
        },
        waiting={
            "0": ["spinning"] * 3,
            "1": ["yielding"] * 3,
            "2": ["yielding"] * 3,
        },
    )
    figures = summarise(samples)
    assert figures["0"]["ships"] == {"point": 1.0, "low": 1.0, "high": 1.0}
    # A machine that becomes slower from round to round changes no ratio.
    assert figures["1"]["ships"] == {"point": 1.5, "low": 1.5, "high": 1.5}
    assert figures["1"]["libgomp"]["point"] == 10.0
    assert figures["2"]["ships"]["point"] == 2.5
    assert "libgomp" not in figures["2"]
    assert any("1.500" in line for line in report(samples, figures))


@pytest.mark.parametrize("wrong", [("--rounds", "1"), ("--set", "OMP"), ("--steps", "0")])
def test_wrong_options_are_refused(
    wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["busy", *wrong]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
