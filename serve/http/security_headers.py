"""Headers that keep a browser from using an answer in a way that it is not meant for."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # An answer belongs to its caller.
    "Cache-Control": "no-store",
}
"""What every answer has that does not set its own. No answer has a CORS header: no page from
elsewhere may read one."""

_POLICY = b"content-security-policy"
_RAW = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


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
                headers = list(message.get("headers", []))
                has = dict(headers)
                if has.get(b"content-type", b"").startswith(b"text/html"):
                    # The playground has a policy of its own; fal's pages need others' scripts.
                    has.setdefault(_POLICY, b"")
                message["headers"] = headers + [item for item in _RAW if item[0] not in has]
            await send(message)

        await self._app(scope, receive, send_with_headers)
