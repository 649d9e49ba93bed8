"""A model's repository on the hub: what it holds, and what to say when the hub gives no answer.

The hub library's own messages are not passed on: they quote URLs, which may hold a password or a
signature.
"""

from __future__ import annotations

import re
from pathlib import Path

HUB_SECONDS = 10.0
"""How long the hub may take for each part of its first answer. A hub that accepts a connection and
says nothing would otherwise hold up the start for ever."""


class HubUnavailable(Exception):
    """The hub does not give the repository. The text is a clause that says why."""


def variant_on_hub(name: str, revision: str | None) -> str | None:
    """`fp16` if the repository has the UNet's weights in that variant, else None.

    Raises:
        HubUnavailable: the hub cannot be reached, has no such repository or revision, or does not
            give it to this user.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        files = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS).siblings or []
    except OfflineModeIsEnabled:
        raise HubUnavailable("HF_HUB_OFFLINE forbids to ask the hub") from None
    except GatedRepoError:
        raise HubUnavailable(
            "the hub gives it only to accounts that were granted access, and HF_TOKEN is not one's"
        ) from None
    except RevisionNotFoundError:
        raise HubUnavailable(f"the hub's repository has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise HubUnavailable(
            "the hub has no such repository, or a private one that HF_TOKEN does not open"
        ) from None
    except HfHubHTTPError as error:
        raise HubUnavailable(f"the hub answered {error.response.status_code}") from None
    except Exception as error:  # noqa: BLE001 - see below
        # The library's HTTP client and the system raise many types: no route, a name that does not
        # resolve, a certificate, a time limit, a proxy.
        raise HubUnavailable(f"the hub cannot be reached ({type(error).__name__})") from None
    found = any(f.rfilename.startswith("unet/") and ".fp16." in f.rfilename for f in files)
    return "fp16" if found else None


def downloaded_before(name: str, revision: str | None) -> Path | None:
    """The directory of an earlier download of this revision, or None."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(name, "model_index.json", revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def first_line(error: Exception) -> str:
    """The first line of a library's message, without what a URL in it may hold: a name and password
    before the host, a signature after the path."""
    lines = str(error).strip().splitlines()
    plain = re.sub(r"//[^/@\s]*@", "//...@", lines[0]) if lines else ""
    return re.sub(r"(https?://[^\s?]+)\?[^\s'\")]*", r"\1?...", plain)[:300]
