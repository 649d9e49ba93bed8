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
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.harness.rounds import TIME_IS_UP
from bench.harness.run_record import ATTEMPTS
from bench.harness.scenarios import SCENARIOS, chosen
from bench.outputs import check_folder, output_file, output_folder
from bench.session.plan import TEST_SECONDS, Piece, SessionPlan
from bench.session.progress import Archive, PieceLog

if TYPE_CHECKING:
    from bench.harness.work import Work

Start = Callable[[Sequence[str], float, Path | None], int]
"""Runs `python -m ARGUMENTS` with a time limit in seconds and an optional file for its output;
returns the exit status."""

PIECE_SECONDS = 470.0
"""Time limit of a piece, for machines whose commands may take ten minutes."""
SPARE_SECONDS = 40.0
"""How long before its time limit a piece stops starting scenarios, to write its results."""


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
        self.plan = SessionPlan(work, stem, options)
        self._log = PieceLog(stem.with_name(f"{stem.name}-session.json"))
        self._given_up: dict[str, str] = {}
        """The reason why a piece is not tried again in this call, by name."""

    def run(self) -> int:
        """Returns the exit status."""
        while (piece := self._next()) is not None:
            self._run_piece(piece)
            if self._archive is not None:
                self._archive.write()
        left = [piece for piece in self.plan.pieces() if not self.done(piece)]
        late = [piece for piece in left if piece.name not in self._given_up]
        for line in self._summary(late):
            print(line, flush=True)
        if self._work.on_cuda:
            from bench.report.targets import render

            print(render(self._stem.parent))
        return 1 if self._given_up or self._failed() else TIME_IS_UP if late else 0

    def print_plan(self) -> None:
        """Print every piece, whether it is done, and its command."""
        for piece in self.plan.pieces():
            mark = "done" if self.done(piece) else f"{piece.seconds:.0f} s"
            print(f"{mark:>6}  {piece.name:32} python -m {' '.join(piece.command)}")

    def _summary(self, late: Sequence[Piece]) -> Iterator[str]:
        """A line for each scenario, with its step time or why it has none, then for the pieces."""
        result = self.plan.result()
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
        result = self.plan.result()
        return [] if result is None else [n.name for n in result.not_run if n.failed]

    def _next(self) -> Piece | None:
        """The first piece that is not done and fits into the time left."""
        for piece in self.plan.pieces():
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
        return not self.plan.unmeasured(piece.scenarios, piece.requests)

    def _say(self, text: str) -> None:
        print(f"[session {self._clock() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)
