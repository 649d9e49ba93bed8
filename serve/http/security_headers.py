"""Headers that keep a browser from using an answer in a way that it is not meant for."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "Content-Security-Policy"

SECURITY_HEADERS = {
    POLICY: "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # An answer belongs to its caller.
    "Cache-Control": "no-store",
}
"""What every answer has that does not set its own. No answer has a CORS header: no page from
elsewhere may read one."""


class SecurityHeaders:
    """ASGI middleware that adds `SECURITY_HEADERS` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                # The playground has a policy of its own; fal's pages need other sites' scripts.
                html = headers.get("content-type", "").startswith("text/html")
                for name, value in SECURITY_HEADERS.items():
                    if not (html and name == POLICY):
                        headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
