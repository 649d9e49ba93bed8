"""`python -m bench.service.otlp_receiver`: an OTLP/HTTP endpoint on loopback that counts spans.

It runs in a process of its own, so that receiving spans takes neither a lock nor CPU time from the
server that is measured. It prints its URL once it listens; `GET /count` returns the number of spans
received so far.
"""

from __future__ import annotations

import threading

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from bench.service.loopback import LoopbackHandler, serving


class CountingHandler(LoopbackHandler):
    """Counts the spans of every export."""

    protocol_version = "HTTP/1.1"
    spans = 0

    def respond(self) -> None:
        if self.command != "POST":
            self.send(str(CountingHandler.spans).encode(), {"Content-Type": "text/plain"})
            return
        for resource in ExportTraceServiceRequest.FromString(self.read_body()).resource_spans:
            CountingHandler.spans += sum(len(scope.spans) for scope in resource.scope_spans)
        response = ExportTraceServiceResponse().SerializeToString()
        self.send(response, {"Content-Type": "application/x-protobuf"})


def main() -> None:
    with serving(CountingHandler) as url:
        print(f"ready at {url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
