"""Restores compiled artifacts at the start of a process and stores them after its warm-up."""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from kernels_warmup.cache.archive import Packed, Refused, TooLarge, pack, unpack
from kernels_warmup.cache.key import SUFFIX, CacheKey
from kernels_warmup.cache.trust import UntrustedFolder
from kernels_warmup.cache.working_directory import (
    LEFTOVER_SECONDS,
    WorkingDirectory,
    operators_directory,
)

logger = logging.getLogger(__name__)

Result = Literal["hit", "miss", "ignored", "stored", "unchanged", "skipped", "discarded"]
RESULTS: tuple[Result, ...] = get_args(Result)
"""Of `restore`: hit, miss, ignored, skipped. Of `store`: stored, unchanged, skipped. Of `discard`:
discarded, unchanged, skipped."""

MAX_BYTES = 4 << 30
"""The largest size of all archives in a folder together."""


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What `restore`, `store` or `discard` did. It has been logged already, as one line.

    Attributes:
        reason: why nothing was restored or stored, as one sentence without its full stop.
        seconds: how long it took.
        bytes: the archive's size.
        files: the number of files in the archive.
    """

    result: Result
    reason: str = ""
    seconds: float = 0.0
    bytes: int = 0
    files: int = 0

    def __str__(self) -> str:
        if self.reason:
            return f"{self.result}: {self.reason}"
        size = f"{self.files} files, {self.bytes / 1e6:.1f} MB"
        return f"{self.result}: {size}, {self.seconds:.2f} s"


class CompileCache:
    """The archive of one key, and the directory in which this process compiles.

    Call `restore` once, before anything is compiled, `store` after a good warm-up, on any thread,
    and `close` when the process ends. None of them raises because of the state of a disk. Each
    result is logged as one line, and the same problem is logged only once.
    """

    def __init__(self, folder: Path, key: CacheKey, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder.absolute()
        self.key = key
        self.max_bytes = max_bytes
        self.path = self.folder / key.file_name
        self._working: WorkingDirectory | None = None
        self._no_directory = "nothing was restored before"
        self._restored: Mapping[str, tuple[int, int]] = {}
        self._restored_from: tuple[int, int] | None = None
        """Device and inode of the archive whose artifacts this process has loaded."""
        self._logged_reasons: set[str] = set()

    def restore(self) -> CacheResult:
        """Point inductor at a private directory, filled from the archive if there is one.

        If an operator has set TORCHINDUCTOR_CACHE_DIR, that directory is used as it is, and nothing
        is restored or stored.
        """
        if self._working is not None:
            raise RuntimeError("restore() is called once, before anything is compiled")
        start = time.perf_counter()
        named = operators_directory()
        if named is not None:
            self._no_directory = f"TORCHINDUCTOR_CACHE_DIR is set, and {named} is used as it is"
            return self._logged(CacheResult("skipped", self._no_directory), start)
        try:
            working = WorkingDirectory.create()
        except (OSError, UntrustedFolder) as error:
            why = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
            self._no_directory = f"no working directory could be created ({why})"
            return self._logged(CacheResult("ignored", self._no_directory), start)
        result = self._unpack_into(working.path)
        if result.result == "ignored":
            # Some files may have been unpacked before the fault; nothing may be built on them.
            working.empty()
        else:
            self._restored = working.files()
        working.use()
        self._working = working
        if result.result == "miss":
            self._say_if_not_writable(start)
        return self._logged(result, start)

    def store(self) -> CacheResult:
        """Archive the directory if anything in it is new since `restore`.

        If the folder then holds more than `max_bytes`, the archives that were not used for longest
        are removed. If the new archive alone is larger, neither it nor the one it would replace is
        kept: artifacts have piled up over many changes of the model, and the next start is cold.
        """
        start = time.perf_counter()
        if self._working is None:
            return self._logged(CacheResult("skipped", self._no_directory), start)
        try:
            files = self._working.files()
            if not files:
                return self._logged(CacheResult("unchanged", "nothing was compiled"), start)
            if files == self._restored and self.path.exists():
                return self._logged(CacheResult("unchanged", "the archive is up to date"), start)
            packed = self._replace_archive(self._working.path, list(files))
        except TooLarge:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            why = f"{self.path} would be larger than the {self.max_bytes / 1e6:g} MB allowed"
            return self._logged(CacheResult("skipped", why), start)
        except Refused as error:
            return self._logged(CacheResult("skipped", f"{self.path} {error}"), start)
        except OSError as error:
            return self._logged(CacheResult("skipped", _describe(self.folder, error)), start)
        self._restored = files
        _remove_beyond(self.folder, self.max_bytes, keep=self.path)
        return self._logged(CacheResult("stored", bytes=packed.bytes, files=packed.files), start)

    def discard(self) -> CacheResult:
        """Remove the archive that was restored, so that the next start is cold.

        For a warm-up that failed after `restore`: with the same artifacts it would fail again. An
        archive that another process has stored since is kept: one broken machine must not make
        every other start cold.
        """
        start = time.perf_counter()
        try:
            if self._restored_from is None or self._restored_from != _identity(self.path):
                why = f"{self.path} is not what this process loaded from"
                return self._logged(CacheResult("unchanged", why), start)
            self.path.unlink(missing_ok=True)
        except OSError as error:
            return self._logged(CacheResult("skipped", _describe(self.folder, error)), start)
        return self._logged(CacheResult("discarded", f"{self.path} is removed"), start)

    def close(self) -> None:
        """Remove this process's directory; code that was loaded from it stays loaded."""
        working, self._working = self._working, None
        self._no_directory = "the cache is closed"
        if working is not None:
            working.remove()

    def _logged(self, result: CacheResult, start: float) -> CacheResult:
        result = replace(result, seconds=time.perf_counter() - start)
        if result.result not in ("ignored", "skipped"):
            logger.info("compile cache %s", result)
        elif result.reason not in self._logged_reasons:
            self._logged_reasons.add(result.reason)
            logger.warning("compile cache %s", result)
        return result

    def _say_if_not_writable(self, start: float) -> None:
        """Warn now, and not after minutes of compiling, if nothing can be stored."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            self._logged(CacheResult("skipped", _describe(self.folder, error)), start)

    def _unpack_into(self, root: Path) -> CacheResult:
        try:
            archive = _identity(self.path)
            packed = unpack(self.path, dict(self.key.parts), root)
        except FileNotFoundError:
            return CacheResult(
                "miss", f"{self.folder} has no archive for this device and these settings"
            )
        except Refused as error:
            return CacheResult("ignored", f"{self.path} {error}")
        except OSError as error:
            return CacheResult("ignored", _describe(self.folder, error))
        self._restored_from = archive
        return CacheResult("hit", bytes=packed.bytes, files=packed.files)

    def _replace_archive(self, root: Path, names: list[str]) -> Packed:
        """Replace the old archive by a new, complete one, or leave the old one as it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.folder)
        descriptor, name = tempfile.mkstemp(
            dir=self.folder, prefix=f".{self.path.name}.", suffix=".tmp"
        )
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as archive:
                packed = pack(archive, dict(self.key.parts), root, names, self.max_bytes)
            temporary.replace(self.path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_directory(self.folder)
        return packed


def _remove_beyond(folder: Path, max_bytes: int, keep: Path) -> None:
    """Remove the archives that were not used for longest until the rest fits; never `keep`."""
    archives = []
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):  # another process may be removing it too
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                archives.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in archives)
    for _, size, path in sorted(archives):
        if total <= max_bytes:
            return
        if path != keep:
            with suppress(OSError):
                path.unlink(missing_ok=True)
                total -= size


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writes that were interrupted long ago."""
    for path in folder.glob(f".*{SUFFIX}.*.tmp"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > LEFTOVER_SECONDS:
                path.unlink(missing_ok=True)


def _sync_directory(folder: Path) -> None:
    with suppress(OSError):  # not every network file system can
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file this is, whatever it is called; None: there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _describe(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder} is full"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{folder} does not let this user read and write"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{folder} is not a directory"
    return f"{folder} fails: {error.strerror or type(error).__name__}"
