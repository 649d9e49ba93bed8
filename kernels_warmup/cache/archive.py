"""A directory of compiled artifacts as one file, which is checked before it is unpacked.

Knows neither compilers nor which archive to use. **Loading compiled artifacts runs code**, so an
archive that another user could have written is not read at all. The checksum detects faults; it
does not make an archive trustworthy.

An archive is a manifest, one line of JSON padded with spaces, and then a tar compressed by xz:

    {"format": 1, "key": {...}, "root": "/tmp/...", "files": 3, "bytes": 9, "payload_bytes": 7,
     "sha256": "..."}

`sha256` is that of the compressed tar followed by the manifest without that entry, keys sorted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from kernels_warmup.cache.trust import distrust

FORMAT = 1

_MANIFEST_LIMIT = 1 << 20
_CHUNK = 1 << 20

# Kernels resemble each other, so a large dictionary compresses well. Measured on the demo model's
# artifacts (13 MB, one core of an EPYC): these settings pack 53 MB/s to 0.055 of the size and
# unpack 345 MB/s; xz's own preset 0 packs 57 to 0.113 and unpacks 162; gzip's level 1 packs 136 to
# 0.262 and unpacks 319. Every start waits for reading and unpacking; packing happens once.
_XZ_PRESET = 0
_XZ_DICTIONARY = 16 << 20

# Triton stores the absolute path of each file of a kernel in these files, and compiles the kernel
# again if the directory has moved. Everything else is found by names within the directory.
_TRITON_GROUP = re.compile(r"^triton/.*/__grp__[^/]*\.json$")

# The errors of content that has the right checksum but that no version of this module wrote.
_UNREADABLE = (tarfile.TarError, EOFError, ValueError, LookupError, TypeError, RecursionError)


class Refused(Exception):
    """An archive that must not be read or written. The text continues a sentence that names it."""


class TooLarge(Refused):
    """An archive that would be larger than allowed."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A complete archive.

    Attributes:
        files: the number of files in it.
        bytes: its own size.
    """

    files: int
    bytes: int


def unpack(path: Path, key: Mapping[str, str], root: Path) -> Packed:
    """Write an archive's files below `root`, an empty directory.

    Files that were written before an error remain.

    Raises:
        FileNotFoundError: there is no archive.
        Refused: the archive must not be used.
        OSError: it cannot be read.
    """
    lzma = _lzma()
    with _open_trusted(path) as archive:
        try:
            manifest = _verified_manifest(archive, key)
            with (
                lzma.open(archive, "rb") as unpacked,
                tarfile.open(fileobj=unpacked, mode="r|") as tar,
            ):
                _unpack_files(tar, manifest, root)
        except (lzma.LZMAError, *_UNREADABLE) as error:
            raise Refused(f"is damaged ({type(error).__name__})") from error
        # Marks the archive as used: the ones that were not used for longest are removed first. In
        # a read-only folder, where this fails, none is removed.
        with suppress(OSError):
            os.utime(archive.fileno())
        return Packed(manifest.files, os.fstat(archive.fileno()).st_size)


def pack(
    archive: IO[bytes], key: Mapping[str, str], root: Path, names: list[str], max_bytes: int
) -> Packed:
    """Write the named files below `root` into `archive`, a new and empty file.

    Raises:
        TooLarge: the archive would exceed `max_bytes`.
        Refused: the file could not be trusted when it is read again.
        OSError: it cannot be written.
    """
    lzma = _lzma()
    # Readable by all: it holds no secret, and one user may build an image that another one runs.
    with suppress(OSError):  # a file system may impose its own modes, which are checked below
        os.fchmod(archive.fileno(), 0o644)
    reason = distrust(os.fstat(archive.fileno()))
    if reason is not None:
        raise Refused(f"{reason}, and the folder gives every file that owner and mode")
    sizes = {name: (root / name).stat().st_size for name in sorted(names)}
    entries: dict[str, Any] = {
        "format": FORMAT,
        "key": dict(key),
        "root": str(root),
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "payload_bytes": 0,
        "sha256": "0" * 64,
    }
    # Reserves room for the last two entries, known only at the end, and for a longer number.
    room = len(json.dumps(entries)) + len(str(max_bytes))
    archive.write(b" " * room + b"\n")
    payload = _Payload(archive, max_bytes - room - 1)
    packing = {"id": lzma.FILTER_LZMA2, "preset": _XZ_PRESET, "dict_size": _XZ_DICTIONARY}
    with (
        lzma.open(payload, "wb", check=lzma.CHECK_NONE, filters=[packing]) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, size in sizes.items():
            member = tarfile.TarInfo(name)
            member.size = size
            member.mode = 0o700 if os.access(root / name, os.X_OK) else 0o600
            with (root / name).open("rb") as source:
                tar.addfile(member, source)
    entries["payload_bytes"] = payload.size
    entries["sha256"] = _digest(payload.hashed, entries)
    archive.seek(0)
    archive.write(json.dumps(entries).encode().ljust(room))
    archive.flush()
    os.fsync(archive.fileno())
    return Packed(len(sizes), room + 1 + payload.size)


@dataclass(frozen=True, slots=True)
class _Manifest:
    root: str
    """The directory whose files these were."""
    files: int
    bytes: int
    """Of the files, unpacked."""


@contextmanager
def _open_trusted(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that only its owner, this user or root, could have written.

    It checks the opened file, not the path: a user who may write to the folder can replace the file
    behind a path at any time.
    """
    try:
        # O_NONBLOCK: otherwise opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused("is a symbolic link, not a file") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise Refused("is not a regular file")
    with os.fdopen(descriptor, "rb") as archive:
        reason = distrust(status)
        if reason is not None:
            raise Refused(reason)
        yield archive


def _verified_manifest(archive: IO[bytes], key: Mapping[str, str]) -> _Manifest:
    """Read the manifest, check everything against it, and seek to the start of the tar."""
    line = archive.readline(_MANIFEST_LIMIT)
    try:
        entries = json.loads(line)
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise Refused("is damaged: it has no manifest")
    if entries.get("format") != FORMAT:
        raise Refused(f"has format {entries.get('format')!r}; only format {FORMAT} can be read")
    tar_at = archive.tell()
    payload_bytes = os.fstat(archive.fileno()).st_size - tar_at
    if payload_bytes != entries.get("payload_bytes"):
        raise Refused(
            f"is damaged: {payload_bytes} bytes follow its manifest "
            f"instead of {entries.get('payload_bytes')}"
        )
    hashed = hashlib.sha256()
    while chunk := archive.read(_CHUNK):
        hashed.update(chunk)
    if _digest(hashed, entries) != entries.get("sha256"):
        raise Refused("is damaged: its checksum is wrong")
    theirs = dict(entries["key"])
    for name in sorted(theirs.keys() | key.keys()):
        if theirs.get(name) != key.get(name):
            raise Refused(
                f"was made for another {name}: {theirs.get(name)!r} instead of {key.get(name)!r}"
            )
    archive.seek(tar_at)
    return _Manifest(entries["root"], entries["files"], entries["bytes"])


def _unpack_files(tar: tarfile.TarFile, manifest: _Manifest, root: Path) -> None:
    """Write the tar's regular files as new files below `root`; refuse anything else.

    tarfile's own extraction is not used, because it handles links, devices, owners and modes.
    """
    free = shutil.disk_usage(root).free
    if manifest.bytes > free:
        raise Refused(f"unpacks to {manifest.bytes} bytes, but {root} has {free} left")
    files = size = 0
    for member in tar:
        files += 1
        size += member.size
        if files > manifest.files or size > manifest.bytes:
            raise Refused("is damaged: it holds more than its manifest says")
        if not member.isreg():
            raise Refused(f"holds {member.name!r}, which is not a regular file")
        if any(part in ("", ".", "..") for part in member.name.split("/")):
            raise Refused(f"holds {member.name!r}, which leads out of its directory")
        source = tar.extractfile(member)
        assert source is not None  # it is a regular file
        moved = _moved(manifest.root, root) if _TRITON_GROUP.match(member.name) else None
        try:
            _write_new(root / member.name, source, bool(member.mode & 0o100), moved)
        except OSError as error:
            raise Refused(f"cannot be unpacked into {root}: {error.strerror}") from error
    if files != manifest.files or size != manifest.bytes:
        raise Refused("is damaged: it holds less than its manifest says")


def _write_new(
    path: Path, source: IO[bytes], executable: bool, edit: Callable[[bytes], bytes] | None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o700 if executable else 0o600), "wb") as target:
        if edit is None:
            shutil.copyfileobj(source, target, _CHUNK)
        else:
            target.write(edit(source.read()))


def _moved(before: str, after: Path) -> Callable[[bytes], bytes]:
    """A function that replaces one directory by another in a JSON list of absolute paths."""
    old, new = (json.dumps(str(path))[1:-1].encode() + b"/" for path in (before, after))
    return lambda content: content.replace(old, new)


class _Payload:
    """Writes to a file; hashes, counts and limits the bytes that it writes."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self.hashed = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        if self.size > self._max_bytes:
            raise TooLarge("is larger than allowed")
        self.hashed.update(data)
        return self._file.write(data)


def _digest(tar: Any, entries: Mapping[str, Any]) -> str:
    hashed = tar.copy()
    others = {name: value for name, value in entries.items() if name != "sha256"}
    hashed.update(json.dumps(others, sort_keys=True).encode())
    return cast(str, hashed.hexdigest())


def _lzma() -> Any:
    """The lzma module, which a Python built by hand may lack."""
    try:
        import lzma
    except ImportError:
        raise Refused("needs xz, which this Python was built without") from None
    return lzma
