from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels_warmup.cache.starts import (
    VARIABLES,
    Starts,
)


@pytest.fixture(autouse=True)
def _own_environment(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("local")))
    caplog.set_level(logging.INFO, "kernels_warmup.cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shared" / "folder"


@pytest.fixture
def start(folder: Path) -> Iterator[Starts]:
    starts = Starts(folder)
    yield starts
    starts.end()
