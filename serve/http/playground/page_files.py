"""The playground's files: read once from the package, served with strict headers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import Request, Response

CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

INDEX = "index.html"

PAGE_HEADERS = {
    # Scripts and styles come from this server's own files only, images also from data URIs (this
    # server stores none) and from copies that the page keeps.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""What the page's files have in place of, and beside, the headers of every answer."""


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    name: str
    body: bytes
    content_type: str
    etag: str

    def response(self, request: Request) -> Response:
        """200 with the file, or 304 if the client has this version.

        `no-cache`: a browser keeps the file and asks each time whether it is still the same, so a
        new version of the service never runs with old files.
        """
        headers = {**PAGE_HEADERS, "Cache-Control": "no-cache", "ETag": self.etag}
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if "*" in known or self.etag in [tag.removeprefix("W/") for tag in known]:
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers={**headers, "Content-Type": self.content_type})


def page_files() -> dict[str, PageFile]:
    """The files of the page by name."""
    found = {}
    for each in files("serve.http.playground").joinpath("page").iterdir():
        content_type = CONTENT_TYPES.get(each.name.rpartition(".")[2])
        if content_type is not None:
            body = each.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            found[each.name] = PageFile(each.name, body, content_type, etag)
    return found
