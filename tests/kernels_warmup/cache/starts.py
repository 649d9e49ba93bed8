"""Simulates process starts that share a cache folder, for the tests of the cache."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kernels_warmup.cache.compile_cache import CacheResult, CompileCache
from kernels_warmup.cache.key import CacheKey
from tests.support.processes import ROOT, clean_environment

KEY = CacheKey.of({"device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "setting mode": "max"})
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Starts:
    """Process starts in a row; each one closes the cache of the one before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.current: CompileCache | None = None

    def __call__(self, key: CacheKey = KEY, **bounds: int) -> tuple[CompileCache, CacheResult]:
        self.end()
        self.current = CompileCache(self.folder, key, **bounds)
        return self.current, self.current.restore()

    def end(self) -> None:
        if self.current is not None:
            self.current.close()


def working() -> Path:
    """The current working directory of the compiler."""
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def compiled(content: bytes = b"machine code", name: str = "ab/cab.so") -> None:
    """Writes a file as inductor would."""
    path = working() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """The log lines of this level and above."""
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(script, *arguments),
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=100,
        check=True,
    )


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def environment() -> dict[str, str]:
    mine = clean_environment({"TMPDIR": tempfile.gettempdir(), "OMP_NUM_THREADS": "1"})
    return {name: value for name, value in mine.items() if name not in VARIABLES}
