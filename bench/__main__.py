"""`python -m bench`: the subcommands. Only the one that is asked for is imported, so that `--help`
answers without a model library.

A subcommand is a module with `add_arguments(parser)` and `run(options) -> int`, its exit status. It
raises BenchError for what it cannot do.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from bench.errors import BenchError

COMMANDS = {
    "run": "time scenarios in interleaved rounds, of this commit or beside another",
    "overhead": "what telemetry costs a request: wall time and CPU",
    "coldstart": "process start to first image, cold and from cache, by phase",
    "micro": "what our own pieces cost by themselves",
    "kernels": "where the time of a step goes, by kernel",
    "launches": "what a step launches on a Hopper GPU, counted without one",
    "operators": "every product, convolution and attention of a step by itself",
    "peers": "throughput beside the documented example, served as written",
    "bare": "what the bench reports against the same work timed bare",
    "compare": "is HEAD faster than BASE, by how much, and is that real",
    "show": "a result as a table, or as a page with plots",
    "load": "latency, goodput and rejections of a server under a given rate of requests",
}
"""By name, which is also the module's in `bench`, in the order of `--help`."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; 2 is wrong usage or input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, and judge.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked_for = arguments[0] if arguments else None
    for name, told in COMMANDS.items():
        command = commands.add_parser(
            name, help=told, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == asked_for:
            module = importlib.import_module(f"bench.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
    options = parser.parse_args(arguments)
    try:
        status: int = importlib.import_module(f"bench.{options.command}").run(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


if __name__ == "__main__":
    sys.exit(main())
