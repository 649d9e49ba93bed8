"""HTTP servers on a free port of 127.0.0.1, for endpoints that the bench and the tests talk to."""

from __future__ import annotations

import gzip
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackHandler(BaseHTTPRequestHandler):
    """Reads a request's body and sends a whole response; logs nothing.

    A subclass defines `respond`, which handles GET, HEAD and POST. A connection is closed after its
    response, unless the subclass sets `protocol_version` to "HTTP/1.1".
    """

    def respond(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.respond()

    def do_HEAD(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def read_body(self) -> bytes:
        """The request's body, decompressed."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def send(self, body: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        """Send a response; to a HEAD request without the body."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(handler: type[LoopbackHandler], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve until the block ends, a thread for each connection; gives the server's URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    # The argument is how long shutdown() may take to be noticed, in seconds.
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
