"""`python -m bench.service.otlp_receiver`: an OTLP/HTTP endpoint on loopback that counts spans.

It is a process of its own, so that receiving costs what is measured neither a lock nor its time.
It prints its address once it listens; `GET /count` tells how many spans have come.
"""

from __future__ import annotations

import gzip
import http.server
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    spans = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            _Handler.spans += sum(len(scope.spans) for scope in resource.scope_spans)
        answer = ExportTraceServiceResponse().SerializeToString()
        self._answer(answer, "application/x-protobuf")

    def do_GET(self) -> None:
        self._answer(str(_Handler.spans).encode(), "text/plain")

    def _answer(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(f"ready at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
