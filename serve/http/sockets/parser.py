"""h11's parser of HTTP/1.1, without the requests that the server should not accept."""

from __future__ import annotations

import re
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer

from serve.errors import HeadTooLarge, MalformedHttp, RequestError

MAX_HEAD_BYTES = 16 * 1024
MAX_HEAD_FIELDS = 100

FREE_CHUNKS = 1000
BYTES_A_CHUNK = 256
"""A chunked body may have `FREE_CHUNKS`, and one more for each of these bytes. Each costs the
parser some 20 microseconds, however small it is, and a read of the socket could have 40,000."""

_URL = re.compile(
    rb"https?://((?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]*)?)((?:/|\?|$).*)", re.IGNORECASE
)
"""A request's target in absolute form. One with another authority, as with a user, is no path that
is known."""


class CheckedParser(h11.Connection):
    """Parses a client's requests. Instead of raising it pauses, with the reason in `problem`:
    uvicorn would log each, and answer some of them in the middle of another answer."""

    problem: RequestError | None = None
    is_head: bool = False
    """Whether the last request, or what has arrived of it, asks for an answer's head only."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._receive_buffer = _FewLines()
        self._chunks = 0
        self._body_bytes = 0

    def next_event(self) -> Any:
        if self.problem is not None:
            return h11.PAUSED
        if self.their_state is h11.IDLE:
            self.is_head = self.trailing_data[0].startswith(b"HEAD ")
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            # Without the error's text, which may quote a header.
            too_large = error.error_status_hint == HeadTooLarge.status
            self.problem = _head_too_large() if too_large else MalformedHttp()
            return h11.PAUSED
        if isinstance(event, h11.Request):
            self._chunks = self._body_bytes = 0
            self.problem = _problem_of(event)
            event = _in_origin_form(event)
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._body_bytes += len(event.data)
            if self._chunks > FREE_CHUNKS + self._body_bytes // BYTES_A_CHUNK:
                self.problem = MalformedHttp("The body has too many small chunks.")
        return event if self.problem is None else h11.PAUSED


class _FewLines(ReceiveBuffer):
    """Refuses a head, or a body's trailers, of too many lines before h11 parses each of them. One
    read of the socket could have 50,000, which take it a second."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        lines = super().maybe_extract_lines()
        if lines is not None and len(lines) > 1 + MAX_HEAD_FIELDS:
            raise h11.LocalProtocolError("too many lines", HeadTooLarge.status)
        return lines


def _in_origin_form(head: h11.Request) -> h11.Request:
    """A request whose target is a URL, as one whose target is its path. A server must take both,
    and has to believe the URL instead of the Host header (RFC 9112, 3.2.2). Everything behind the
    parser sees one form only, so no check of the path or of the host sees another one."""
    url = _URL.fullmatch(head.target)
    if url is None:
        return head
    headers = [(name, value) for name, value in head.headers if name != b"host"]
    return h11.Request(
        method=head.method,
        target=b"/" + url[2].removeprefix(b"/"),
        headers=[(b"Host", url[1]), *headers],
        http_version=head.http_version,
    )


def _problem_of(head: h11.Request) -> RequestError | None:
    """Why a request is refused before its body is read."""
    size = len(head.target) + sum(len(name) + len(value) for name, value in head.headers)
    if size > MAX_HEAD_BYTES or len(head.headers) > MAX_HEAD_FIELDS:
        return _head_too_large()
    if head.http_version not in (b"1.0", b"1.1"):
        return MalformedHttp()  # HTTP/2, which begins like a request
    names = {name for name, _ in head.headers}
    if b"transfer-encoding" in names and (b"content-length" in names or head.http_version < b"1.1"):
        # A proxy that believes the length would take the rest of the body for another request
        # (RFC 9112, 6.1 and 11.2).
        return MalformedHttp(
            "Transfer-Encoding is not allowed beside Content-Length or before HTTP/1.1."
        )
    return None


def _head_too_large() -> RequestError:
    return HeadTooLarge(MAX_HEAD_BYTES, MAX_HEAD_FIELDS)
