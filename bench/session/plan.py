"""The plan of a measurement session: its pieces in order, as the results so far decide them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness.own_folder import own_folder
from bench.harness.result_file import BenchResult, MeasuredScenario
from bench.harness.run_record import NO_TIME
from bench.harness.scenarios import SCENARIOS, Scenario, chosen
from bench.stats.verdict import FEWEST_ROUNDS

if TYPE_CHECKING:
    from bench.harness.work import Work

START_SECONDS = 60.0
"""The time to import libraries, measure the device's ceilings and compute a reference."""
CACHED_SECONDS = 40.0
"""The longest time to prepare a scenario whose code is in the compiler's cache."""
TEST_SECONDS = 150.0

FIRST = ("documented", "compiled", "all-lossless", "all-but-geglu")
"""The baseline, the present default, and the candidate for the next default."""
FIRST_REQUESTS = FEWEST_ROUNDS
"""The fewest that a verdict needs, because minutes on a GPU are scarce."""
SINGLE = ("layer-norm", "group-norm", "zero-text", "geglu")
"""The single rewrites from which most is expected."""
FP8 = ("fp8", "fp8-fused")
BATCH = ("batch-8",)
MORE_BATCHES = ("all-batch-8",)
MORE_FP8 = ("all-fp8", "fp8-static", "fp8-batch-8", "all-fp8-batch-8")
OFFLINE = ("offline", "fp8-offline", "all-offline", "all-fp8-offline")
TUNED = ("tuned-kernels", "tuned-products", "max")
"""These come last, because each may take a session by itself."""


@dataclass(frozen=True)
class Piece:
    """One command with one result file."""

    name: str
    command: tuple[str, ...]
    """Arguments of `python -m`, without those that name the result file."""
    out: Path
    seconds: float
    """The piece is started only if so many seconds are left."""
    scenarios: tuple[str, ...] = ()
    """The scenarios that it adds to the result file, which other pieces write to as well."""
    requests: int = 0
    """Timed requests of each of these scenarios."""
    out_option: tuple[str, ...] = ("--out",)


class SessionPlan:
    """The pieces of a session. They depend on the results so far, so each call reads those first.

    Args:
        stem: the path of the session's files, up to the piece's name.
    """

    def __init__(self, work: Work, stem: Path, options: argparse.Namespace) -> None:
        self._work, self._stem, self._options = work, stem, options
        self._selected = tuple(scenario.name for scenario in chosen(options.scenario))
        self._read: tuple[int, BenchResult] | None = None

    def pieces(self) -> list[Piece]:
        """All pieces in order, or those that `--only` names."""
        only = tuple(self._options.only or ())
        return [piece for piece in self._all() if not only or piece.name.startswith(only)]

    def unmeasured(self, names: Sequence[str], requests: int) -> list[str]:
        """Those of these scenarios that are not measured and not impossible on this machine."""
        result = self.result()
        if result is None:
            return list(names)
        have = {s.name for s in result.scenarios if len(s.requests) >= requests}
        have |= {n.name for n in result.not_run if n.reason != NO_TIME and not n.failed}
        return [name for name in names if name not in have]

    def result(self) -> BenchResult | None:
        """The result file of all timed scenarios; None before the first."""
        path = self._file("bench")
        if not path.exists():
            return None
        # Read again only after a change: every piece needs it, and it grows to megabytes.
        written = path.stat().st_mtime_ns
        if self._read is None or self._read[0] != written:
            self._read = written, BenchResult.read(path)
        return self._read[1]

    def _all(self) -> Iterator[Piece]:
        on_cuda = self._work.on_cuda
        if on_cuda:
            # First, because a wrong kernel makes every figure with it worthless.
            tests = ("pytest", "-x", "-q", "-m", "gpu", "-p", "no:cacheprovider")
            yield Piece(
                "gpu-tests",
                (*tests, "--timeout=140", "tests/gpu/test_triton.py"),
                self._file("gpu-tests").with_suffix(".xml"),
                TEST_SECONDS,
                out_option=("--junit-xml",),
            )
        first = [name for name in FIRST if name in self._selected] or [*self._selected[:2]]
        yield from self._timed("first", first, FIRST_REQUESTS, beside=())
        profiled = self._profiled()
        if profiled is not None:
            yield self._kernels(profiled)
        yield from self._timed("ways", SINGLE, FIRST_REQUESTS)
        yield from self._timed("fp8", FP8, FIRST_REQUESTS)
        yield from self._timed("batch", BATCH, FIRST_REQUESTS)
        yield self._cold_start("default" if on_cuda else "auto")
        yield self._piece("operators", seconds=(150, 120))
        all_but = [s.name for s in SCENARIOS if s.name.startswith("all-but-")]
        ways = [name for name in _single_rewrites() if name not in SINGLE]
        yield from self._timed("all-but", all_but, FIRST_REQUESTS)
        yield from self._timed("more-ways", ways, FIRST_REQUESTS)
        yield from self._timed("more-batches", MORE_BATCHES, FIRST_REQUESTS)
        yield from self._timed("more-fp8", MORE_FP8, FIRST_REQUESTS)
        yield from self._timed("offline", OFFLINE, FIRST_REQUESTS)
        yield self._command("micro", "--device", self._work.device, seconds=(90, 90))
        if on_cuda:
            for mode in ("regional", "off"):
                yield self._cold_start(mode)
        fastest = self._fastest()
        if fastest is not None and fastest != profiled:
            yield self._kernels(fastest)
        # On a GPU only the scenarios that the session decides about. The compiler's cache has them
        # by now.
        names = ("compiled", *_single_rewrites(), "all-lossless") if on_cuda else self._selected
        if selected := [name for name in names if name in self._selected]:
            uncompiled = () if on_cuda else ("--uncompiled",)
            yield self._piece("numerics", "--scenario", *selected, *uncompiled, seconds=(460, 120))
        planned = {
            *(*first, *SINGLE, *FP8, *BATCH, *MORE_BATCHES, *MORE_FP8, *OFFLINE, *TUNED),
            *(*all_but, *ways),
        }
        rest = [s.name for s in SCENARIOS if s.name not in planned]
        yield from self._timed("rest", rest, self._options.requests)
        yield from self._timed("tuned", TUNED, FIRST_REQUESTS)

    def _timed(
        self,
        name: str,
        names: Sequence[str],
        most_requests: int,
        beside: Sequence[str] = ("documented", "compiled"),
    ) -> Iterator[Piece]:
        """Compile these scenarios, and time them in the same rounds as those they differ from."""
        selected = [one for one in names if one in self._selected]
        if not selected:
            return
        requests = min(self._options.requests, most_requests)
        to_compile = [
            s.name
            for s in chosen(selected)
            if s.prepare_seconds[0] > CACHED_SECONDS and self.unmeasured([s.name], 1)
        ]
        if self._work.on_cuda and to_compile:
            command = ("bench", "precompile", *self._workload(), "--scenario", *to_compile)
            # The file that names what was compiled stays on the machine, as the compiler's cache
            # does: another machine has to compile again.
            out = own_folder() / self._file(f"precompile-{name}").name
            yield Piece(f"precompile-{name}", command, out, 150)
        beside = [one for one in beside if one in self._selected]
        options = self._options
        unmeasured = self.unmeasured(selected, requests)
        to_prepare = unmeasured[:1] + beside
        seconds = sum(self._prepare_seconds(s) for s in chosen(to_prepare or selected[:1]))
        cached = all(
            self._prepare_seconds(s) <= CACHED_SECONDS for s in chosen([*unmeasured, *beside])
        )
        yield Piece(
            name,
            (
                *("bench", "run", "--scenario", *selected),
                *(("--beside", *beside) if beside else ()),
                *self._workload(),
                *("--steps", str(options.steps), "--requests", str(requests), "--resume"),
                *(("--prepare-seconds", f"{CACHED_SECONDS:.0f}") if cached and unmeasured else ()),
                *(("--commit", options.commit) if options.commit else ()),
            ),
            self._file("bench"),
            START_SECONDS + seconds,
            tuple(selected),
            requests,
        )

    def _prepare_seconds(self, scenario: Scenario) -> float:
        """An upper bound; what was prepared on this machine is in the compiler's cache."""
        seconds = scenario.prepare_seconds[0 if self._work.on_cuda else 1]
        known = scenario.name not in self.unmeasured([scenario.name], 1)
        return (
            min(seconds, CACHED_SECONDS) if known or self._precompiled(scenario.name) else seconds
        )

    def _precompiled(self, name: str) -> bool:
        pattern = f"{self._stem.name}-precompile-*.json"
        for path in own_folder().glob(pattern):
            outcomes = json.loads(path.read_text() or "{}").get("scenarios", {})
            if str(outcomes.get(name, "")).startswith("compiled"):
                return True
        return False

    def _kernels(self, scenario: str) -> Piece:
        more = ("--scenario", scenario, "--part", "step", "decode")
        return self._piece("kernels", *more, name=f"kernels-{scenario}", seconds=(110, 240))

    def _cold_start(self, mode: str) -> Piece:
        more = ("--compile", mode, "--steps", str(self._work.steps))
        return self._piece("coldstart", *more, name=f"coldstart-{mode}", seconds=(240, 90))

    def _piece(
        self, command: str, *more: str, name: str | None = None, seconds: tuple[float, float]
    ) -> Piece:
        return self._command(command, *self._workload(), *more, name=name, seconds=seconds)

    def _command(
        self, command: str, *more: str, name: str | None = None, seconds: tuple[float, float]
    ) -> Piece:
        name = name or command
        allowed = seconds[0 if self._work.on_cuda else 1]
        return Piece(name, ("bench", command, *more), self._file(name), allowed)

    def _workload(self) -> tuple[str, ...]:
        work = self._work
        return ("--model", work.model, "--device", work.device, "--shape", str(work.shape))

    def _file(self, name: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{name}.json")

    def _lossless(self) -> list[MeasuredScenario]:
        """Measured scenarios that are served, lossless and draw one image, in the file's order."""
        result = self.result()
        if result is None:
            return []
        return [
            s
            for s in result.of_side("head").values()
            if not s.calibration and not s.lossy and s.images == 1 and s.name in self._selected
        ]

    def _profiled(self) -> str | None:
        """The scenario to profile first: all-lossless if it was measured, else the fastest."""
        measured = [s.name for s in self._lossless()]
        return "all-lossless" if "all-lossless" in measured else self._fastest()

    def _fastest(self) -> str | None:
        measured = self._lossless()
        return min(measured, key=lambda s: s.step_ms).name if measured else None


def _single_rewrites() -> list[str]:
    """Scenarios that change one thing of `compiled`: SCENARIOS lists them after it."""
    names = [scenario.name for scenario in SCENARIOS]
    between = names[names.index("compiled") + 1 : names.index("all-lossless")]
    return [name for name in between if name not in TUNED]
