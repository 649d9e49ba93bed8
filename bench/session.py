"""One sitting on a machine: all that the targets need, in pieces, what tells most first.

    python -m bench session --device cuda --model random:sdxl-base --shape 1024x1024 --minutes 9
    python -m bench session --model demo --shape 64x64 --steps 2 --requests 2 --list

Each piece is a command of this bench in a process of its own, ended when it takes too long, and has
a result file of its own, named after the device, the day and the workload. A later call on the same
day goes on with what is missing; a piece that failed or was cut off twice is left out.

Exit status: 0 everything is there; 1 a piece failed; 2 wrong usage; 75 time was up, and the same
command goes on.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.result_file import BenchResult, MeasuredScenario
from bench.run import NO_TIME, TIME_IS_UP, Attempts
from bench.scenarios import SCENARIOS, Scenario, chosen
from bench.verdict import FEWEST_ROUNDS

if TYPE_CHECKING:
    from bench.drive import Work

Start = Callable[[Sequence[str], float], int]
"""Runs a command of the bench for at most so many seconds; returns its exit status."""

PIECE_SECONDS = 470.0
"""Where a machine's commands may take ten minutes, and a piece is not the whole of one."""
SPARE_SECONDS = 40.0
"""Of a piece that times scenarios: what it starts no scenario in, to write down what it has."""
START_SECONDS = 60.0
"""To import, measure what the device can reach, and compute a float32 reference."""

STANDARD = ("documented", "bf16", "compiled", "default")
LOSSLESS = ("all-lossless",)
BATCHES = ("batch-8", "all-batch-8")
FP8 = ("fp8", "all-fp8", "fp8-fused", "fp8-static", "fp8-batch-8", "all-fp8-batch-8")
OFFLINE = ("offline", "fp8-offline", "all-offline", "all-fp8-offline")
BATCH_REQUESTS = FEWEST_ROUNDS
"""Of scenarios that take seconds each: the fewest that a verdict is given on."""
TUNED = ("tuned-kernels", "tuned-products", "max")
"""Last: each may take a session by itself, and goes on where it was cut off."""
COLD_STARTS = ("default", "regional", "off")


@dataclass(frozen=True)
class Piece:
    """One command with one result file."""

    name: str
    command: tuple[str, ...]
    """The bench's, without where it writes to."""
    out: Path
    seconds: float
    """It takes at most, as far as is known; what times scenarios, until it has one more."""
    scenarios: tuple[str, ...] = ()
    """That it adds to a file which other pieces write to as well."""
    requests: int = 0
    """Of each of these."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(scenario.name for scenario in SCENARIOS)
    parser.add_argument("--model", help="as SDXL_MODEL (default: demo without a CUDA device)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: 30)")
    parser.add_argument(
        "--requests", type=int, default=10, help="timed requests a scenario (default: 10)"
    )
    parser.add_argument(
        "--scenario", nargs="+", metavar="NAME", help=f"time only these (default: all): {names}"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only the pieces whose names begin like this"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="start no piece that would end later"
    )
    parser.add_argument(
        "--piece-seconds",
        type=float,
        default=PIECE_SECONDS,
        metavar="S",
        help=f"end a piece after so long (default: {PIECE_SECONDS:.0f})",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("bench/results"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument(
        "--list", action="store_true", help="say what there is to do, and do nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    from bench.drive import choose_work
    from bench.environment import machine_slug

    chosen(options.scenario)
    if options.requests < 1 or options.piece_seconds <= SPARE_SECONDS:
        raise BenchError(
            f"--requests: 1 and more; --piece-seconds: above {SPARE_SECONDS:.0f} are allowed"
        )
    work = choose_work(options.model, options.device, options.shape, options.steps)
    if not options.results.is_dir():
        raise BenchError(f"{options.results} is not a folder to write results to")
    day = time.strftime("%Y-%m-%d", time.gmtime())
    model = Path(work.model).name.replace(":", "-")
    stem = f"{machine_slug(work.device)}-{day}-{model}-{work.shape}"
    session = Sitting(work, options.results / stem, options)
    if options.list:
        session.tell()
        return 0
    return session.go()


def start(command: Sequence[str], seconds: float) -> int:
    """As `Start`. SIGTERM first, so that what was measured is kept."""
    process = subprocess.Popen([sys.executable, "-m", "bench", *command])
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            return process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            return 128 + 9 if process.wait() < 0 else process.returncode
    except BaseException:
        process.terminate()
        process.wait()
        raise


class Sitting:
    """What there is to do, in order, and doing it until it is done or the time is up."""

    def __init__(
        self,
        work: Work,
        stem: Path,
        options: argparse.Namespace,
        start: Start = start,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work, self._stem, self._options = work, stem, options
        self._start, self._clock = start, clock
        self._began = clock()
        self._asked = tuple(scenario.name for scenario in chosen(options.scenario))
        self._attempts = Attempts(stem.with_name(f"{stem.name}-pieces"))
        self._over: dict[str, str] = {}
        """Why a piece is not tried again in this call."""
        self._read: tuple[int, BenchResult] | None = None

    def go(self) -> int:
        """Returns the exit status."""
        while (piece := self._next()) is not None:
            self._do(piece)
        left = [piece for piece in self.pieces() if not self.done(piece)]
        failed = [piece for piece in left if piece.name in self._over]
        late = [piece for piece in left if piece.name not in self._over]
        for piece in failed:
            self._say(f"{piece.name}: {self._over[piece.name]}")
        for piece in late:
            self._say(f"{piece.name}: not started, it takes up to {piece.seconds:.0f} s")
        if not left:
            self._say("everything is there")
        if self._work.on_cuda:
            from bench.targets import render

            print(render(self._stem.parent))
        return TIME_IS_UP if late else 1 if failed else 0

    def tell(self) -> None:
        """Every piece, whether it is done, and the command that does it."""
        for piece in self.pieces():
            mark = "done" if self.done(piece) else f"{piece.seconds:.0f} s"
            print(f"{mark:>6}  {piece.name:32} python -m bench {' '.join(piece.command)}")

    def _next(self) -> Piece | None:
        """The first that is not done and fits into what time is left."""
        for piece in self.pieces():
            if self.done(piece) or piece.name in self._over:
                continue
            if self._attempts.spent(piece.name):
                self._over[piece.name] = "failed or was cut off twice"
            elif piece.seconds <= self._left():
                return piece
        return None

    def _left(self) -> float:
        """Seconds of this call."""
        minutes: float | None = self._options.minutes
        return math.inf if minutes is None else 60 * minutes - (self._clock() - self._began)

    def _do(self, piece: Piece) -> None:
        limit = min(self._options.piece_seconds, self._left())
        command = [*piece.command, "--out", str(piece.out)]
        if piece.scenarios or piece.name == "precompile":
            command += ["--seconds-limit", f"{max(1.0, limit - SPARE_SECONDS):.0f}"]
        self._say(f"{piece.name}: python -m bench {' '.join(command)}")
        self._attempts.begin(piece.name)
        began = self._clock()
        status = self._start(command, limit)
        self._say(f"{piece.name}: status {status} after {self._clock() - began:.0f} s")
        if status in (0, TIME_IS_UP):
            self._attempts.end(piece.name)
        if status == 0 and not self.done(piece):
            self._over[piece.name] = "it is over, and not all of it is there"
        elif status in (1, 2):
            self._over[piece.name] = f"failed with status {status}"

    def done(self, piece: Piece) -> bool:
        """Whether its file has what it adds, or why that cannot be there."""
        if not piece.scenarios:
            return piece.out.exists()
        return not self._unmeasured(piece.scenarios, piece.requests)

    def _unmeasured(self, names: Sequence[str], requests: int) -> list[str]:
        """Of these scenarios, those of which the file says nothing."""
        result = self._result()
        if result is None:
            return list(names)
        have = {s.name for s in result.scenarios if len(s.requests) >= requests}
        have |= {missing.name for missing in result.not_run if missing.reason != NO_TIME}
        return [name for name in names if name not in have]

    def _result(self) -> BenchResult | None:
        path = self._file("bench")
        if not path.exists():
            return None
        # Asked for by every piece, and megabytes by the end of the day.
        written = path.stat().st_mtime_ns
        if self._read is None or self._read[0] != written:
            self._read = written, BenchResult.read(path)
        return self._read[1]

    # What there is to do

    def pieces(self) -> list[Piece]:
        """In order. What to profile at the end depends on what has been measured until then."""
        only = tuple(self._options.only or ())
        return [piece for piece in self._all() if not only or piece.name.startswith(only)]

    def _all(self) -> Iterator[Piece]:
        on_cuda = self._work.on_cuda
        ways = _ways()
        spoken_for = {*STANDARD, *ways, *LOSSLESS, *BATCHES, *FP8, *OFFLINE, *TUNED}
        rest = [scenario.name for scenario in SCENARIOS if scenario.name not in spoken_for]
        yield from self._scenarios("standard", STANDARD, beside=("documented",))
        known = self._profiled()
        if known is not None:
            yield from self._kernels(known)
        if on_cuda:
            yield from self._precompile((*ways, *LOSSLESS, *BATCHES, *FP8))
        # All of them first: should the time not last, that is the figure; one by one says why.
        yield from self._scenarios("lossless", LOSSLESS)
        yield from self._scenarios("ways", ways)
        for name, of_eight in (("batches", BATCHES), ("fp8", FP8), ("offline", OFFLINE)):
            yield from self._scenarios(
                name, of_eight, beside=("compiled",), most_requests=BATCH_REQUESTS
            )
        yield self._command("micro", "--device", self._work.device, seconds=(90, 90))
        for mode in COLD_STARTS if on_cuda else ("auto",):
            more = ("--compile", mode, "--steps", str(self._work.steps))
            yield self._piece("coldstart", *more, name=f"coldstart-{mode}", seconds=(240, 90))
        fastest = self._fastest()
        if fastest is not None and fastest != known:
            yield from self._kernels(fastest)
        yield self._piece("operators", seconds=(150, 120))
        # On a GPU what a sitting decides on, which the compiler's cache has by then.
        names = ("compiled", *ways, *LOSSLESS) if on_cuda else self._asked
        asked = [name for name in names if name in self._asked]
        if asked:
            uncompiled = () if on_cuda else ("--uncompiled",)
            yield self._piece("numerics", "--scenario", *asked, *uncompiled, seconds=(460, 120))
        yield from self._scenarios("rest", rest, beside=("documented",))
        yield from self._scenarios("tuned", TUNED)

    def _precompile(self, names: Sequence[str]) -> Iterator[Piece]:
        """Of what is not measured yet. Its file stays on the machine, as the compiler's cache does:
        another machine that goes on with the results has to compile again."""
        out = Path(tempfile.gettempdir()) / self._file("precompile").name
        asked = [name for name in names if name in self._asked]
        if unmeasured := self._unmeasured(asked, 1):
            command = ("precompile", *self._workload(), "--scenario", *unmeasured)
            yield Piece("precompile", command, out, 420)

    def _scenarios(
        self,
        name: str,
        names: Sequence[str],
        beside: Sequence[str] = ("documented", "compiled"),
        most_requests: int = 100,
    ) -> Iterator[Piece]:
        """What times scenarios, those that differ by one change beside what they change."""
        asked = [one for one in names if one in self._asked]
        if not asked:
            return
        beside = [one for one in beside if one in self._asked]
        options = self._options
        requests = min(options.requests, most_requests)
        first = next(iter(self._unmeasured(asked, requests)), asked[0])
        seconds = sum(self._prepare_seconds(s, s.name == first) for s in chosen([first, *beside]))
        yield Piece(
            name,
            (
                "run",
                *("--scenario", *asked),
                *(("--beside", *beside) if beside else ()),
                *self._workload(),
                *("--steps", str(options.steps), "--requests", str(requests), "--resume"),
                *(("--commit", options.commit) if options.commit else ()),
            ),
            self._file("bench"),
            START_SECONDS + seconds,
            tuple(asked),
            requests,
        )

    def _prepare_seconds(self, scenario: Scenario, is_new: bool) -> float:
        """What has run on this machine today is found in the compiler's cache."""
        seconds = scenario.prepare_seconds[0 if self._work.on_cuda else 1]
        return seconds if is_new else min(seconds, 40)

    def _kernels(self, scenario: str) -> Iterator[Piece]:
        for part in ("step", "decode"):
            more = ("--scenario", scenario, "--part", part)
            yield self._piece(
                "kernels", *more, name=f"kernels-{scenario}-{part}", seconds=(120, 180)
            )

    def _piece(
        self, command: str, *more: str, name: str | None = None, seconds: tuple[float, float]
    ) -> Piece:
        return self._command(command, *self._workload(), *more, name=name, seconds=seconds)

    def _command(
        self, command: str, *more: str, name: str | None = None, seconds: tuple[float, float]
    ) -> Piece:
        name = name or command
        allowed = seconds[0 if self._work.on_cuda else 1]
        return Piece(name, (command, *more), self._file(name), allowed)

    def _workload(self) -> tuple[str, ...]:
        work = self._work
        return ("--model", work.model, "--device", work.device, "--shape", str(work.shape))

    def _file(self, name: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{name}.json")

    def _lossless(self) -> list[MeasuredScenario]:
        """Served, one image a request, and nothing lost; the file's own order."""
        result = self._result()
        if result is None:
            return []
        return [
            s
            for s in result.of_side("head").values()
            if not s.calibration and not s.lossy and s.images == 1 and s.name in self._asked
        ]

    def _profiled(self) -> str | None:
        """What is profiled first: `compiled`, or where that is not asked for what there is."""
        if "compiled" in self._asked:
            return "compiled"
        return next((s.name for s in self._lossless()), None)

    def _fastest(self) -> str | None:
        measured = self._lossless()
        return min(measured, key=lambda s: s.step_ms).name if measured else None

    def _say(self, text: str) -> None:
        print(f"[session {self._clock() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)


def _ways() -> list[str]:
    """Each a single change of what `compiled` does; they stand behind it in the stack."""
    names = [scenario.name for scenario in SCENARIOS]
    between = names[names.index("compiled") + 1 : names.index("all-lossless")]
    return [name for name in between if name not in TUNED]
