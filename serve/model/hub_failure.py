"""Why a model could not be fetched from a hub, without the libraries' own words.

Their messages may quote the hub's URL, with the user name and password in it, or a header with the
token.
"""

from __future__ import annotations

from collections.abc import Iterator


def hub_failure(error: BaseException) -> str:
    """Why loading a hub repository failed, by the type of the first cause that says it."""
    from huggingface_hub import errors

    reasons: tuple[tuple[type[BaseException], str], ...] = (
        (errors.GatedRepoError, "the hub gives it only to accounts that were granted access"),
        (errors.RepositoryNotFoundError, "the hub has none of that name that HF_TOKEN may read"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and it was not downloaded before"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached, nor was it downloaded before"),
        (errors.EntryNotFoundError, "the repository lacks a file of the diffusers layout"),
    )
    causes = list(_causes(error))
    for kind, reason in reasons:
        if any(isinstance(cause, kind) for cause in causes):
            return reason
    for cause in causes:
        if isinstance(cause, errors.HfHubHTTPError):
            return f"the hub answered {cause.response.status_code}"
        # By name: which HTTP library raises it differs between the client's versions.
        if any(kind.__name__ == "TransportError" for kind in type(cause).__mro__):
            return "the hub cannot be reached"
    return f"{type(causes[-1]).__name__} was raised"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what led to it, the latest first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
