"""`python -m bench load` against the service: its clients' latencies agree with its histogram."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from tests.e2e.conftest import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_the_service_is_measured_and_its_histogram_agrees(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    status = main(
        [
            "load", "--url", server.process.url, "--metrics-url", server.process.metrics_url,
            "--rate", "1", "--seconds", "4", "--steps", "1=3", "2", "--out", str(out),
        ]
    )  # fmt: skip
    result = json.loads(out.read_text())
    (level,) = result["levels"]
    assert level["sent"] > 0
    assert level["ok"] + sum(level["refused"].values()) == level["sent"]
    # One request may wait; the server may refuse others.
    assert set(level["refused"]) <= {"429"}
    assert result["server"]["server_count"] == result["server"]["client_count"] == level["ok"]
    assert result["server_agrees"] is True
    # The clients' time beyond the server's: the connection, and the last bytes.
    assert result["server"]["mean_overhead_ms"] > 0
    assert status == 0
