"""Which traces are exported, and with which probability.

There are two decisions. At the start of a request (head sampling) the caller's decision is
followed; without one, a ratio of the trace ids decides. At its end (tail sampling) failed and slow
requests are kept although the ratio dropped them. A token bucket limits these, because everything
is slow during an incident.

Every exported span carries its probability p, so that spans can be counted with the weight 1/p. A
request that the rules keep has the probability 1, even if the ratio had chosen it: the rules would
have kept it anyway. So the weights add up to the number of requests, over any mix of the two.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import SpanContext, SpanKind

from metrics.records import RequestTiming

ROOT_SPAN = "text-to-image"

# Enough traces to understand an incident: at 40 spans a request the burst is 800 spans, a tenth of
# the queue, and then 8 spans a second.
KEPT_BURST = 20
KEPT_PER_SECOND = 0.2

_THRESHOLD = re.compile(r"th:([0-9a-f]{1,14})")

KeepReason = Literal["failed", "slow", "slow_step"]


@dataclass(frozen=True, slots=True)
class TraceIdentity:
    """The trace and span id of a request, and the decision on its export.

    `parent` is the caller's span, if its trace is continued. `caller` is the span of a caller that
    is not trusted; it becomes a link. `probability` is that of being exported, given the caller's
    decision. `may_be_kept` says whether tail sampling may still keep the trace.
    """

    trace_id: int
    span_id: int
    exported: bool
    probability: float = 1.0
    may_be_kept: bool = False
    parent: SpanContext | None = None
    caller: SpanContext | None = None

    @property
    def trace_id_hex(self) -> str:
        return format(self.trace_id, "032x")

    @property
    def span_id_hex(self) -> str:
        return format(self.span_id, "016x")


@dataclass(frozen=True, slots=True)
class KeepRules:
    """Which requests tail sampling keeps: all that failed, and those slower than these limits.

    Args:
        slow_seconds: limit for a request, from when its head was read to its last byte.
        slow_step_ms: limit for a denoising step; one slower step is enough.
    """

    slow_seconds: float | None = None
    slow_step_ms: float | None = None

    def reason(self, request: RequestTiming) -> KeepReason | None:
        """Why a request is kept, or None. A mistake of the caller is not a failure."""
        if request.failure is not None and request.failure.server_fault:
            return "failed"
        if self.slow_seconds is not None and request.duration_ns > self.slow_seconds * 1e9:
            return "slow"
        steps = [step for run in request.runs for step in run.steps]
        if self.slow_step_ms is not None and any(
            step.duration_ns > self.slow_step_ms * 1e6 for step in steps
        ):
            return "slow_step"
        return None


class TokenBucket:
    """`burst` tokens, refilled at `per_second`. For one thread."""

    def __init__(
        self,
        burst: float,
        per_second: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = burst
        self._per_second = per_second
        self._monotonic = monotonic
        self._tokens = burst
        self._filled_at = monotonic()

    @property
    def has_token(self) -> bool:
        now = self._monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        return self._tokens >= 1

    def take(self) -> None:
        """Take one token. Check `has_token` first."""
        self._tokens -= 1


class TraceSampling:
    """Head and tail sampling.

    Args:
        rate: share of traces to export, where no caller decided.
        parent_based: whether a caller's decision is followed.
        trust_parent: whether a caller's trace is continued; otherwise it becomes a link.
        keep: rules for tail sampling; None: no tail sampling.
        bucket: limits tail sampling.
    """

    def __init__(
        self,
        rate: float = 1.0,
        *,
        parent_based: bool = True,
        trust_parent: bool = True,
        keep: KeepRules | None = None,
        bucket: TokenBucket | None = None,
    ) -> None:
        root = TraceIdRatioBased(rate)
        self.sampler: Sampler = ParentBased(root) if parent_based else root
        self.trusts_parent = trust_parent
        self._rate = rate
        self._parent_based = parent_based
        self._keep = keep
        self._bucket = bucket or TokenBucket(KEPT_BURST, KEPT_PER_SECOND)

    def decide_at_start(
        self, trace_id: int, span_id: int, caller: SpanContext | None
    ) -> TraceIdentity:
        """Head sampling, when a request arrives."""
        parent = caller if self.trusts_parent else None
        context = Context()
        if parent is not None:
            trace_id = parent.trace_id
            context = trace.set_span_in_context(trace.NonRecordingSpan(parent), context)
        result = self.sampler.should_sample(context, trace_id, ROOT_SPAN, SpanKind.SERVER)
        decided_by_caller = parent is not None and self._parent_based
        return TraceIdentity(
            trace_id=trace_id,
            span_id=span_id,
            exported=result.decision is Decision.RECORD_AND_SAMPLE,
            probability=_callers_probability(parent) if decided_by_caller else self._rate,
            # The "not sampled" of a trusted caller always holds.
            may_be_kept=self._keep is not None and not decided_by_caller,
            parent=parent,
            caller=None if self.trusts_parent else caller,
        )

    def keep_reason(self, request: RequestTiming) -> KeepReason | None:
        """Why tail sampling wants to keep a request that has ended, or None."""
        return (self._keep or KeepRules()).reason(request)

    def decide_at_end(self, identity: TraceIdentity, keep: bool) -> TraceIdentity:
        """Tail sampling, when a request has ended. For one thread.

        Args:
            keep: whether there is a reason to keep it.
        """
        if not (keep and identity.may_be_kept and self._bucket.has_token):
            return identity
        if not identity.exported:
            self._bucket.take()
        return dataclasses.replace(identity, exported=True, probability=1.0)


def _callers_probability(parent: SpanContext | None) -> float:
    """The probability with which the caller sampled: `th` of the `ot` entry of its tracestate, a
    threshold of 14 hexadecimal digits below which trace ids are rejected. 1 if there is none."""
    entry = "" if parent is None else parent.trace_state.get("ot") or ""
    for field in entry.split(";"):
        threshold = _THRESHOLD.fullmatch(field)
        if threshold is not None:
            # Subtracted as integers: the highest thresholds, as floats, would leave 0.
            return (16**14 - int(threshold[1].ljust(14, "0"), 16)) / 16**14
    return 1.0
