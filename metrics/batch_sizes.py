"""The batch span processor's sizes, by the spans of a request.

Settings are checked against them before OpenTelemetry's SDK is imported: it reads some variables at
its import, and answers a wrong one with a traceback.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# A request of one run is ten spans and one a step. A GPU serves about one request of 30 steps a
# second and the demo model about five shorter ones; call it five of 40 spans.
SPANS_PER_REQUEST = 10 + 30
MOST_SPANS_PER_REQUEST = 10 + 100
REQUESTS_PER_SECOND = 5
# While a backend is redeployed, for half a minute, nothing is lost. The queue for that, 8,192 spans
# of about 1.5 kB, is 12 MB, the most memory that telemetry uses.
OUTAGE_SECONDS = 30
MAX_QUEUE_SIZE = 2 ** math.ceil(math.log2(SPANS_PER_REQUEST * REQUESTS_PER_SECOND * OUTAGE_SECONDS))
# A dozen requests and under 200 kB on the wire, far below every backend's limit. At the highest
# rate a batch fills in two and a half seconds, so the delay below decides when it is exported.
MAX_EXPORT_BATCH_SIZE = 512
# How soon a trace is visible. It costs at most one small export a second.
SCHEDULE_DELAY_MILLIS = 1000


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The batch span processor's queue and batch sizes, in spans, and its delay."""

    queue_size: int = MAX_QUEUE_SIZE
    export_batch_size: int = MAX_EXPORT_BATCH_SIZE
    schedule_delay_millis: int = SCHEDULE_DELAY_MILLIS

    @classmethod
    def chosen(
        cls,
        queue_size: int | None = None,
        export_batch_size: int | None = None,
        schedule_delay_millis: int | None = None,
    ) -> BatchSizes:
        """The sizes given, and the defaults for those that are None."""
        queue_size = queue_size or MAX_QUEUE_SIZE
        return cls(
            queue_size,
            # The SDK refuses a batch larger than the queue; a small queue means small batches.
            export_batch_size or min(MAX_EXPORT_BATCH_SIZE, queue_size),
            schedule_delay_millis or SCHEDULE_DELAY_MILLIS,
        )
