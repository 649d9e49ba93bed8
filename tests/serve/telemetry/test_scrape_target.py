"""A replica's own metrics port, and the file by which Prometheus finds it."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from serve.errors import ConfigurationError
from serve.telemetry.scrape_target import ScrapeTarget


def test_the_file_names_a_port_that_serves_the_registry(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    Gauge("answer", "", registry=registry).set(42)
    folder = tmp_path / "targets"
    target = ScrapeTarget("127.0.0.1", 0, folder, "one", registry)
    try:
        (file,) = folder.iterdir()
        (group,) = json.loads(file.read_text())
        assert group == {"targets": [target.address], "labels": {"replica": "one"}}
        with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=10) as answer:
            assert b"answer 42.0" in answer.read()
    finally:
        target.close()
    assert not list(folder.iterdir())
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(tuple(target.address.rsplit(":", 1)), timeout=5)


def test_only_files_of_ended_processes_of_this_host_are_removed(tmp_path: Path) -> None:
    host = socket.gethostname()
    names = [f"{host}-{2**22 + 1}.json", f"{host}-{os.getppid()}.json", f"other-{2**22 + 1}.json"]
    for name in names:
        (tmp_path / name).write_text("[]")
    target = ScrapeTarget("127.0.0.1", 0, tmp_path, "one", CollectorRegistry())
    target.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=str(port)):
            ScrapeTarget("127.0.0.1", port, None, "one", CollectorRegistry())
