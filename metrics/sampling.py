"""Which traces are exported, and how likely each was to be.

Two decisions. The head falls when a request arrives: its caller's decision stands, else a ratio of
the trace ids. The second falls when it has ended: what failed or was slow is kept though the ratio
said no, as long as a bucket has tokens, for in an incident everything is slow.

What is kept says with which probability, so that spans can be counted by their weight, 1/p. For a
request that the rules keep, that is 1, whether or not the ratio had chosen it too: it would have
been here anyway. So the weights add up to what happened, over any mix of the two.
"""

from __future__ import annotations

import dataclasses
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

# Enough traces of an incident to read it by, and no flood: at 40 spans a request a burst is 800
# spans, a tenth of the queue, and what follows 8 spans a second.
KEPT_BURST = 20
KEPT_PER_SECOND = 0.2

KeepReason = Literal["failed", "slow", "slow_step"]


@dataclass(frozen=True, slots=True)
class TraceIdentity:
    """A request's place in a trace, drawn when it arrives and used when it has ended.

    `parent` continues a caller's trace; `caller` is a caller that is not trusted to decide for us,
    and becomes a link. `probability` is that of being exported, given what the caller decided.
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
    """What is worth keeping past the ratio: always what failed, and what was slower than this.

    Args:
        slow_seconds: longest ordinary request, first byte to last.
        slow_step_ms: longest ordinary denoising step; one slower step is enough.
    """

    slow_seconds: float | None = None
    slow_step_ms: float | None = None

    def reason(self, request: RequestTiming) -> KeepReason | None:
        """Why a request is worth keeping, or None. What its caller got wrong is no failure."""
        if request.failure is not None and request.failure.server_fault:
            return "failed"
        if self.slow_seconds is not None and request.duration_ns > self.slow_seconds * 1e9:
            return "slow"
        summary = None if request.run is None else request.run.step_summary()
        if (
            self.slow_step_ms is not None
            and summary is not None
            and summary.slowest_ns > self.slow_step_ms * 1e6
        ):
            return "slow_step"
        return None


class TokenBucket:
    """`burst` tokens, refilled at `per_second`; used by one thread."""

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
        """Take a token that is there."""
        self._tokens -= 1


class Sampling:
    """Both decisions.

    Args:
        rate: share of the traces that are exported where nobody decided before.
        parent_based: whether a caller's decision stands.
        trust_parent: whether a caller's trace is continued at all; else it becomes a link.
        keep: the rules by which more is kept, or None: nothing but what the head chose.
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

    def decide(self, trace_id: int, span_id: int, caller: SpanContext | None) -> TraceIdentity:
        """The head decision over a request that has arrived."""
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
            # An explicit "not sampled" of a caller we trust stays not exported.
            may_be_kept=self._keep is not None and not decided_by_caller,
            parent=parent,
            caller=None if self.trusts_parent else caller,
        )

    def worth_keeping(self, request: RequestTiming) -> KeepReason | None:
        """Why a request is worth more than the ratio's word, or None."""
        return (self._keep or KeepRules()).reason(request)

    def settle(self, identity: TraceIdentity, worth_keeping: bool) -> TraceIdentity:
        """The decision over a request that has ended. For one thread."""
        if not (worth_keeping and identity.may_be_kept and self._bucket.has_token):
            return identity
        if not identity.exported:
            self._bucket.take()
        return dataclasses.replace(identity, exported=True, probability=1.0)


def _callers_probability(parent: SpanContext | None) -> float:
    """What a caller says it sampled with: `th` of the `ot` entry of its tracestate, a threshold of
    14 hexadecimal digits below which trace ids are rejected. 1 where it says nothing."""
    entry = "" if parent is None else parent.trace_state.get("ot") or ""
    for field in entry.split(";"):
        name, _, value = field.partition(":")
        if name == "th" and 0 < len(value) <= 14:
            try:
                return 1 - int(value.ljust(14, "0"), 16) / 16**14
            except ValueError:
                return 1.0
    return 1.0
