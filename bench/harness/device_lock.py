"""A lock that lets one bench at a time use a device, because two would slow each other down.

The kernel releases the lock (`flock`) when its process ends, however it ends. The file's text only
names the process that holds it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import BenchError
from bench.harness.own_folder import own_folder


@contextmanager
def only_bench_on(device: str) -> Iterator[None]:
    """Hold the device's lock until the block ends.

    Args:
        device: as torch names it.

    Raises:
        BenchError: another bench holds it.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda":
        # torch takes `cuda` for its current device, which is the first in every bench.
        kind = f"cuda-{index or 0}"
    path = _folder() / f"{kind}.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise BenchError(
                f"another bench runs on {device} (process {holder}); wait until it has ended"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def _folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(runtime) if runtime and os.access(runtime, os.W_OK) else None
    return own_folder(parent)
