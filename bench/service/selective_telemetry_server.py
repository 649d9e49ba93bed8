"""`python -m bench.service.selective_telemetry_server`: the self-hosted server, with telemetry
disabled for the requests that say so.

Two processes of one program differ in speed by about a percent for their whole life, because their
memory layouts differ. Telemetry overhead is therefore measured within one process: each request's
trace context says how much telemetry it gets.
"""

from __future__ import annotations

import os
import sys

from bench.service.processes import serve_here
from metrics.recorder import Recorder
from metrics.records import RequestTiming
from metrics.sampling import TraceIdentity

DISABLED_PARENT = 0xFF
"""The parent span id of a request with telemetry disabled: it gets neither spans nor metrics."""


def trace_context(arm: str) -> dict[str, str]:
    """A request's trace context for `on`, `sampled out` or `off`; equally long for each."""
    parent = DISABLED_PARENT if arm == "off" else 0xFE
    return {"traceparent": f"00-{os.urandom(16).hex()}-{parent:016x}-0{int(arm == 'on')}"}


class SelectiveRecorder(Recorder):
    """Records nothing of a request with telemetry disabled."""

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        if identity.parent is None or identity.parent.span_id != DISABLED_PARENT:
            super().record(request, identity)


def main() -> int:
    from serve.engine.build import build_runtime
    from serve.engine.runtime import Runtime
    from serve.settings import ServeSettings

    def build_selective(settings: ServeSettings) -> Runtime:
        runtime = build_runtime(settings, own_process=True)
        runtime.recorder = SelectiveRecorder(runtime.tracing, runtime.metrics, settings.trace_steps)
        return runtime

    return serve_here(build_selective)


if __name__ == "__main__":
    sys.exit(main())
