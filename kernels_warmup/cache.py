"""Compile artifacts kept between process starts.

Inductor's cache directory is put into one archive after a good warm-up and taken out of it before
the next: artifacts that are loaded one by one leave most of the work to do again, the directory
leaves next to none. Which settings matter and what is compiled is the caller's knowledge.

    folder/     the operator's, often a network file system, shared by runners
        nvidia-h100-80gb-hbm3-torch-2.13.0-0a1b2c3d4e5f6071.stepspan-cache
    /tmp/stepspan-inductor-x7k2q9ab/     this process's own, mode 0700: where inductor works

Each process works in a directory of its own on the local disk and touches the folder twice, with
one file that is always whole. So processes that start at once need no lock, and what one of them
leaves half-written when it is killed is never seen by another.

**Loading compiled artifacts runs code.** The folder must be as trusted as the program itself; an
archive that another user could have written is refused, see `archive`.

Inductor's artifacts may move: they are found by keys that know no path (compiled functions, C++
libraries, tuned choices), and the one list of paths that Triton keeps is written anew.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from kernels_warmup.archive import Packed, Refused, TooLarge, pack, unpack

logger = logging.getLogger(__name__)

Result = Literal["hit", "miss", "ignored", "stored", "unchanged", "skipped", "discarded"]
RESULTS: tuple[Result, ...] = get_args(Result)
"""What `restore` says (hit, miss, ignored, skipped), `store` (stored, unchanged, skipped) and
`discard` (discarded, skipped)."""

MAX_BYTES = 4 << 30
"""For all archives of a folder together, packed."""

SUFFIX = ".stepspan-cache"
WORKING_PREFIX = "stepspan-inductor-"

# What an interrupted write or a killed process left is taken away after this long.
LEFTOVER_SECONDS = 3600.0

# Locks mean something to running processes only; what is being written has a name like this; a
# precompiled header is 150 MB that speeds up compiling and is not needed to load what was compiled.
_NOT_KEPT = re.compile(r"(^|/)(locks|precompiled_headers)/|\.(lock|tmp|gch|pch)$|(^|/)tmp\.")


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What `restore`, `store` or `discard` did; it has been logged, as one line.

    Attributes:
        reason: why nothing was restored or stored, as one sentence without its full stop.
        seconds: how long it took.
        bytes: the archive's size.
        files: how many files it holds.
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


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What compiled artifacts depend on, by name; archives of other keys are left alone."""

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, parts: Mapping[str, str]) -> CacheKey:
        return cls(tuple(sorted(parts.items())))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        """The device and torch's version for whoever lists the folder, the digest for the rest."""
        parts = dict(self.parts)
        named = "-".join(filter(None, (parts.get("device"), "torch", parts.get("torch"))))
        readable = re.sub(r"[^a-z0-9.]+", "-", named.lower()).strip("-.")[:80]
        return f"{readable}-{self.digest}{SUFFIX}"


def cache_key(device: str, settings: Mapping[str, str]) -> CacheKey:
    """The key of artifacts compiled here for `device` under `settings`.

    Inductor has keys of its own for every artifact, which know all of this and more; this one says
    which archive is worth restoring, and keeps machine code from a processor it was not made for.

    Args:
        device: as torch names it: `cuda`, `cuda:0`, `cpu`.
        settings: whatever else decides what is compiled, by name; kept readable in the archive, so
            no secrets.
    """
    import torch

    place = torch.device(device)
    parts = {
        "torch": torch.__version__,
        "triton": _version("triton", "pytorch-triton"),
        "diffusers": _version("diffusers"),
        # Some of what is compiled are modules of this interpreter's binary interface, and all of
        # it is linked with this C library or an older one.
        "python": f"{sys.implementation.cache_tag} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        # On a GPU too: inductor compiles the host's part for exactly this processor.
        "instructions": f"{torch.backends.cpu.get_cpu_capability()} {_instruction_digest()}",
    }
    if place.type == "cuda":
        gpu = torch.cuda.get_device_properties(place)
        parts["device"] = gpu.name
        parts["compute capability"] = f"{gpu.major}.{gpu.minor}"
        parts["cuda"] = torch.version.cuda or torch.version.hip or "none"
    else:
        parts["device"] = _cpu_model() if place.type == "cpu" else place.type
    parts |= {f"setting {name}": value for name, value in settings.items()}
    return CacheKey.of(parts)


class CompileCache:
    """The archive of one key, and the directory this process compiles in.

    `restore` once, before anything is compiled; `store` after a good warm-up, on any thread;
    `close` when the process ends. None of them raises because of what it finds on a disk: each
    result is logged as one line, and the same complaint is never logged twice.
    """

    def __init__(self, folder: Path, key: CacheKey, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder.absolute()
        self.key = key
        self.max_bytes = max_bytes
        self.path = self.folder / key.file_name
        self._working: WorkingDirectory | None = None
        self._not_working = "nothing was restored before"
        self._restored: Mapping[str, tuple[int, int]] = {}
        self._complained: set[str] = set()

    def restore(self) -> CacheResult:
        """Point inductor at a directory of this process's own, filled from the archive if possible.

        An operator who has set TORCHINDUCTOR_CACHE_DIR keeps what is compiled himself: that
        directory is used as it is, and nothing is restored or stored.
        """
        if self._working is not None:
            raise RuntimeError("restore() is called once, before anything is compiled")
        start = time.perf_counter()
        named = operators_directory()
        if named is not None:
            self._not_working = f"TORCHINDUCTOR_CACHE_DIR is set, and {named} is used as it is"
            return self._tell(CacheResult("skipped", self._not_working), start)
        try:
            working = WorkingDirectory.create()
        except OSError as error:
            self._not_working = f"there is no directory to work in ({error.strerror})"
            return self._tell(CacheResult("ignored", self._not_working), start)
        result = self._unpack_into(working.path)
        if result.result == "ignored":
            # What was unpacked until then is not to be compiled against.
            working.empty()
        else:
            self._restored = working.files()
        working.use()
        self._working = working
        return self._tell(result, start)

    def store(self) -> CacheResult:
        """Archive the directory, if anything in it is new since `restore`.

        Takes away the folder's longest unused archives beyond `max_bytes`. An archive that alone is
        larger is not kept, nor is the one it would replace: what has piled up over many changes of
        the model is then left behind, and the next start begins anew.
        """
        start = time.perf_counter()
        if self._working is None:
            return self._tell(CacheResult("skipped", self._not_working), start)
        try:
            files = self._working.files()
            if not files:
                return self._tell(CacheResult("unchanged", "nothing was compiled"), start)
            if files == self._restored and self.path.exists():
                return self._tell(CacheResult("unchanged", "all was in the archive"), start)
            packed = self._replace_archive(self._working.path, list(files))
        except TooLarge:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            why = f"{self.path} would be larger than the {self.max_bytes / 1e6:g} MB allowed"
            return self._tell(CacheResult("skipped", why), start)
        except Refused as error:
            return self._tell(CacheResult("skipped", f"{self.path} {error}"), start)
        except OSError as error:
            return self._tell(CacheResult("skipped", _complaint(self.folder, error)), start)
        self._restored = files
        _remove_beyond(self.folder, self.max_bytes, keep=self.path)
        return self._tell(CacheResult("stored", bytes=packed.bytes, files=packed.files), start)

    def discard(self) -> CacheResult:
        """Remove the archive, where a warm-up that started from it failed: the next starts cold.

        Whatever was wrong with what it held, it would be so again.
        """
        start = time.perf_counter()
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            return self._tell(CacheResult("skipped", _complaint(self.folder, error)), start)
        return self._tell(CacheResult("discarded", f"{self.path} is removed"), start)

    def close(self) -> None:
        """Remove this process's directory; what was loaded from it stays loaded."""
        working, self._working = self._working, None
        self._not_working = "the cache is closed"
        if working is not None:
            working.remove()

    def _tell(self, result: CacheResult, start: float) -> CacheResult:
        result = replace(result, seconds=time.perf_counter() - start)
        if result.result not in ("ignored", "skipped"):
            logger.info("compile cache %s", result)
        elif result.reason not in self._complained:
            self._complained.add(result.reason)
            logger.warning("compile cache %s", result)
        return result

    def _unpack_into(self, root: Path) -> CacheResult:
        try:
            packed = unpack(self.path, dict(self.key.parts), root)
        except FileNotFoundError:
            return CacheResult("miss", f"{self.folder} holds nothing for this device and settings")
        except Refused as error:
            return CacheResult("ignored", f"{self.path} {error}")
        except OSError as error:
            return CacheResult("ignored", _complaint(self.folder, error))
        return CacheResult("hit", bytes=packed.bytes, files=packed.files)

    def _replace_archive(self, root: Path, names: list[str]) -> Packed:
        """Put a whole archive in the place of the old one, or leave that as it is."""
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


def operators_directory() -> str | None:
    """The directory that TORCHINDUCTOR_CACHE_DIR names, where an operator has set it.

    Importing torch._dynamo sets the variable to torch's own default, and a process that this one
    started inherits ours: neither is somebody's wish.
    """
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not named or Path(named).name.startswith(WORKING_PREFIX):
        return None
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return None if named == os.path.abspath(default_cache_dir()) else named


class WorkingDirectory:
    """A directory of this process's own on the local disk, for inductor and triton to work in.

    Its name cannot be guessed and nobody else may enter it: whoever can write there runs code here.
    A lock held as long as the process lives tells it from one whose process was killed.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._process = os.getpid()
        self._environment: dict[str, str | None] = {}

    @classmethod
    def create(cls) -> WorkingDirectory:
        """Make one, and take away those of processes that are gone."""
        parent = Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        path = Path(tempfile.mkdtemp(prefix=WORKING_PREFIX, dir=parent))
        # Locked before it gets its name, so that nobody finds it unlocked.
        lock = os.open(path / ".new.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (path / ".new.lock").rename(path / ".lock")
        directory = cls(path, lock)
        atexit.register(directory.remove)
        return directory

    def use(self) -> None:
        """Point inductor and triton here; they read the environment when they compile."""
        # Inductor would choose the same for triton, but only at its own first kernel: one of ours,
        # launched before, would be kept in the home directory. An operator's choice stands, but
        # not one inherited from a parent that is a process like this one.
        wanted = {"TORCHINDUCTOR_CACHE_DIR": self.path}
        if WORKING_PREFIX in os.environ.get("TRITON_CACHE_DIR", WORKING_PREFIX):
            wanted["TRITON_CACHE_DIR"] = self.path / "triton" / "0"
        for name, path in wanted.items():
            self._environment[name] = os.environ.get(name)
            os.environ[name] = str(path)

    def files(self) -> dict[str, tuple[int, int]]:
        """What is worth keeping: relative path -> (bytes, modification in Unix nanoseconds)."""
        found = {}
        for directory, _, names in os.walk(self.path):
            for name in names:
                path = Path(directory, name)
                relative = path.relative_to(self.path).as_posix()
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and not _NOT_KEPT.search(relative):
                    found[relative] = (status.st_size, status.st_mtime_ns)
        return found

    def empty(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != ".lock":
                path.unlink()

    def remove(self) -> None:
        """Take it away and put the environment back; does nothing in a forked child."""
        if os.getpid() != self._process:
            return
        atexit.unregister(self.remove)
        for name, before in self._environment.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
        self._environment.clear()
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_beyond(folder: Path, max_bytes: int, keep: Path) -> None:
    """Remove the longest unused archives until the rest is within the bound; never `keep`."""
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
    """Remove what writes that were interrupted long ago have left."""
    for path in folder.glob(f".*{SUFFIX}.*.tmp"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > LEFTOVER_SECONDS:
                path.unlink(missing_ok=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove the working directories of this user's processes that are gone."""
    for path in parent.glob(f"{WORKING_PREFIX}*"):
        with suppress(OSError):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            try:
                lock = os.open(path / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                # Just being made, or its process was killed at that very moment.
                if time.time() - status.st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _sync_directory(folder: Path) -> None:
    with suppress(OSError):  # not every network file system can
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _complaint(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder} is full"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{folder} does not let this user read and write"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{folder} is not a directory"
    return f"{folder} fails: {error.strerror or type(error).__name__}"


def _version(*names: str) -> str:
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


def _cpu_info(*names: str) -> str:
    """The first processor's line of one of these names in Linux's own description, or nothing."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _instruction_digest() -> str:
    """Tells apart processors for which a compiler would choose other instructions.

    Only what compilers choose by themselves: the other flags come and go with the kernel's version.
    """
    flags = re.findall(
        r"\b(?:s?sse|avx|fma|f16c|bmi|abm|movbe|popcnt|vaes|gfni|amx|asimd|sve|sme|i8mm|bf16)\w*",
        _cpu_info("flags", "Features"),
    )
    return hashlib.sha256(" ".join(sorted(set(flags))).encode()).hexdigest()[:8]
