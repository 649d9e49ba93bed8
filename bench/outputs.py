"""Files that a command writes at its end, checked before its work begins.

A path that cannot be written would otherwise be found out after minutes of measuring, and the
results would be lost.
"""

from __future__ import annotations

import argparse
import json
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.errors import BenchError


def output_file(text: str) -> Path:
    """The type of an option that names a file to write."""
    return _checked(Path(text), check_can_write)


def output_folder(text: str) -> Path:
    """The type of an option that names an existing folder to write files into."""
    return _checked(Path(text), check_folder)


def check_can_write(path: Path) -> None:
    """Check that the file can be written, without leaving a trace.

    Raises:
        BenchError: it cannot.
    """
    try:
        if not path.exists():
            # Created and removed: permissions alone do not say what a file system allows.
            path.open("xb").close()
            path.unlink()
        elif stat.S_ISREG(path.stat().st_mode):
            path.open("ab").close()
        elif path.is_dir():
            raise BenchError(f"{path} cannot be written: it is a folder, and a file is needed")
        # Anything else is a device or a pipe, which opening could block or disturb.
    except OSError as error:
        raise _cannot_write(path, error) from None


def check_folder(path: Path) -> None:
    """Check that new files can be written into the folder.

    Raises:
        BenchError: they cannot, or it is no folder.
    """
    if not path.is_dir():
        raise BenchError(f"{path} is not a folder that exists")
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from None


def write_json(path: Path, document: object) -> None:
    """Write a document as JSON.

    Raises:
        BenchError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise _cannot_write(path, error) from None


def _checked(path: Path, check: Callable[[Path], None]) -> Path:
    try:
        check(path)
    except BenchError as error:
        # Ends the command with its usage and exit status 2.
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def _cannot_write(path: Path, error: OSError) -> BenchError:
    return BenchError(f"{path} cannot be written: {error.strerror or type(error).__name__}")
