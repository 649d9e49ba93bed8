"""`python -m bench.service.selective_telemetry_server`: the self-hosted server, with telemetry
turned off for the requests that ask for that.

Two processes of the same program differ by a percent in speed, for as long as they live: where
their memory lies is drawn at their start. So what telling costs is measured within one process, and
each request says in its trace context how much of it is told.
"""

from __future__ import annotations

import os
import sys

from metrics.recorder import Recorder
from metrics.records import RequestTiming
from metrics.sampling import TraceIdentity

SILENT_PARENT = 0xFF
"""The caller's span id of a request that nobody is told of: neither spans nor metrics."""


def trace_context(arm: str) -> dict[str, str]:
    """What makes a request `on`, `sampled out` or `off`; the same work to read in each case."""
    parent = SILENT_PARENT if arm == "off" else 0xFE
    return {"traceparent": f"00-{os.urandom(16).hex()}-{parent:016x}-0{int(arm == 'on')}"}


class DiscreetRecorder(Recorder):
    """Tells nobody of what is not to be told."""

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        if identity.parent is None or identity.parent.span_id != SILENT_PARENT:
            super().record(request, identity)


def main() -> int:
    from serve import server
    from serve.engine.call import current_call
    from serve.engine.runtime import Runtime, build_runtime
    from serve.settings import ServeSettings, load_settings
    from serve.telemetry.logs import configure_logging

    def discreet(settings: ServeSettings) -> Runtime:
        runtime = build_runtime(settings)
        runtime.recorder = DiscreetRecorder(runtime.tracing, runtime.metrics, settings.trace_steps)
        return runtime

    settings = load_settings()
    configure_logging(settings.log_format, current_call.get)
    vars(server)["build_runtime"] = discreet
    return server.run(settings, "127.0.0.1", 0)


if __name__ == "__main__":
    sys.exit(main())
