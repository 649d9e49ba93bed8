"""A model's repository on the hub: what it holds, and what to say when the hub gives no answer.

The hub library's own messages are not passed on: they quote URLs, which may hold a password or a
signature.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
"""A repository's name, as a regular expression without groups."""

HUB_SECONDS = 10.0
"""How long the hub may take for each part of its first answer. A hub that accepts a connection and
says nothing would otherwise hold up the start for ever."""


_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_FORBIDDEN = {errno.EACCES, errno.EPERM}


class HubUnavailable(Exception):
    """The hub does not give the repository. The text is a clause that says why."""


def variant_on_hub(name: str, revision: str | None) -> str | None:
    """`fp16` if the repository has the UNet's weights in that variant, else None.

    Raises:
        HubUnavailable: the hub cannot be reached, has no such repository or revision, or does not
            give it to this user.
    """
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS).siblings or []
    except Exception as error:  # noqa: BLE001 - the library's HTTP client raises many types
        raise HubUnavailable(hub_failure(error, revision)) from None
    found = any(f.rfilename.startswith("unet/") and ".fp16." in f.rfilename for f in files)
    return "fp16" if found else None


def hub_failure(error: BaseException, revision: str | None) -> str:
    """A clause that says why the hub did not give a repository, by the type of the first cause that
    says it."""
    from huggingface_hub import errors

    reasons: tuple[tuple[type[BaseException], str], ...] = (
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids to ask the hub"),
        (
            errors.GatedRepoError,
            "the hub gives it only to accounts that were granted access, and HF_TOKEN is not one's",
        ),
        (errors.RevisionNotFoundError, f"the hub's repository has no revision {revision!r}"),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such repository, or a private one that HF_TOKEN does not open",
        ),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (errors.EntryNotFoundError, "the repository lacks a file of the diffusers layout"),
    )
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OSError) and _is_of_the_cache(cause):
            why = os.strerror(cause.errno or 0)
            return f"the hub's cache, which HF_HOME names, cannot be written ({why})"
    for kind, reason in reasons:
        if any(isinstance(cause, kind) for cause in causes):
            return reason
    for cause in causes:
        if isinstance(cause, errors.HfHubHTTPError):
            return f"the hub answered {cause.response.status_code}"
    # No route, a name that does not resolve, a certificate, a time limit, a proxy.
    return f"the hub cannot be reached ({type(causes[-1]).__name__})"


def _is_of_the_cache(error: OSError) -> bool:
    """Whether the disk refused a file. A firewall may forbid a connection with the same numbers as
    a folder that may not be written, but its error names no file."""
    named = error.filename is not None
    return error.errno in _UNWRITABLE or (named and error.errno in _FORBIDDEN)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what led to it, the latest first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def downloaded_before(name: str, revision: str | None) -> Path | None:
    """The directory of an earlier download of this revision, or None."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(name, "model_index.json", revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def commit_of(path: Path) -> str | None:
    """The commit of a file or folder in the hub's cache, which names its folders by it; None: it is
    somewhere else."""
    parts = path.parts
    if "snapshots" not in parts[:-1]:
        return None
    commit = parts[parts.index("snapshots") + 1]
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def say_commit(setting: str, path: Path, revision: str | None) -> str | None:
    """Log which commit a download is, and how to pin it where the setting did not. Returns it."""
    commit = commit_of(path)
    if commit is not None:
        pinned = commit == revision
        advice = "" if pinned else f"; what the hub says may change, {setting}{commit} pins it"
        logger.info("loaded commit %s of the hub's repository%s", commit, advice)
    return commit


def first_line(error: Exception) -> str:
    """The first line of a library's message, without what a URL in it may hold: a name and password
    before the host, a signature after the path."""
    lines = str(error).strip().splitlines()
    plain = re.sub(r"//[^/@\s]*@", "//...@", lines[0]) if lines else ""
    return re.sub(r"(https?://[^\s?]+)\?[^\s'\")]*", r"\1?...", plain)[:300]
