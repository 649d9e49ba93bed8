"""Whether code may be loaded from a file or folder: only if no other user could have put it there.

Whoever can write to a folder of compiled code can run code in the processes that load it. The users
who may are this one and root.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class UntrustedFolder(Exception):
    """Code must not be loaded from a folder. The text is a sentence that names it and says why."""


def distrust(status: os.stat_result) -> str | None:
    """Why another user could have written a file or folder of this owner and mode, or None. The
    text continues a sentence that names it."""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}; only files of this user or root are trusted"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return (
            "may be written by other users; only files that their owner alone may write are trusted"
        )
    return None


def require_trusted(folder: Path, *, content: bool = True) -> None:
    """Check a folder of compiled code, everything in it, and every folder on the way to it.

    A missing folder is made, for this user alone.

    Args:
        content: whether what is in the folder is checked too.

    Raises:
        UntrustedFolder: another user owns it or something in it, or could replace it, or it cannot
            be made or read.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_trusted_way(folder.parent.absolute())
        # Where a link leads to, with every folder on that way.
        real = folder.resolve(strict=True)
        _require_trusted_way(real.parent)
        if folder.is_symlink():
            _refuse(folder, _distrust_of_owner(folder.lstat()))
        _refuse(real, distrust(real.stat()))
        if content:
            _require_trusted_content(real)
    except OSError as error:
        raise UntrustedFolder(
            f"the folder {folder} cannot be used: {error.strerror or type(error).__name__}."
        ) from None


def require_trusted_parent(folder: Path) -> None:
    """Check a folder that private folders are made in, such as /tmp, and the way to it.

    Raises:
        UntrustedFolder: another user could replace what is made in it.
    """
    try:
        _require_trusted_way(folder.absolute())
        _require_trusted_way(folder.resolve(strict=True))
    except OSError as error:
        raise UntrustedFolder(
            f"{folder} cannot be used: {error.strerror or type(error).__name__}."
        ) from None


def _require_trusted_way(folder: Path) -> None:
    """Check a folder and all above it: nobody else may rename or replace what is in them."""
    for above in (folder, *folder.parents):
        status = above.lstat()
        reason = _distrust_of_owner(status)
        if reason is None and not stat.S_ISLNK(status.st_mode):
            # In a sticky folder, such as /tmp, only an entry's owner may rename or remove it.
            safe = status.st_mode & stat.S_ISVTX or not status.st_mode & _WRITABLE_BY_OTHERS
            reason = None if safe else "may be written by other users"
        _refuse(above, reason)


def _require_trusted_content(root: Path) -> None:
    # Where others cannot even enter, the modes below, which follow the umask, do not matter.
    closed = not root.stat().st_mode & _OPEN_TO_OTHERS
    for directory, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(directory, name)
            status = path.lstat()
            if closed or stat.S_ISLNK(status.st_mode):
                _refuse(path, _distrust_of_owner(status))
            else:
                _refuse(path, distrust(status))


def _distrust_of_owner(status: os.stat_result) -> str | None:
    if status.st_uid in (0, os.geteuid()):
        return None
    return f"belongs to user {status.st_uid}"


def _refuse(path: Path, reason: str | None) -> None:
    if reason is not None:
        raise UntrustedFolder(
            f"{path} {reason}: only folders that no other user can write to are used for code."
        )
