"""Which headers of an answer the OpenAPI document does not declare."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from serve.http.playground.page_files import PAGE_HEADERS
from serve.http.security_headers import SECURITY_HEADERS

OF_ANY_ANSWER = frozenset(
    name.lower()
    for name in (
        *("Content-Type", "Content-Length", "Transfer-Encoding", "Connection", "Date", "Server"),
        *SECURITY_HEADERS,
        *PAGE_HEADERS,
    )
)
"""Every HTTP server's own, and those that keep a browser from misusing an answer."""

_OF_NO_OPERATION = {404: "NotFound", 405: "MethodNotAllowed"}


def undeclared(
    document: dict[str, Any], method: str, path: str, status: int, headers: Iterable[str]
) -> set[str]:
    """The names of the answered headers that the document does not have.

    Args:
        method: the operation's, in lower case.
        path: the operation's, as the document writes it.

    Raises:
        AssertionError: the document does not have the status.
    """
    responses = document["paths"][path][method]["responses"]
    if str(status) in responses:
        response = responses[str(status)]
    else:
        assert status in _OF_NO_OPERATION, f"{method} {path}: {status} is not declared"
        response = document["components"]["responses"][_OF_NO_OPERATION[status]]
    declared = {name.lower() for name in response.get("headers", {})}
    return {name.lower() for name in headers} - declared - OF_ANY_ANSWER
