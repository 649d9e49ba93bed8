"""Show a result as a table, or as a page with plots.

    python -m bench show RESULT
    python -m bench show RESULT --html PAGE.html

The page is one file that needs no network. It shows every scenario from the baseline to the
default, step times by index, distributions, drift through the run, and how far each step is from
its floor: its nominal FLOPs at the rate of matrix products measured in the same session.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.errors import BenchError
from bench.harness.result_file import BenchResult
from bench.outputs import output_file
from bench.report.rows import columns, facts, lines, remarks
from bench.terminal import coloured, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="RESULT")
    parser.add_argument(
        "--html", type=output_file, metavar="PAGE", help="write an HTML page to PAGE instead"
    )


def run(options: argparse.Namespace) -> int:
    result = BenchResult.read(options.file)
    if options.html is None:
        print(as_text(result))
        return 0
    try:
        from bench.report.page import as_page
    except ModuleNotFoundError as error:
        raise BenchError(
            f"an HTML page needs the package {error.name}, which is not installed: "
            "pip install 'stepspan[bench]'"
        ) from error
    try:
        options.html.write_text(as_page(result, options.file.stem), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{options.html} cannot be written: {error.strerror}") from error
    print(options.html)
    return 0


def as_summary(result: BenchResult) -> str:
    """The figures in short, without the machine and the notes."""
    names = ("scenario", "step ms", "of the first", "interval", "request ms", "error")
    return "\n".join([table(*columns(lines(result), names)), *_not_run(result)])


def as_text(result: BenchResult) -> str:
    shown = lines(result)
    text = [f"{name:<10} {value}" for name, value in facts(result)]
    text += ["", table(*columns(shown))]
    text += _not_run(result)
    text += [coloured(f"note: {remark}", "yellow") for remark in remarks(result)]
    return "\n".join(text)


def _not_run(result: BenchResult) -> list[str]:
    if not result.not_run:
        return []
    return ["", "not run:", *(f"  {missing.name}: {missing.why}" for missing in result.not_run)]
