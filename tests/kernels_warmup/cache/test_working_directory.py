from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from kernels_warmup.cache.working_directory import (
    LEFTOVER_SECONDS,
    WORKING_PREFIX,
    WorkingDirectory,
    operators_directory,
)
from tests.kernels_warmup.cache.starts import (
    VARIABLES,
    Starts,
    lines,
    run,
    working,
)
from tests.support.mounts import UNSHARED, needs_mounts
from tests.support.processes import ROOT, clean_environment


def test_the_working_directory_is_private_and_goes_with_the_process(start: Starts) -> None:
    cache, _ = start()
    path = working()
    assert path.parent == Path(tempfile.gettempdir())
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_uid == os.geteuid()
    assert os.environ["TRITON_CACHE_DIR"] == f"{path}/triton/0"
    with pytest.raises(RuntimeError, match="once"):
        cache.restore()
    cache.close()
    cache.close()
    assert not path.exists()
    assert not set(VARIABLES) & set(os.environ)
    assert cache.store().result == "skipped"


def test_the_environment_is_put_back(start: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setenv("TRITON_CACHE_DIR", "/the/operators")
    start()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != default_cache_dir()
    assert os.environ["TRITON_CACHE_DIR"] == "/the/operators"
    start.end()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()
    assert os.environ["TRITON_CACHE_DIR"] == "/the/operators"


def test_an_operators_directory_is_used_as_it_is(
    start: Starts,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "theirs"))
    cache, restored = start()
    assert restored.result == "skipped"
    assert str(tmp_path / "theirs") in restored.reason
    assert cache.store().result == "skipped"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "theirs")
    assert "TRITON_CACHE_DIR" not in os.environ
    assert len(lines(caplog)) == 1
    assert not folder.exists()
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_neither_torchs_default_nor_a_parents_directory_counts_as_an_operators(
    start: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    assert operators_directory() is None
    inherited = working()
    child = WorkingDirectory.create()
    child.use()
    assert working() == child.path != inherited
    assert os.environ["TRITON_CACHE_DIR"] == f"{child.path}/triton/0"
    child.remove()
    assert working() == inherited
    for value in ("", torch._inductor.runtime.cache_dir_utils.default_cache_dir()):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", value)
        assert operators_directory() is None


def test_without_a_directory_to_work_in_a_start_goes_on(
    start: Starts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    cache, restored = start()
    assert restored.result == "ignored"
    assert cache.store().result == "skipped"
    assert not set(VARIABLES) & set(os.environ)
    assert len(lines(caplog)) == 1


WHERE = """
import os
from kernels_warmup.cache.working_directory import use_trusted_folders
use_trusted_folders()
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@needs_mounts
@pytest.mark.parametrize(
    ("options", "own", "used"),
    [
        ("exec", "own", "temporary"),
        ("noexec", "own", "own"),
        ("noexec", "file", "temporary"),
        ("noexec", "temporary/own", "temporary"),
    ],
)
def test_code_is_compiled_where_it_can_be_loaded(
    tmp_path: Path, options: str, own: str, used: str
) -> None:
    """Without such a folder it is said, and a service that compiles nothing can still start."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "file").touch()
    mount = f"mount -t tmpfs -o mode=0700,{options} tmpfs {tmp_path / 'temporary'}"
    done = subprocess.run(
        [*UNSHARED, "sh", "-ec", f'{mount}; exec {sys.executable} -c "$1"', "sh", WHERE],
        env=clean_environment()
        | {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(tmp_path / "temporary"),
            "XDG_CACHE_HOME": str(tmp_path / own),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / used)
    unusable = used == "temporary" and options == "noexec"
    assert (str(tmp_path / "temporary") in done.stderr) == unusable


FORKED = """
import os, sys
from pathlib import Path
from kernels_warmup.cache.compile_cache import CompileCache
from kernels_warmup.cache.key import CacheKey
cache = CompileCache(Path(sys.argv[1]), CacheKey.of({"device": "cpu"}))
cache.restore()
work = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
child = os.fork()
if child == 0:
    cache.close()
    sys.exit()  # with the exit handlers that it inherited
os.waitpid(child, 0)
print(work.is_dir(), work)
"""


@pytest.mark.e2e
def test_the_directory_goes_when_its_process_exits_and_not_a_child_of_it(folder: Path) -> None:
    there, path = run(FORKED, folder).stdout.split()
    assert there == "True"
    assert not Path(path).exists()


def test_a_directory_that_never_got_its_lock_goes_after_a_while(start: Starts) -> None:
    local = Path(tempfile.gettempdir())
    fresh, old = (local / f"{WORKING_PREFIX}{name}" for name in ("fresh", "old"))
    for path in (fresh, old):
        path.mkdir()
        (path / "half").write_bytes(b"x")
    long_ago = time.time() - LEFTOVER_SECONDS - 1
    os.utime(old, (long_ago, long_ago))
    (local / f"{WORKING_PREFIX}link").symlink_to(fresh)
    start()
    assert fresh.exists()
    assert not old.exists()
