"""Measure everything in the table of targets, in pieces, the most informative first.

    python -m bench session --device cuda --model random:sdxl-base --shape 1024x1024 --minutes 9
    python -m bench session --archive /tmp/half-hour.tar.gz --minutes 9
    python -m bench session --model demo --shape 64x64 --steps 2 --requests 2 --list

Each piece is one command in a process of its own, with a time limit. A later call measures what is
missing. A piece or a scenario that failed is tried once more, and again whenever the code changed.
With --archive the results and the logs are kept in one file outside the tree, and a later call with
the same file continues from it.

Exit status: 0 everything is measured, or needs what this machine lacks; 1 something failed; 2 wrong
usage; 75 nothing failed, but the time was not enough: the same command continues.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.harness.own_folder import own_folder
from bench.harness.result_file import BenchResult, MeasuredScenario
from bench.harness.rounds import TIME_IS_UP
from bench.harness.run_record import ATTEMPTS, NO_TIME, code_digest
from bench.harness.scenarios import SCENARIOS, Scenario, chosen
from bench.outputs import check_folder, output_file, output_folder
from bench.stats.verdict import FEWEST_ROUNDS

if TYPE_CHECKING:
    from bench.harness.work import Work

Start = Callable[[Sequence[str], float, Path | None], int]
"""Runs `python -m ARGUMENTS` with a time limit in seconds and an optional file for its output;
returns the exit status."""

PIECE_SECONDS = 470.0
"""Time limit of a piece, for machines whose commands may take ten minutes."""
SPARE_SECONDS = 40.0
"""How long before its time limit a piece stops starting scenarios, to write its results."""
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
        "--only", nargs="+", metavar="NAME", help="run only the pieces whose names begin like this"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="start no piece that would end later"
    )
    parser.add_argument(
        "--piece-seconds",
        type=float,
        default=PIECE_SECONDS,
        metavar="S",
        help=f"time limit of a piece (default: {PIECE_SECONDS:.0f})",
    )
    parser.add_argument(
        "--results",
        type=output_folder,
        metavar="DIR",
        help="folder for the result files (default: bench/results)",
    )
    parser.add_argument(
        "--archive",
        type=output_file,
        metavar="FILE.tar.gz",
        help="keep all results and logs in this file instead, and continue from it",
    )
    parser.add_argument("--commit", help="the measured commit, where there is no git checkout")
    parser.add_argument("--list", action="store_true", help="print the plan, and run nothing")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    from bench.harness.environment import machine_slug
    from bench.harness.work import choose_work

    chosen(options.scenario)
    if options.requests < 1 or options.piece_seconds <= SPARE_SECONDS:
        raise BenchError(
            f"--requests must be at least 1, and --piece-seconds above {SPARE_SECONDS:.0f}"
        )
    if options.archive is not None and options.results is not None:
        raise BenchError(
            "--archive and --results both name a place for the results; use one of them"
        )
    work = choose_work(options.model, options.device, options.shape, options.steps)
    with ExitStack() as stack:
        folder = options.results or Path("bench/results")
        archive = None
        if options.archive is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stepspan-")))
            check_folder(options.archive.parent)  # it is written beside itself, and then replaced
            archive = Archive(options.archive, folder)
        check_folder(folder)
        day = time.strftime("%Y-%m-%d", time.gmtime())
        model = Path(work.model).name.replace(":", "-")
        stem = f"{machine_slug(work.device)}-{day}-{model}-{work.shape}"
        session = MeasurementSession(work, folder / stem, options, archive)
        if options.list:
            session.print_plan()
            return 0
        return session.run()


def start(command: Sequence[str], seconds: float, log: Path | None = None) -> int:
    """Implements `Start`. A process past its limit gets SIGTERM first, to keep its samples."""
    with ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        )
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


class Archive:
    """Keeps a folder in one compressed file. At first the file, if it exists, fills the folder.

    Raises:
        BenchError: the file cannot be read or written.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder
        if not path.exists():
            self.write()  # fails now, and not after the first minutes on a GPU
            return
        try:
            with tarfile.open(path) as kept:
                kept.extractall(folder, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise BenchError(f"{path} cannot be read: {type(error).__name__}") from None

    def write(self) -> None:
        """Replace the file with the present content of the folder."""
        beside = self._path.with_name(f".{self._path.name}.new")
        try:
            with tarfile.open(beside, "w:gz") as kept:
                for path in sorted(self._folder.iterdir()):
                    kept.add(path, path.name)
            beside.replace(self._path)
        except OSError as error:
            raise BenchError(f"{self._path} cannot be written: {error.strerror}") from None


class PieceLog:
    """The outcome of each piece, in a file beside the results.

    Failed attempts are counted for one state of the code: when it changes, the counts start at
    zero.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._code = path, code_digest()
        kept = json.loads(path.read_text()) if path.exists() else {}
        self._succeeded: dict[str, bool] = kept.get("succeeded", {})
        same = kept.get("code") == self._code
        self._attempts: dict[str, int] = kept.get("tries", {}) if same else {}

    def succeeded(self, name: str) -> bool:
        return self._succeeded.get(name, False)

    def exhausted(self, name: str) -> bool:
        """Whether the piece failed as often as is allowed."""
        return self._attempts.get(name, 0) >= ATTEMPTS

    def begin(self, name: str) -> None:
        self._attempts[name] = self._attempts.get(name, 0) + 1
        self._write()

    def end(self, name: str, *, success: bool) -> None:
        """Record that the piece ended without failing; `success` if it is complete."""
        self._attempts.pop(name, None)
        self._succeeded[name] = success
        self._write()

    def _write(self) -> None:
        kept = {"code": self._code, "tries": self._attempts, "succeeded": self._succeeded}
        self._path.write_text(json.dumps(kept, indent=1) + "\n")


class MeasurementSession:
    """Runs the pieces in order until all are done or the time is up."""

    def __init__(
        self,
        work: Work,
        stem: Path,
        options: argparse.Namespace,
        archive: Archive | None = None,
        start: Start = start,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work, self._stem, self._options, self._archive = work, stem, options, archive
        self._start, self._clock = start, clock
        self._began = clock()
        self._asked = tuple(scenario.name for scenario in chosen(options.scenario))
        self._log = PieceLog(stem.with_name(f"{stem.name}-session.json"))
        self._given_up: dict[str, str] = {}
        """The reason why a piece is not tried again in this call, by name."""
        self._read: tuple[int, BenchResult] | None = None

    def run(self) -> int:
        """Returns the exit status."""
        while (piece := self._next()) is not None:
            self._run_piece(piece)
            if self._archive is not None:
                self._archive.write()
        left = [piece for piece in self.pieces() if not self.done(piece)]
        late = [piece for piece in left if piece.name not in self._given_up]
        for line in self._summary(late):
            print(line, flush=True)
        if self._work.on_cuda:
            from bench.report.targets import render

            print(render(self._stem.parent))
        return 1 if self._given_up or self._failed() else TIME_IS_UP if late else 0

    def print_plan(self) -> None:
        """Print every piece, whether it is done, and its command."""
        for piece in self.pieces():
            mark = "done" if self.done(piece) else f"{piece.seconds:.0f} s"
            print(f"{mark:>6}  {piece.name:32} python -m {' '.join(piece.command)}")

    def _summary(self, late: Sequence[Piece]) -> Iterator[str]:
        """A line for each scenario, with its step time or why it has none, then for the pieces."""
        result = self._result()
        if result is not None:
            for scenario in result.of_side("head").values():
                yield f"{scenario.name:24} {scenario.step_ms:9.3f} ms a step"
            for missing in result.not_run:
                yield f"{missing.name:24} {missing.why}"
        for name, reason in self._given_up.items():
            yield f"{name:24} FAILED: {reason}"
        for piece in late:
            yield f"{piece.name:24} not started: it may need {piece.seconds:.0f} s"
        if not late and not self._given_up:
            yield "every piece is done"

    def _failed(self) -> list[str]:
        """Names of the scenarios that failed."""
        result = self._result()
        return [] if result is None else [n.name for n in result.not_run if n.failed]

    def _next(self) -> Piece | None:
        """The first piece that is not done and fits into the time left."""
        for piece in self.pieces():
            if self.done(piece) or piece.name in self._given_up:
                continue
            if self._log.exhausted(piece.name):
                self._given_up[piece.name] = f"it failed or was interrupted {ATTEMPTS} times"
            elif piece.seconds <= self._left():
                return piece
        return None

    def _left(self) -> float:
        """Seconds left to this call."""
        minutes: float | None = self._options.minutes
        return math.inf if minutes is None else 60 * minutes - (self._clock() - self._began)

    def _run_piece(self, piece: Piece) -> None:
        limit = min(self._options.piece_seconds, self._left())
        if piece.name == "gpu-tests":
            limit = min(limit, TEST_SECONDS)
        command = [*piece.command, *piece.out_option, str(piece.out)]
        if piece.scenarios or piece.name.startswith("precompile"):
            command += ["--seconds-limit", f"{max(1.0, limit - SPARE_SECONDS):.0f}"]
        self._say(f"{piece.name}: python -m {' '.join(command)}")
        self._log.begin(piece.name)
        began = self._clock()
        log = None
        if self._archive is not None:
            log = self._stem.with_name(f"{self._stem.name}-{piece.name}.log")
        status = self._start(command, limit, log)
        self._say(f"{piece.name}: status {status} after {self._clock() - began:.0f} s")
        if status in (0, TIME_IS_UP):
            self._log.end(piece.name, success=status == 0)
        if status == 0 and not self.done(piece):
            self._given_up[piece.name] = "it exited with status 0, but its result is incomplete"
        elif status not in (0, TIME_IS_UP) and (
            status in (1, 2) or self._log.exhausted(piece.name)
        ):
            self._given_up[piece.name] = f"it exited with status {status}"
        if log is not None and status not in (0, TIME_IS_UP):
            print(log.read_text(errors="replace")[-2000:], file=sys.stderr, flush=True)

    def done(self, piece: Piece) -> bool:
        """Whether the piece's file has all its results, or reasons why they cannot be measured."""
        if not piece.scenarios:
            return self._log.succeeded(piece.name) and piece.out.exists()
        return not self._unmeasured(piece.scenarios, piece.requests)

    def _unmeasured(self, names: Sequence[str], requests: int) -> list[str]:
        """Those of these scenarios that are not measured and not impossible on this machine."""
        result = self._result()
        if result is None:
            return list(names)
        have = {s.name for s in result.scenarios if len(s.requests) >= requests}
        have |= {n.name for n in result.not_run if n.reason != NO_TIME and not n.failed}
        return [name for name in names if name not in have]

    def _result(self) -> BenchResult | None:
        path = self._file("bench")
        if not path.exists():
            return None
        # Read again only after a change: every piece needs it, and it grows to megabytes.
        written = path.stat().st_mtime_ns
        if self._read is None or self._read[0] != written:
            self._read = written, BenchResult.read(path)
        return self._read[1]

    # The plan

    def pieces(self) -> list[Piece]:
        """All pieces in order. The scenario to profile depends on the results so far."""
        only = tuple(self._options.only or ())
        return [piece for piece in self._all() if not only or piece.name.startswith(only)]

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
        first = [name for name in FIRST if name in self._asked] or [*self._asked[:2]]
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
        names = ("compiled", *_single_rewrites(), "all-lossless") if on_cuda else self._asked
        if asked := [name for name in names if name in self._asked]:
            uncompiled = () if on_cuda else ("--uncompiled",)
            yield self._piece("numerics", "--scenario", *asked, *uncompiled, seconds=(460, 120))
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
        asked = [one for one in names if one in self._asked]
        if not asked:
            return
        requests = min(self._options.requests, most_requests)
        to_compile = [
            s.name
            for s in chosen(asked)
            if s.prepare_seconds[0] > CACHED_SECONDS and self._unmeasured([s.name], 1)
        ]
        if self._work.on_cuda and to_compile:
            command = ("bench", "precompile", *self._workload(), "--scenario", *to_compile)
            # The file that names what was compiled stays on the machine, as the compiler's cache
            # does: another machine has to compile again.
            out = own_folder() / self._file(f"precompile-{name}").name
            yield Piece(f"precompile-{name}", command, out, 150)
        beside = [one for one in beside if one in self._asked]
        options = self._options
        unmeasured = self._unmeasured(asked, requests)
        to_prepare = unmeasured[:1] + beside
        seconds = sum(self._prepare_seconds(s) for s in chosen(to_prepare or asked[:1]))
        cached = all(
            self._prepare_seconds(s) <= CACHED_SECONDS for s in chosen([*unmeasured, *beside])
        )
        yield Piece(
            name,
            (
                *("bench", "run", "--scenario", *asked),
                *(("--beside", *beside) if beside else ()),
                *self._workload(),
                *("--steps", str(options.steps), "--requests", str(requests), "--resume"),
                *(("--prepare-seconds", f"{CACHED_SECONDS:.0f}") if cached and unmeasured else ()),
                *(("--commit", options.commit) if options.commit else ()),
            ),
            self._file("bench"),
            START_SECONDS + seconds,
            tuple(asked),
            requests,
        )

    def _prepare_seconds(self, scenario: Scenario) -> float:
        """An upper bound; what was prepared on this machine is in the compiler's cache."""
        seconds = scenario.prepare_seconds[0 if self._work.on_cuda else 1]
        known = scenario.name not in self._unmeasured([scenario.name], 1)
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
        result = self._result()
        if result is None:
            return []
        return [
            s
            for s in result.of_side("head").values()
            if not s.calibration and not s.lossy and s.images == 1 and s.name in self._asked
        ]

    def _profiled(self) -> str | None:
        """The scenario to profile first: all-lossless if it was measured, else the fastest."""
        measured = [s.name for s in self._lossless()]
        return "all-lossless" if "all-lossless" in measured else self._fastest()

    def _fastest(self) -> str | None:
        measured = self._lossless()
        return min(measured, key=lambda s: s.step_ms).name if measured else None

    def _say(self, text: str) -> None:
        print(f"[session {self._clock() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)


def _single_rewrites() -> list[str]:
    """Scenarios that change one thing of `compiled`: SCENARIOS lists them after it."""
    names = [scenario.name for scenario in SCENARIOS]
    between = names[names.index("compiled") + 1 : names.index("all-lossless")]
    return [name for name in between if name not in TUNED]
