"""`python -m bench`: measure the service and its model, and judge and show the results.

Each subcommand is a module with `add_arguments(parser)` and `run(options) -> int`, which returns
the exit status and raises BenchError if it cannot run. Only the module of the given subcommand is
imported, so that `--help` answers at once and without torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError


@dataclass(frozen=True)
class Command:
    """A subcommand: its module in `bench`, and its line in `--help`."""

    module: str
    help: str
    compiles: bool = False
    """Whether it, or a process that it starts, compiles code that a later call can use again."""

    def load(self) -> Any:
        return importlib.import_module(f"bench.{self.module}")


COMMANDS = {
    "session": Command(
        "session.run", "measure everything in the table of targets, in resumable pieces"
    ),
    "precompile": Command(
        "session.precompile",
        "compile several scenarios at once, before they are timed",
        compiles=True,
    ),
    "run": Command(
        "run",
        "time scenarios in interleaved rounds, of this commit or of two commits",
        compiles=True,
    ),
    "overhead": Command(
        "service.overhead", "telemetry overhead of a request: wall time and CPU", compiles=True
    ),
    "coldstart": Command(
        "service.coldstart", "time from process start to first image, cold and from cache, by phase"
    ),
    "micro": Command(
        "micro.pieces", "time of our own code: telemetry, and the work around a request's steps"
    ),
    "loras": Command(
        "micro.loras", "what a LoRA costs: changing the weights, and a step with it", compiles=True
    ),
    "kernels": Command(
        "kernels.profile", "where the time of a step goes, by kernel", compiles=True
    ),
    "launches": Command(
        "kernels.launches",
        "the kernels a step launches on a Hopper GPU, counted without one",
        compiles=True,
    ),
    "numerics": Command(
        "kernels.numerics",
        "whether each lossless scenario is as close to float32 as eager bfloat16",
        compiles=True,
    ),
    "operators": Command(
        "kernels.operators",
        "time of every product, convolution, attention and norm of a step, each by itself",
        compiles=True,
    ),
    "peers": Command(
        "peers.throughput",
        "throughput with concurrent clients, beside the documented example, BentoML and LitServe",
        compiles=True,
    ),
    "bare": Command(
        "micro.harness_check",
        "what the bench reports, against a minimal timing loop",
        compiles=True,
    ),
    "compare": Command("stats.compare", "judge whether HEAD is faster than BASE, and by how much"),
    "show": Command("report.show", "show a result as a table, or as a page with plots"),
    "busy": Command("service.busy", "request time on a busy machine: beside endless loops"),
    "streams": Command(
        "service.streams", "what previews and waiting streams cost, and how late step events are"
    ),
    "load": Command("service.load", "latency, goodput and rejections of a server under load"),
    "capacity": Command(
        "capacity.plan", "how many replicas a rate needs for a p95, what they cost, and their spans"
    ),
    "overload": Command(
        "endurance.overload", "half to four times the load that a server can serve: does it hold?"
    ),
    "soak": Command(
        "endurance.soak", "thousands of requests of every kind: does the process grow?"
    ),
}
"""By name, in the order of `--help`."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; 2 is wrong usage or input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure the service, and judge the results."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = arguments[0] if arguments else None
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.help, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == given:
            module = command.load()
            subparser.description = module.__doc__
            module.add_arguments(subparser)
    options = parser.parse_args(arguments)
    from kernels_warmup.cpu_threads import choose_cpu_threads
    from serve.telemetry.logs import quiet_model_libraries

    # Before a command loads torch, and for the processes that it starts.
    choose_cpu_threads()
    quiet_model_libraries()
    try:
        with _ended_by_sigterm():
            status = _run(COMMANDS[options.command], options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe early, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that every server and worker that was started is ended too."""

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: Command, options: argparse.Namespace) -> int:
    module = command.load()
    status: int
    if command.compiles:
        from bench.harness.own_folder import code_kept

        with code_kept():
            status = module.run(options)
    else:
        status = module.run(options)
    return status


if __name__ == "__main__":
    # `python -m` looks for packages in the working directory first.
    if sys.path[0] == os.getcwd() and os.path.dirname(__file__) != os.path.join(
        sys.path[0], "bench"
    ):
        del sys.path[0]
        from serve.working_directory import name_shadowing_files

        name_shadowing_files("run it from another directory")
    sys.exit(main())
