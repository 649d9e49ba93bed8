"""`bench streams`: the ratios, what is refused, and a short run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.service.streams import Samples, report, summarise


def test_ratios_compare_requests_of_one_round() -> None:
    samples = Samples(
        steps=20,
        model="demo",
        run_ms={
            "plain": [100.0, 200.0, 400.0],
            "stream": [101.0, 202.0, 404.0],
            "previews": [111.1, 222.2, 444.4],
        },
        late_ms=[1.0] * 98 + [30.0, 60.0],
        late_previews_ms=[2.0],
        alone_ms=[100.0, 200.0, 400.0],
        beside_streams_ms=[103.0, 206.0, 412.0],
    )
    figures = summarise(samples)
    assert figures["stream_to_plain"]["point"] == pytest.approx(1.01)
    assert figures["previews_to_stream"]["high"] == pytest.approx(1.1)
    assert figures["waiting_streams"]["low"] == pytest.approx(1.03)
    assert figures["step_event_ms"] == {"p50": 1.0, "p99": 60.0, "max": 60.0}
    assert any("1.0300" in line for line in report(samples, figures))


@pytest.mark.parametrize("wrong", [("--rounds", "1"), ("--steps", "0")])
def test_wrong_options_are_refused(
    wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["streams", *wrong]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    out = tmp_path / "streams.json"
    assert main(["streams", "--rounds", "2", "--steps", "4", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert len(written["late_ms"]) == 8
    assert len(written["beside_streams_ms"]) == len(written["alone_ms"]) == 2
    assert all(late > 0 for late in written["late_ms"])
