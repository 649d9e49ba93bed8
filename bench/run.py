"""Time scenarios in interleaved rounds, and write every sample to a result file.

    python -m bench run
    python -m bench run --scenario diffusers default --requests 40 --out before.json
    python -m bench run --scenario default --base main

Scenarios that fit in memory together are timed in rounds, one after the other, so that a drift of
the machine affects all of them alike. With --base the same scenarios of another commit are timed
in the same rounds, each commit in a process of its own; `python -m bench compare` then says whether
the difference is real. An interrupted run keeps its samples, and --resume continues a file.

Exit status: 0 done; 1 a scenario failed; 2 wrong usage or nothing measured; 75 the time was up and
--resume continues; 130 or 143 interrupted. A scenario that needs what the machine lacks is not a
failure. With --resume a failed scenario is tried once more, and again whenever the code changed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.harness.result_file import BenchResult
from bench.harness.rounds import TIME_IS_UP, Bench, Interrupted
from bench.harness.scenarios import BASELINE, SCENARIOS, chosen
from bench.outputs import check_can_write, check_folder, output_file, output_folder

if TYPE_CHECKING:
    from bench.harness.result_file import Side
    from bench.harness.worker import BenchWorker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(scenario.name for scenario in SCENARIOS)
    parser.add_argument(
        "--scenario", nargs="+", metavar="NAME", help=f"scenarios to time (default: all): {names}"
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        metavar="NAME",
        help=f"time these in every group of scenarios, also when a file is continued (default: "
        f"{BASELINE.name}, if it is among the scenarios)",
    )
    parser.add_argument("--model", help="as SDXL_MODEL (default: demo without a CUDA device)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument(
        "--requests", type=int, default=20, help="timed requests a scenario (default: 20)"
    )
    parser.add_argument(
        "--rounds", type=int, help="rounds to divide the requests into (default: one request each)"
    )
    parser.add_argument("--base", metavar="REV", help="also time this commit, in the same rounds")
    parser.add_argument(
        "--out", type=output_file, help="result file (default: bench-DEVICE-DATE.json)"
    )
    parser.add_argument(
        "--results",
        type=output_folder,
        metavar="DIR",
        help="write or continue DIR/MACHINE-DATE-bench.json",
    )
    parser.add_argument("--resume", action="store_true", help="continue --out if it exists")
    parser.add_argument(
        "--price-per-hour",
        type=float,
        metavar="X",
        help="price of the machine, for the cost of images",
    )
    parser.add_argument(
        "--seconds-limit", type=float, metavar="S", help="start nothing that would end later"
    )
    parser.add_argument(
        "--prepare-seconds",
        type=float,
        metavar="S",
        help="no scenario takes longer to prepare, because its code is in the compiler's cache",
    )
    parser.add_argument("--commit", help="the measured commit, where there is no git checkout")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    scenarios = chosen(options.scenario and [*options.scenario, *(options.beside or ())])
    _check_options(options)
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import machine_slug
    from bench.harness.work import choose_work
    from bench.harness.worker import LocalWorker, WorkerProcess
    from bench.report.show import as_summary

    work = choose_work(options.model, options.device, options.shape, options.steps)
    out = options.out
    if options.results is not None:
        name = f"{machine_slug(work.device)}-{time.strftime('%Y-%m-%d', time.gmtime())}-bench.json"
        out, options.resume = options.results / name, True
    out = out or Path(f"bench-{machine_slug(work.device)}-{time.strftime('%Y%m%d-%H%M%S')}.json")
    check_can_write(out)
    check_folder(out.parent)  # it is written beside itself first, and then replaced
    with ExitStack() as stack:
        stack.enter_context(only_bench_on(work.device))
        stack.enter_context(_interrupted_by_signals())
        workers: list[BenchWorker] = []
        if options.base is None:
            workers.append(LocalWorker(work, "head", options.commit))
        else:
            from bench.harness.environment import ROOT
            from bench.harness.worktree import worktree

            place, base_commit = stack.enter_context(worktree(options.base, ROOT))
            fields = {"model": work.model, "device": work.device, "steps": work.steps}
            fields["shape"] = str(work.shape)
            sides: list[tuple[Path, Side, str | None]] = [
                (place, "base", base_commit),
                (ROOT, "head", options.commit),
            ]
            for root, side, commit in sides:
                workers.append(WorkerProcess(root, fields, side, commit))
                stack.callback(workers[-1].close)
        status = Bench(work, workers, out, options).measure(scenarios)
        if out.exists():
            print(as_summary(BenchResult.read(out)))
            print(f"written to {out}")
        if status > TIME_IS_UP and options.base is None:
            # A normal exit would finalize the interpreter while a thread runs native code, which
            # aborts the process.
            sys.stdout.flush()
            os._exit(status)
        return status


def _check_options(options: argparse.Namespace) -> None:
    rounds = options.requests if options.rounds is None else options.rounds
    if options.requests < 1 or not 1 <= rounds <= options.requests:
        raise BenchError(
            "--requests and --rounds: both must be at least 1, with no more rounds than requests"
        )
    if options.price_per_hour is not None and not options.price_per_hour > 0:
        raise BenchError("--price-per-hour must be above 0")
    if options.out is not None and options.results is not None:
        raise BenchError("--out and --results both name the file; use one of them")
    if options.resume and options.out is None and options.results is None:
        raise BenchError("--resume needs --out, the file to continue")
    if options.out is not None and options.out.exists() and not options.resume:
        raise BenchError(
            f"{options.out} exists; use --resume to continue it, or another name for a new file"
        )


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted in the main thread, so that a long compilation ends."""

    def interrupt(number: int, _frame: object) -> None:
        raise Interrupted(number)

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
