"""Callers' keys, as `SDXL_API_KEYS` and its file name them.

A key is kept as its digest only, so nothing that holds the settings can show one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

SHORTEST_KEY = 16
LONGEST_KEY = 256
MOST_AT_ONCE = 9999

ALLOWED = (
    "NAME=KEY or NAME:LIMIT=KEY, separated by commas or line breaks, with names of up to 64 "
    f"letters, digits and ._-, different keys of {SHORTEST_KEY} to {LONGEST_KEY} visible ASCII "
    f"characters without commas, and for each name at most one limit, from 1 to {MOST_AT_ONCE}"
)
"""What the variable and the file may hold, for error messages."""

_ENTRY = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(:(?P<limit>[1-9][0-9]{0,3}))?="
    rf"(?P<key>[!-+\--~]{{{SHORTEST_KEY},{LONGEST_KEY}}})"
)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One caller's key. Several keys may have one name, as while a key is replaced.

    Attributes:
        name: stands for the key in logs, spans and metrics.
        limit: how many requests with this name may be in progress; None: as many as come.
    """

    name: str
    digest: bytes = field(repr=False)
    limit: int | None = None


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def is_same(key: str, digest: bytes) -> bool:
    """Whether a key has this digest. The time it takes says nothing about either."""
    return hmac.compare_digest(digest_of(key), digest)


def matching(keys: Iterable[ApiKey], given: str) -> ApiKey | None:
    """The one of `keys` that was given, or None. It is compared with every one, so the time it
    takes does not say which it was."""
    found, digest = None, digest_of(given)
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found


def parse_api_keys(value: Any) -> Any:
    """Entries as `ALLOWED` says. Empty lines, and those that begin with `#`, are skipped.

    Raises:
        ValueError: an entry is wrong, or there is none. The text does not quote it.
    """
    if not isinstance(value, str):
        return value
    lines = [line for line in value.split("\n") if not line.lstrip().startswith("#")]
    entries = [entry.strip() for line in lines for entry in line.split(",") if entry.strip()]
    keys: list[ApiKey] = []
    limits: dict[str, int] = {}
    for entry in entries:
        found = _ENTRY.fullmatch(entry)
        if found is None:
            raise ValueError("not a name and a key")
        name = found["name"]
        if found["limit"] is not None:
            limit = int(found["limit"])
            if limits.setdefault(name, limit) != limit:
                raise ValueError("two limits for one name")
        keys.append(ApiKey(name, digest_of(found["key"])))
    if not keys or len({key.digest for key in keys}) < len(keys):
        raise ValueError("no key, or a key twice")
    return tuple(replace(key, limit=limits.get(key.name)) for key in keys)


ApiKeys = Annotated[tuple[ApiKey, ...], BeforeValidator(parse_api_keys), NoDecode]
