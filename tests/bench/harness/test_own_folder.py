"""The bench's folder with the temporary files, whose name another user can guess."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from bench import __main__
from bench.__main__ import COMMANDS
from bench.errors import BenchError
from bench.harness.device_lock import only_bench_on
from bench.harness.own_folder import code_kept, compiler_cache, own_folder

STRANGER = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that every user may write to."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv(VARIABLE, "")
    return folder


def test_it_is_this_users_alone(temporary: Path) -> None:
    assert own_folder() == temporary / f"stepspan-bench-{os.getuid()}"
    assert own_folder().stat().st_mode & 0o777 == 0o700
    assert compiler_cache().parent == own_folder()


@AS_ROOT
def test_one_that_another_user_made_is_refused(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    theirs = temporary / f"stepspan-bench-{os.getuid()}"
    theirs.mkdir()
    os.chown(theirs, STRANGER, -1)
    with pytest.raises(BenchError, match=str(theirs)):
        own_folder()
    with pytest.raises(BenchError, match=str(theirs)), code_kept():
        pass
    with pytest.raises(BenchError, match=str(theirs)), only_bench_on("cpu"):
        pass


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    own_folder().chmod(0o777)
    with pytest.raises(BenchError, match="other users"):
        own_folder()
    named = tmp_path / "named"
    named.mkdir()
    os.environ[VARIABLE] = str(named)
    assert compiler_cache() == named
    named.chmod(0o777)
    with pytest.raises(BenchError, match=str(named)):
        compiler_cache()


def test_a_command_that_compiles_does_so_in_a_folder_that_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one call compiled, the next call loads, whatever process compiled it."""
    seen: list[str] = []

    def work(_options: argparse.Namespace) -> int:
        seen.append(os.environ[VARIABLE])
        return 0

    for name in ("run", "peers"):
        monkeypatch.setattr(COMMANDS[name].load(), "run", work)
        assert __main__.main([name]) == 0
    assert seen == [str(own_folder() / "inductor")] * 2
    # Cold starts are cold.
    monkeypatch.setattr(COMMANDS["coldstart"].load(), "run", work)
    assert __main__.main(["coldstart"]) == 0
    assert seen[2] == os.environ[VARIABLE] == ""
