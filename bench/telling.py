"""`python -m bench.telling tells|silent`: the self-hosted server, with its recorder or without one.

The switches that operators have turn tracing off but leave the metrics; here both go, and the
servers that are compared differ in nothing else.
"""

from __future__ import annotations

import sys

from metrics.recorder import Recorder
from metrics.sampling import TraceIdentity
from metrics.spans import Attributes
from metrics.timeline import RequestTiming, WarmupTiming


class SilentRecorder(Recorder):
    """Tells nobody anything."""

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        pass

    def record_warmup(self, warmup: WarmupTiming, attributes: Attributes) -> None:
        pass


def main(arguments: list[str]) -> int:
    from serve import server
    from serve.logs import configure_logging
    from serve.runtime import Runtime, build_runtime
    from serve.settings import ServeSettings, load_settings

    def silent(settings: ServeSettings) -> Runtime:
        runtime = build_runtime(settings)
        runtime.recorder = SilentRecorder(runtime.tracing, runtime.metrics)
        return runtime

    settings = load_settings()
    configure_logging(settings.log_format)
    if arguments == ["silent"]:
        vars(server)["build_runtime"] = silent
    return server.run(settings, "127.0.0.1", 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
