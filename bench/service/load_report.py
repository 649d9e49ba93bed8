"""What a load test measured at each rate, the knee, and the report for people and programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bench.service.arrivals import Mix
from bench.service.server_histograms import Check
from bench.terminal import table

PERCENTILES = (50, 90, 95, 99)
NO_IMAGE = "no image"
KEPT_UP = 0.95
"""A rate is served if at least this share of its requests is answered within the deadline."""


@dataclass(frozen=True)
class RequestOutcome:
    """One request of a load test; times in seconds from the start of its rate."""

    meant: float
    """When it should have been sent."""
    sent: float
    ended: float
    outcome: str
    """The status, or why there is none: `timeout`, `no connection`, `broken off`. A 200 without an
    image is `no image`."""

    @property
    def latency(self) -> float:
        """From when it should have been sent, as a user waits."""
        return self.ended - self.meant

    @property
    def ok(self) -> bool:
        return self.outcome == "200"


@dataclass(frozen=True)
class Level:
    """The figures of one rate."""

    rate: float
    """Requests a second."""
    seconds: float
    """How long requests arrived."""
    sent: int
    ok: int
    in_time: int
    latency_ms: dict[str, float]
    """Of successful requests, by percentile, from when each should have been sent."""
    refused: dict[str, int]
    """How many requests did not succeed, by outcome."""
    lag_ms: float
    """How late the client sent its requests: the 99th percentile."""

    @property
    def goodput(self) -> float:
        """Successful requests a second that met the deadline."""
        return self.in_time / self.seconds

    @property
    def kept_up(self) -> bool:
        return self.in_time >= KEPT_UP * self.sent


def level(
    rate: float, seconds: float, outcomes: Sequence[RequestOutcome], deadline: float
) -> Level:
    """The figures of the requests that arrived at `rate` for `seconds`."""
    ok = [outcome.latency for outcome in outcomes if outcome.ok]
    latency: dict[str, float] = {}
    if ok:
        latency = {f"p{p}": 1000 * float(np.percentile(ok, p)) for p in PERCENTILES}
        latency["max"] = 1000 * max(ok)
    lags = [outcome.sent - outcome.meant for outcome in outcomes]
    return Level(
        rate=rate,
        seconds=seconds,
        sent=len(outcomes),
        ok=len(ok),
        in_time=sum(latency <= deadline for latency in ok),
        latency_ms=latency,
        refused=dict(Counter(outcome.outcome for outcome in outcomes if not outcome.ok)),
        lag_ms=1000 * float(np.percentile(lags, 99)) if lags else 0.0,
    )


def knee(levels: Sequence[Level]) -> Level | None:
    """The highest served rate below the first rate that was not served; None if there is none."""
    reached = None
    for each in sorted(levels, key=lambda each: each.rate):
        if not each.kept_up:
            break
        reached = each
    return reached


@dataclass(frozen=True)
class Report:
    """The result of a load test."""

    url: str
    unloaded_ms: float
    deadline: float
    """Seconds."""
    seed: int
    mix: Mix
    levels: tuple[Level, ...]
    server: Check | None
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        reached = knee(self.levels)
        return {
            "url": self.url,
            "unloaded_ms": self.unloaded_ms,
            "deadline_seconds": self.deadline,
            "seed": self.seed,
            "mix": asdict(self.mix),
            "levels": [
                {**asdict(each), "goodput": each.goodput, "kept_up": each.kept_up}
                for each in self.levels
            ],
            "knee": None if reached is None else reached.rate,
            "server": None if self.server is None else asdict(self.server),
            "server_agrees": None if self.server is None else self.server.agrees,
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        header = ("rate/s", "sent", "ok", *(f"p{p}" for p in PERCENTILES), "max", "goodput/s",
                  "in time", "not served")  # fmt: skip
        rows = [
            (
                f"{each.rate:.3g}",
                str(each.sent),
                str(each.ok),
                *(
                    f"{each.latency_ms[name]:.0f}" if each.latency_ms else ""
                    for name in (*(f"p{p}" for p in PERCENTILES), "max")
                ),
                f"{each.goodput:.3g}",
                f"{100 * each.in_time / each.sent:.0f}%" if each.sent else "",
                ", ".join(f"{count} x {name}" for name, count in sorted(each.refused.items())),
            )
            for each in self.levels
        ]
        scale = f"unloaded {self.unloaded_ms:.0f} ms, deadline {self.deadline:.3g} s"
        lines = [
            f"{self.url}: {scale}; latencies in ms, from when a request should have been sent",
            "",
            table(
                header, rows, left=0, colours=[None if x.kept_up else "yellow" for x in self.levels]
            ),
            "",
            self._knee_sentence(),
        ]
        lines += [] if self.server is None else [self.server.sentence()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _knee_sentence(self) -> str:
        reached = knee(self.levels)
        share = f"{100 * KEPT_UP:.0f}%"
        if reached is None:
            lowest = min(each.rate for each in self.levels)
            return f"knee: below {lowest:.3g} a second, the lowest rate tried"
        past = [each for each in self.levels if each.rate > reached.rate]
        if not past:
            return f"knee: not reached; {reached.rate:.3g} a second was served"
        beyond = min(past, key=lambda each: each.rate)
        return (
            f"knee: {reached.rate:.3g} a second, the highest rate with {share} in time; at "
            f"{beyond.rate:.3g} it was {100 * beyond.in_time / max(1, beyond.sent):.0f}%"
        )
