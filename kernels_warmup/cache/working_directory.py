"""The local directory in which inductor and Triton compile, private to one process."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from kernels_warmup.cache.trust import UntrustedFolder, require_trusted, require_trusted_parent

logger = logging.getLogger(__name__)

WORKING_PREFIX = "stepspan-inductor-"

LEFTOVER_SECONDS = 3600.0
"""The leftovers of interrupted writes and killed processes are removed after this time."""

# Locks matter to running processes only; files being written have names like these; a precompiled
# header is 150 MB that speeds up compiling and is not needed to load what was compiled.
_NOT_KEPT = re.compile(r"(^|/)(locks|precompiled_headers)/|\.(lock|tmp|gch|pch)$|(^|/)tmp\.")


def operators_directory() -> str | None:
    """The directory in TORCHINDUCTOR_CACHE_DIR, if an operator has set it; otherwise None.

    Two values are not an operator's: torch's own default, which importing torch._dynamo sets, and
    the working directory of a parent process, which its children inherit.
    """
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not named or Path(named).name.startswith(WORKING_PREFIX):
        return None
    # As `default_cache_dir` of torch._inductor.runtime.cache_dir_utils has it; importing that takes
    # seconds. Another user's default is no operator's choice either.
    in_temp = Path(named).parent == Path(tempfile.gettempdir()).absolute()
    return None if in_temp and Path(named).name.startswith("torchinductor_") else named


CODE_FOLDERS = {
    "TRITON_CACHE_DIR": "triton/0",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "PYTORCH_KERNEL_CACHE_PATH": "torch_kernels",
    "CUDA_CACHE_PATH": "cuda",
}
"""The other variables that name folders of compiled code, and where they are below inductor's."""


def use_trusted_folders() -> None:
    """Point everything that loads compiled code to folders that no other user can write to.

    Call it before anything is compiled. Folders that an operator has named are used if they can be
    trusted. The others are in a directory that is private to this process and goes with it.

    Raises:
        UntrustedFolder: another user could have written what would be loaded from a folder.
    """
    named = operators_directory()
    if named is None:
        root = _process_directory()
    else:
        root = Path(named)
        require_trusted(root)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root)
    for name, below in CODE_FOLDERS.items():
        value = os.environ.get(name)
        if value and WORKING_PREFIX not in value:
            require_trusted(Path(value))
            continue
        (root / below).mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ[name] = str(root / below)
    if os.environ.get("TRITON_KERNEL_OVERRIDE") and (
        value := os.environ.get("TRITON_OVERRIDE_DIR")
    ):
        require_trusted(Path(value))


def remove_process_directory() -> None:
    """Remove this process's private directory: for an end without exit handlers (`os._exit`)."""
    if _directory is not None:
        _directory.remove()


def _process_directory() -> Path:
    """The private directory of this process, which is made at the first call."""
    global _directory
    if _directory is None or not _directory.is_this_processes():
        try:
            _directory = WorkingDirectory.create()
        except OSError as error:
            # None: none of the folders for temporary files can be written.
            where = f"in {tempfile.tempdir}" if tempfile.tempdir else "anywhere"
            raise UntrustedFolder(
                f"no private folder for compiled code can be made {where} "
                f"({error.strerror}): set TMPDIR to a folder that can be written."
            ) from None
    return _directory.path


class WorkingDirectory:
    """A local directory, private to this process, in which inductor and Triton compile.

    Its name cannot be guessed and no other user may enter it, because another writer could run code
    in this process. The process holds a lock in it, so the directory of a killed process
    can be recognised.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._process = os.getpid()
        self._environment: dict[str, str | None] = {}

    @classmethod
    def create(cls) -> WorkingDirectory:
        """Create one, and remove those of processes that have ended."""
        parent = _trusted_parent()
        _remove_abandoned(parent)
        path = Path(tempfile.mkdtemp(prefix=WORKING_PREFIX, dir=parent))
        # Locked before the file gets its name, so that no process finds it unlocked.
        lock = os.open(path / ".new.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (path / ".new.lock").rename(path / ".lock")
        directory = cls(path, lock)
        atexit.register(directory.remove)
        return directory

    def is_this_processes(self) -> bool:
        """Whether it is there and this process made it: a forked child has its parent's object."""
        return self._process == os.getpid() and self.path.is_dir()

    def use(self) -> None:
        """Point inductor and Triton here; they read the environment when they compile."""
        # Inductor sets the same directory for Triton, but only at its own first kernel; a kernel of
        # ours that runs earlier would be stored in the home directory. An operator's choice is
        # kept, but not a value inherited from a parent process like this one.
        wanted = {"TORCHINDUCTOR_CACHE_DIR": self.path}
        if WORKING_PREFIX in os.environ.get("TRITON_CACHE_DIR", WORKING_PREFIX):
            wanted["TRITON_CACHE_DIR"] = self.path / "triton" / "0"
        for name, path in wanted.items():
            self._environment[name] = os.environ.get(name)
            os.environ[name] = str(path)

    def files(self) -> dict[str, tuple[int, int]]:
        """The files worth keeping: relative path -> (bytes, modification time in Unix ns)."""
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
        """Remove everything in it but the lock."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != ".lock":
                path.unlink()

    def remove(self) -> None:
        """Remove it and restore the environment; does nothing in a forked child."""
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


_directory: WorkingDirectory | None = None


def _trusted_parent() -> Path:
    """The folder for temporary files; the user's own cache folder if another user could replace
    what is made in the first, or nothing there may be run.

    Raises:
        UntrustedFolder: neither can be trusted.
        OSError: the first cannot be trusted, and the user's cache folder cannot be made.
    """
    temporary = Path(tempfile.gettempdir())
    try:
        require_trusted_parent(temporary)
    except UntrustedFolder as untrusted:
        # As where a container's /tmp is a volume without the sticky bit.
        try:
            return _own_cache_folder()
        except UntrustedFolder:
            raise untrusted from None  # its reason is the one to act on
    if _may_load_code(temporary):
        return temporary
    with suppress(OSError, UntrustedFolder):
        own = _own_cache_folder()
        if _may_load_code(own):
            return own
    logger.warning(
        "%s is mounted noexec, so code that is compiled there cannot be loaded: set TMPDIR to "
        "another folder, or mount it with exec (docker: --tmpfs /tmp:exec)",
        temporary,
    )
    return temporary


def _own_cache_folder() -> Path:
    """The user's own cache folder, which is made if it is missing.

    Raises:
        UntrustedFolder: another user could replace what is made in it.
        OSError: it cannot be made.
    """
    own = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_trusted_parent(own)
    return own


def _may_load_code(folder: Path) -> bool:
    """Docker mounts a tmpfs noexec unless it is told not to."""
    return not os.statvfs(folder).f_flag & os.ST_NOEXEC


def _remove_abandoned(parent: Path) -> None:
    """Remove the working directories of this user's processes that have ended."""
    for path in parent.glob(f"{WORKING_PREFIX}*"):
        with suppress(OSError):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            try:
                lock = os.open(path / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                # It is being created, or its process was killed while creating it.
                if time.time() - status.st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
