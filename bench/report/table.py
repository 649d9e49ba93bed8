"""`python -m bench.report.table`: render the tables of docs/performance.md from the result files.

Ratios are of one run, whose scenarios were timed in interleaved rounds. The same files always give
the same tables.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.harness.result_file import BenchResult
from bench.report.rows import lines
from bench.report.targets import render as render_targets
from bench.stats.intervals import ratio_interval

ROOT = Path(__file__).resolve().parents[2]
STACK = ROOT / "bench" / "results" / "h200-2026-11-22-unet-stack.json"
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "bench" / "results" / "cpu-2026-11-26-figures.json"

STEP_BASELINE, DECODE_BASELINE = "fp16-eager", "vae-bf16-eager"
ROWS = (
    ("fp16-eager", "one step: as documented, fp16 and eager"),
    ("bf16-eager", "one step: bf16, eager"),
    ("captured", "one step: the same in one CUDA graph"),
    ("blocks", "one step: `SDXL_COMPILE=regional`"),
    ("whole", "one step: `SDXL_COMPILE=default`, what ships"),
    ("vae-bf16-eager", "VAE decode: bf16, eager"),
    ("vae-whole", "VAE decode: `default`, what ships"),
)


def render_figures(figures: dict[str, Any]) -> str:
    """The result of `bench.report.figures` as a Markdown table."""
    stages = figures["stage_median_ms"]
    model = ("text_encode", "denoise", "vae_decode")
    which_times = ("median", "p95", "max")
    rows = [
        ("process start to ready", f"{figures['ready_seconds']:.1f} s"),
        ("`import serve.app`", f"{figures['import_app_seconds']:.2f} s"),
        ("resident memory", f"{figures['resident_mb']:.0f} MB"),
        (
            f"a request of {figures['steps']} steps at {figures['shape']}, median",
            f"{figures['request_median_ms']:.0f} ms",
        ),
        *((f"of which {name}", f"{stages[name]:.1f} ms") for name in model),
        ("a step, median", f"{figures['step_median_ms']:.1f} ms"),
        (
            f"unattributed time, median, p95 and largest of {figures['requests']}",
            ", ".join(f"{figures[f'unattributed_{which}_ms']:.2f}" for which in which_times)
            + " ms",
        ),
    ]
    machine = f"{figures['cores']} cores of {figures['machine']}, torch {figures['torch']}"
    lines = [f"| {machine} | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


def render_stack(results: dict[str, Any]) -> str:
    """The first session on a GPU as a Markdown table. Its file is older than the result format."""
    scenarios = results["scenarios"]
    lines = [
        "| | ms | of the first such row (95% interval) | error of one forward | compile |",
        "|---|---|---|---|---|",
    ]
    for name, label in ROWS:
        scenario = scenarios[name]
        base = DECODE_BASELINE if name.startswith("vae") else STEP_BASELINE
        ratio = "1"
        if name != base:
            ratio = str(ratio_interval(scenarios[base]["runs_ms"], scenario["runs_ms"]))
        compiled = f"{scenario['prepare_seconds']:.0f} s" if "compile" in scenario["what"] else "-"
        lines.append(
            f"| {label} | {scenario['median_ms']:.1f} | {ratio} "
            f"| {scenario['error_vs_fp32']:.4f} | {compiled} |"
        )
    return "\n".join(lines)


def render_runs() -> str:
    """A Markdown table for each kept result of `python -m bench run`."""
    read = (BenchResult.read(path) for path in sorted(RESULTS.glob("*-bench.json")))
    return "\n\n".join(render_run(result) for result in read if is_shown(result))


def is_shown(result: BenchResult) -> bool:
    """Whether the README shows the result.

    A full-size model on a CPU, at a small size, only shows that the bench works.
    """
    return result.environment.device == "cuda" or not result.workload.model.startswith("random:")


def render_run(result: BenchResult) -> str:
    """One result as a Markdown table, with the scenarios that could not run below it."""
    work, environment, code = result.workload, result.environment, result.code[-1]
    machine = environment.gpu or f"{environment.cores} cores of {environment.cpu}"
    guidance = "guidance on" if work.guidance else "guidance off"
    weights = ""
    if work.model.startswith("random:"):
        weights = "; random weights, so not accuracy-qualified"
    day = datetime.fromtimestamp(result.sessions[0].start.at_ns / 1e9, UTC).date()
    where = f"{machine}, torch {code.versions.get('torch', '?')}, {day}"
    what = f"{work.model} at {work.shape}, {work.steps} steps, {guidance}{weights}"
    text = [
        f"{where}: {what}.",
        "",
        "| scenario | step, ms | of the first (interval) | request, ms | images/s | error | |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines(result):
        scenario, judged = line.scenario, line.of_baseline
        ratio = "1" if line.is_baseline else "-" if line.ratio is None else f"{line.ratio:.3f}"
        if judged is not None:
            ratio += f" ({judged.low:.3f} to {judged.high:.3f})"
        error = "-" if scenario.error_vs_fp32 is None else f"{scenario.error_vs_fp32:.4f}"
        text.append(
            f"| {line.label} | {scenario.step_ms:.2f} | {ratio} | {scenario.request_ms:.1f} "
            f"| {scenario.images_per_second:.3f} | {error} | {scenario.what} |"
        )
    if result.not_run:
        reasons = "; ".join(f"{n.name} ({n.why})" for n in result.not_run)
        text += ["", f"Not run here: {reasons}."]
    return "\n".join(text)


def tables() -> dict[str, str]:
    """Each table by the name of its markers on the page."""
    return {
        "target table": render_targets(RESULTS),
        "bench tables": render_runs(),
        "gpu table": render_stack(json.loads(STACK.read_text())),
        "cpu table": render_figures(json.loads(FIGURES.read_text())),
    }


def in_place(text: str, name: str) -> tuple[str, str, str]:
    """The text before, between and after the markers called `name`."""
    before, rest = text.split(f"<!-- {name}: begin -->")
    inside, after = rest.split(f"<!-- {name}: end -->")
    return before, inside.strip(), after


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report.table", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="put the tables into docs/performance.md"
    )
    options = parser.parse_args()
    text = PAGE.read_text()
    for name, table in tables().items():
        if f"<!-- {name}: begin -->" in text:
            before, _, after = in_place(text, name)
            text = f"{before}<!-- {name}: begin -->\n{table}\n<!-- {name}: end -->{after}"
        if not options.write:
            print(table, end="\n\n")
    if options.write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
