"""The bench's own folder on this machine: device locks, and code compiled by earlier calls.

The service compiles into a folder that goes with its process. The bench compiles the same scenarios
again and again, in many processes, so it names a folder that stays: the service trusts a folder
named in TORCHINDUCTOR_CACHE_DIR after it has checked it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import BenchError

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def own_folder(parent: Path | None = None) -> Path:
    """A folder of this user's, which no other user can write to.

    Args:
        parent: where it is; None: with the temporary files.

    Raises:
        BenchError: another user made one of its name, or could write to it.
    """
    from kernels_warmup.cache.trust import UntrustedFolder, require_trusted

    folder = (parent or Path(tempfile.gettempdir())) / f"stepspan-bench-{os.getuid()}"
    try:
        require_trusted(folder, content=False)
    except UntrustedFolder as error:
        raise BenchError(str(error)) from None
    return folder


def compiler_cache() -> Path:
    """The folder of compiled code that is kept between calls of the bench; TORCHINDUCTOR_CACHE_DIR
    if an operator has set it.

    Raises:
        BenchError: code must not be loaded from it.
    """
    from kernels_warmup.cache.trust import UntrustedFolder, require_trusted
    from kernels_warmup.cache.working_directory import operators_directory

    named = operators_directory()
    folder = own_folder() / "inductor" if named is None else Path(named)
    try:
        require_trusted(folder)
    except UntrustedFolder as error:
        raise BenchError(str(error)) from None
    return folder


@contextmanager
def code_kept() -> Iterator[None]:
    """Compile into `compiler_cache` until the block ends, in this process and its children.

    Raises:
        BenchError: code must not be loaded from it.
    """
    from kernels_warmup.cache.working_directory import CODE_FOLDERS

    # The service sets the others to folders below it.
    names = (_VARIABLE, *CODE_FOLDERS)
    before = {name: os.environ.get(name) for name in names}
    os.environ[_VARIABLE] = str(compiler_cache())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
