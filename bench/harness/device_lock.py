"""One bench at a time on a device: two would measure each other.

The lock is the kernel's (`flock`), so it ends with its process however that ends; the file's text
only says who holds it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import BenchError


@contextmanager
def only_bench_on(device: str) -> Iterator[None]:
    """Hold the device's lock until the block ends.

    Raises:
        BenchError: another bench holds it.
    """
    path = _folder() / f"{device.replace(':', '-')}.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise BenchError(
                f"another bench runs on {device} (process {holder}); one at a time is allowed"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def _folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(runtime) if runtime and os.access(runtime, os.W_OK) else None
    folder = (parent or Path(tempfile.gettempdir())) / f"stepspan-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
