"""The local directory in which inductor and Triton compile, private to one process."""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

WORKING_PREFIX = "stepspan-inductor-"

LEFTOVER_SECONDS = 3600.0
"""What an interrupted write or a killed process left is removed after this long."""

# Locks matter to running processes only; files being written have names like these; a precompiled
# header is 150 MB that speeds up compiling and is not needed to load what was compiled.
_NOT_KEPT = re.compile(r"(^|/)(locks|precompiled_headers)/|\.(lock|tmp|gch|pch)$|(^|/)tmp\.")


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
