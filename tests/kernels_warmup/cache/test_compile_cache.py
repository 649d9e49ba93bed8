"""Restoring, storing and discarding archives, one process after the other."""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from kernels_warmup.cache import compile_cache
from kernels_warmup.cache.compile_cache import RESULTS
from kernels_warmup.cache.key import CacheKey
from tests.kernels_warmup.cache.starts import (
    KEY,
    Starts,
    compiled,
    lines,
    names,
    run,
    working,
)

# One process after the other.


def test_a_start_finds_what_the_one_before_compiled(
    start: Starts, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, restored = start()
    assert restored.result == "miss"
    assert list(folder.iterdir()) == []  # made at once, to find out at once if it cannot be
    compiled()
    first = working()
    stored = cache.store()
    assert (stored.result, stored.files) == ("stored", 1)
    assert stored.bytes == cache.path.stat().st_size

    cache, restored = start()
    assert (restored.result, restored.files, restored.bytes) == ("hit", 1, stored.bytes)
    assert working() != first
    assert (working() / "ab/cab.so").read_bytes() == b"machine code"
    assert cache.store().result == "unchanged"
    assert lines(caplog) == []
    said = [line.split(":")[0] for line in lines(caplog, logging.INFO)]
    assert said == [f"compile cache {result}" for result in ("miss", "stored", "hit", "unchanged")]


def test_only_a_start_that_compiled_something_stores(start: Starts) -> None:
    cache, _ = start()
    assert cache.store().result == "unchanged"  # compiled nothing at all
    assert not cache.path.exists()
    compiled()
    assert cache.store().result == "stored"
    assert cache.store().result == "unchanged"

    cache, _ = start()
    compiled(b"another choice", "ab/best_config")
    assert cache.store().files == 2
    cache, restored = start()
    assert restored.files == 2
    compiled(b"another choic!", "ab/best_config")  # of the same size
    assert cache.store().result == "stored"

    cache, _ = start()
    cache.path.unlink()  # by another process that needed the room
    assert cache.store().result == "stored"


def test_what_only_a_running_process_needs_is_left_out(start: Starts) -> None:
    cache, _ = start()
    compiled()
    for name in (
        "locks/cab.lock",
        "precompiled_headers/c1.h.gch",
        "deep/c2.h.pch",
        "ab/.123.456.tmp",
        "triton/0/tmp.pid_7_f00/k.cubin",
    ):
        compiled(b"x", name)
    (working() / "link.so").symlink_to(working() / "ab/cab.so")
    assert cache.store().files == 1
    start()
    found = {p.relative_to(working()).as_posix() for p in working().rglob("*") if p.is_file()}
    assert found == {"ab/cab.so", ".lock"}


def test_archives_of_other_keys_stay(start: Starts, folder: Path) -> None:
    other = CacheKey.of(dict(KEY.parts) | {"device": "NVIDIA A100-SXM4-80GB"})
    for key in (KEY, other):
        cache, restored = start(key)
        assert restored.result == "miss"
        compiled(key.digest.encode())
        assert cache.store().result == "stored"
    for key in (KEY, other):
        assert start(key)[1].result == "hit"
        assert (working() / "ab/cab.so").read_bytes() == key.digest.encode()
    assert names(folder) == sorted([KEY.file_name, other.file_name])


def test_a_discarded_archive_is_not_found_again(start: Starts, folder: Path) -> None:
    cache, _ = start()
    compiled()
    cache.store()
    cache, _ = start()
    assert cache.discard().result == "discarded"
    assert cache.discard().result == "unchanged"
    assert names(folder) == []
    assert start()[1].result == "miss"


def test_only_what_a_process_loaded_is_discarded(start: Starts, folder: Path) -> None:
    broken, restored = start()
    assert restored.result == "miss"
    good, _ = start()
    compiled()
    assert good.store().result == "stored"
    assert broken.discard().result == "unchanged"
    assert names(folder) == [KEY.file_name]

    broken, restored = start()
    assert restored.result == "hit"
    good, _ = start()
    compiled(b"other code")
    assert good.store().result == "stored"
    assert broken.discard().result == "unchanged"
    assert names(folder) == [KEY.file_name]


def test_an_archive_that_cannot_be_discarded_is_said(
    start: Starts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = start()
    compiled()
    cache.store()
    cache, _ = start()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", fail)
    discarded = cache.discard()
    assert discarded.result == "skipped"
    assert discarded.reason == f"{folder} does not let this user read and write"


def test_a_python_without_xz_starts_too(
    start: Starts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lzma", None)  # makes its import fail
    cache, restored = start()
    assert restored.result == "ignored"
    compiled()
    stored = cache.store()
    assert stored.result == "skipped"
    assert stored.reason == f"{cache.path} needs xz, which this Python was built without"
    assert names(folder) == []


def test_results_are_a_closed_set() -> None:
    assert set(RESULTS) == {
        "hit", "miss", "ignored", "stored", "unchanged", "skipped", "discarded",
    }  # fmt: skip


# Faults of an archive.


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "format", "open"])
def test_an_archive_that_is_not_to_be_used_costs_one_line_and_is_replaced(
    start: Starts, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache, _ = start()
    compiled()
    cache.store()
    whole = cache.path.read_bytes()
    key = KEY
    if damage == "cut":
        cache.path.write_bytes(whole[:-1])
    elif damage == "flipped":
        cache.path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "format":
        cache.path.write_bytes(whole.replace(b'"format": 1', b'"format": 2', 1))
    elif damage == "open":
        cache.path.chmod(0o666)
    else:
        key = CacheKey.of(dict(KEY.parts) | {"device": "NVIDIA A100"})
        cache.path.rename(cache.path.with_name(key.file_name))

    cache, restored = start(key)
    assert restored.result == "ignored"
    assert lines(caplog) == [f"compile cache ignored: {restored.reason}"]
    assert str(cache.path) in restored.reason
    assert [path.name for path in working().iterdir()] == [".lock"]
    compiled()
    assert cache.store().result == "stored"
    assert start(key)[1].result == "hit"


def test_what_was_unpacked_before_the_fault_is_taken_away(
    start: Starts, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = start()
    compiled(b"1", "a.py")
    compiled(b"2", "b/c.py")
    cache.store()
    opened = []

    def full(path: Any, flags: int, mode: int = 0o777, **kwargs: Any) -> int:
        if flags & os.O_EXCL and str(path).endswith(".py"):
            opened.append(path)
            if len(opened) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, flags, mode, **kwargs)

    real = os.open
    monkeypatch.setattr(os, "open", full)
    _, restored = start()
    assert restored.result == "ignored"
    assert "cannot be unpacked" in restored.reason
    assert "No space left" in restored.reason
    assert len(opened) == 2
    assert [path.name for path in working().iterdir()] == [".lock"]
    assert len(lines(caplog)) == 1


# Faults of the folder.


def test_a_file_in_the_folders_place_is_said_once(
    start: Starts, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir()
    folder.write_text("not a folder")
    cache, restored = start()
    compiled()
    stored = cache.store()
    assert (restored.result, stored.result) == ("ignored", "skipped")
    assert restored.reason == stored.reason == f"{folder} is not a directory"
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (errno.EROFS, "does not let this user read and write"),
        (errno.EACCES, "does not let this user read and write"),
        (errno.ENOSPC, "is full"),
        (errno.EDQUOT, "is full"),
        (errno.EIO, "fails: Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "rename"])
def test_a_folder_that_cannot_be_written_is_said_once(
    start: Starts,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: int,
    complaint: str,
) -> None:
    cache, _ = start()
    compiled()
    if call != "mkdir":
        cache.store()
        before = cache.path.read_bytes()
        cache, _ = start()
        compiled(b"new", "new.so")

    def fail(*_: object, **__: object) -> Any:
        raise OSError(error, os.strerror(error))

    owner, name = {
        "mkdir": (Path, "mkdir"),
        "open": (tempfile, "mkstemp"),
        "write": (compile_cache, "pack"),
        "fsync": (os, "fsync"),
        "rename": (Path, "replace"),
    }[call]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        for _ in range(2):
            stored = cache.store()
            assert stored.result == "skipped"
            assert stored.reason == f"{folder} {complaint}"
    assert len(lines(caplog)) == 1
    if call != "mkdir":
        # The old archive is still there, and no half-written file.
        assert names(folder) == [cache.path.name]
        assert cache.path.read_bytes() == before
    assert cache.store().result == "stored"


@pytest.mark.parametrize("kind", ["nothing can be made there", "another user's"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_compiled(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("/proc/stepspan") if kind != "another user's" else tmp_path / "theirs"
    if kind == "another user's":
        folder.mkdir()

        def refuse(**_: object) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    starts = Starts(folder)
    cache, restored = starts()
    assert restored.result == "miss"
    (warning,) = lines(caplog)
    assert str(folder) in warning
    compiled()
    assert cache.store().result == ("skipped" if kind != "another user's" else "stored")
    assert len(lines(caplog)) == 1
    starts.end()


@pytest.mark.e2e
def test_a_disk_that_is_really_full(folder: Path) -> None:
    """The kernel limits the size of this process's files; a write exceeds it midway."""
    script = """
import os, random, resource, signal, sys
from pathlib import Path
from kernels_warmup.cache.compile_cache import CompileCache
from kernels_warmup.cache.key import CacheKey
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = CompileCache(Path(sys.argv[1]), CacheKey.of({"device": "cpu"}))
cache.restore()
work = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
(work / "large.so").write_bytes(random.Random(0).randbytes(400_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
print(cache.store())
"""
    done = run(script, folder)
    assert done.stdout.strip() == f"skipped: {folder} fails: File too large"
    assert done.stderr.count("\n") == 1  # the log line, on stderr without a configured handler
    assert names(folder) == []


def test_a_folder_that_cannot_be_read_is_ignored(
    start: Starts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = start()
    compiled()
    cache.store()
    real = os.open

    def deny(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path) == cache.path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", deny)
    _, restored = start()
    assert restored.result == "ignored"
    assert restored.reason == f"{folder} does not let this user read and write"


# Bounds.


def other_key(number: int) -> CacheKey:
    return CacheKey.of(dict(KEY.parts) | {"setting number": str(number)})


def test_the_longest_unused_archives_go_first(start: Starts, folder: Path) -> None:
    content = os.urandom(20_000)  # each archive a little larger than this
    for number in range(3):
        cache, _ = start(other_key(number))
        compiled(content)
        cache.store()
        os.utime(cache.path, (number + 1, number + 1))
    (folder / "notes.txt").write_bytes(content * 10)
    start(other_key(0))  # used again, so number 1 is now the oldest
    cache, _ = start(KEY, max_bytes=65_000)
    compiled(content)
    assert cache.store().result == "stored"
    kept = {other_key(0).file_name, other_key(2).file_name, KEY.file_name, "notes.txt"}
    assert set(names(folder)) == kept

    # The archive just written stays, even if another has a later time.
    ahead = time.time() + 1000
    os.utime(folder / other_key(2).file_name, (ahead, ahead))
    cache, _ = start(other_key(9), max_bytes=25_000)
    compiled(content)
    cache.store()
    assert set(names(folder)) == {other_key(9).file_name, "notes.txt"}


def test_an_archive_over_the_bound_is_not_kept_nor_the_one_before(
    start: Starts, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, _ = start(max_bytes=50_000)
    compiled(os.urandom(30_000), "before.so")
    assert cache.store().result == "stored"
    neighbour = folder / other_key(1).file_name
    neighbour.write_bytes(b"somebody's")

    cache, restored = start(max_bytes=50_000)
    assert restored.result == "hit"
    compiled(os.urandom(30_000), "after.so")
    stored = cache.store()
    assert stored.result == "skipped"
    assert stored.reason == f"{cache.path} would be larger than the 0.05 MB allowed"
    cache.store()
    assert len(lines(caplog)) == 1
    assert names(folder) == [neighbour.name]

    # The next start is cold, and its artifacts fit.
    cache, restored = start(max_bytes=50_000)
    assert restored.result == "miss"
    compiled(os.urandom(30_000), "after.so")
    assert cache.store().result == "stored"
