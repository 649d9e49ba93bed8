"""`python -m bench compare`: its text, its JSON and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.harness.result_file import BenchResult, Conditions, NotRun
from bench.report.table import in_place
from bench.stats.error_rates import NO_CHANGE
from tests.bench.made_up import CPU, GPU, noisy, result, scenario

Capture = pytest.CaptureFixture[str]


def pair(factor: float, *, noise: float = 0.003, count: int = 20) -> BenchResult:
    """Both sides in one file; head takes `factor` times as long, and the calibration the same."""
    return result(
        scenario("documented", noisy(50, count, noise, 1), "base", calibration=True),
        scenario("documented", noisy(50, count, noise, 2), "head", calibration=True),
        scenario("default", noisy(25, count, noise, 3), "base"),
        scenario("default", noisy(25 * factor, count, noise, 4), "head"),
    )


def single(factor: float, *, machine: float = 1, seed: int = 1, **fields: Any) -> BenchResult:
    """One side in a file, on a machine that is `machine` times slower."""
    return result(
        scenario("documented", noisy(50 * machine, 20, 0.003, seed), calibration=True),
        scenario("default", noisy(25 * factor * machine, 20, 0.003, seed + 1), **fields),
    )


def compared(
    tmp_path: Path, capsys: Capture, *results: BenchResult, also: tuple[str, ...] = ()
) -> tuple[int, dict[str, Any]]:
    """The exit status and what --json printed."""
    paths = []
    for index, measured in enumerate(results):
        paths.append(str(tmp_path / f"{index}.json"))
        measured.write(paths[-1])
    status = main(["compare", *paths, "--json", *also])
    return status, json.loads(capsys.readouterr().out)


def verdicts(printed: dict[str, Any]) -> set[str]:
    return {row["verdict"] for row in printed["rows"]}


@pytest.mark.parametrize(
    ("factor", "verdict", "status"),
    [(0.96, "improved", 0), (1.0, "no difference", 0), (1.04, "regressed", 1)],
)
def test_one_file_with_both_sides(
    tmp_path: Path, capsys: Capture, factor: float, verdict: str, status: int
) -> None:
    found, printed = compared(tmp_path, capsys, pair(factor))
    assert found == printed["exit_status"] == status
    assert verdicts(printed) == {verdict}
    assert printed["interleaved"] is True
    assert [(row["scenario"], row["quantity"]) for row in printed["rows"]] == [
        ("default", "step"),
        ("default", "request"),
    ]
    for row in printed["rows"]:
        assert row["low"] < row["ratio"] < row["high"]
        assert row["ratio"] == pytest.approx(factor, abs=0.005)


def test_an_undecided_comparison_is_neither_a_pass_nor_a_regression(
    tmp_path: Path, capsys: Capture
) -> None:
    status, printed = compared(tmp_path, capsys, pair(1.0, noise=0.05))
    assert (status, verdicts(printed)) == (3, {"inconclusive"})


def test_a_regression_outweighs_undecided_rows(tmp_path: Path, capsys: Capture) -> None:
    both = pair(1.05)
    noise = [scenario("loud", noisy(9, 20, 0.2, seed), s) for seed, s in ((5, "base"), (6, "head"))]  # type: ignore[arg-type]
    status, printed = compared(tmp_path, capsys, replace(both, scenarios=(*both.scenarios, *noise)))
    assert (status, verdicts(printed)) == (1, {"regressed", "inconclusive"})


def test_separate_runs_whose_calibration_agrees(tmp_path: Path, capsys: Capture) -> None:
    """The second machine is 0.5% slower for both scenarios, which cancels."""
    status, printed = compared(tmp_path, capsys, single(1.0), single(0.95, machine=1.005, seed=5))
    assert (status, verdicts(printed), printed["interleaved"]) == (0, {"improved"}, False)
    assert printed["rows"][0]["ratio"] == pytest.approx(0.95, abs=0.004)
    assert printed["rows"][0]["interleaved"] is False


def test_separate_runs_whose_calibration_disagrees(tmp_path: Path, capsys: Capture) -> None:
    status, printed = compared(tmp_path, capsys, single(1.0), single(0.8, machine=1.05, seed=5))
    assert (status, verdicts(printed)) == (3, {"not interleaved"})


def test_separate_runs_without_a_calibration(tmp_path: Path, capsys: Capture) -> None:
    bare = [result(scenario("default", noisy(25, 20, 0.01, seed))) for seed in (1, 2)]
    status, printed = compared(tmp_path, capsys, *bare)
    assert (status, verdicts(printed)) == (3, {"not interleaved"})
    assert "no calibration scenario in common" in printed["rows"][0]["reason"]


def test_a_calibration_is_not_judged_relative_to_itself(tmp_path: Path, capsys: Capture) -> None:
    files = single(1.0), single(1.0, seed=5)
    printed = compared(tmp_path, capsys, *files, also=("--scenario", "documented"))[1]
    assert verdicts(printed) == {"not interleaved"}


def other_machine(measured: BenchResult) -> BenchResult:
    return replace(measured, environment=GPU)


def other_workload(measured: BenchResult) -> BenchResult:
    return replace(measured, workload=replace(measured.workload, shape="256x256"))


def other_torch(measured: BenchResult) -> BenchResult:
    (code,) = measured.code
    return replace(measured, code=(replace(code, versions=code.versions | {"torch": "2.14.0"}),))


def other_power_limit(measured: BenchResult) -> BenchResult:
    (session,) = measured.sessions
    return replace(
        measured, sessions=(replace(session, start=Conditions(at_ns=1, power_limit_watts=350)),)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_machine, "device (cpu and cuda), gpu (none and NVIDIA H200)"),
        (other_workload, "shape (128x128 and 256x256)"),
        (other_torch, "torch (2.13.0 and 2.14.0)"),
        (other_power_limit, "power limit (none and 350 W)"),
    ],
)
def test_different_things_are_not_compared_and_what_differs_is_named(
    tmp_path: Path, capsys: Capture, change: Any, said: str
) -> None:
    status, printed = compared(tmp_path, capsys, single(1.0), change(single(0.9, seed=5)))
    assert (status, verdicts(printed)) == (3, {"not comparable"})
    assert said in printed["rows"][0]["reason"]


def test_what_may_differ_can_be_allowed(tmp_path: Path, capsys: Capture) -> None:
    both = single(1.0), other_torch(single(0.9, seed=5))
    assert compared(tmp_path, capsys, *both, also=("--allow", "torch"))[0] == 0
    assert main(["compare", *(str(tmp_path / f"{i}.json") for i in (0, 1)), "--allow", "trch"]) == 2
    assert "--allow trch" in capsys.readouterr().err


def test_scenarios_of_one_name_that_differ_are_not_compared(
    tmp_path: Path, capsys: Capture
) -> None:
    status, printed = compared(tmp_path, capsys, single(1.0), single(1.0, seed=5, images=4))
    assert (status, verdicts(printed)) == (3, {"not comparable"})
    assert printed["rows"][0]["reason"] == "these differ: images (1 and 4)"


def test_a_scenario_that_one_side_could_not_run_is_no_pass(tmp_path: Path, capsys: Capture) -> None:
    both = pair(1.0)
    measured = (s for s in both.scenarios if (s.name, s.side) != ("default", "head"))
    broken = replace(
        both,
        scenarios=tuple(measured),
        not_run=(NotRun("default", "it failed to compile", "head"),),
    )
    status, printed = compared(tmp_path, capsys, broken)
    assert (status, verdicts(printed)) == (3, {"not comparable"})
    assert printed["rows"][0]["reason"] == "head did not run it: it failed to compile"


def continued(*, first: str, then: str, source: str | None = None) -> BenchResult:
    """Head is as fast as base in 6 rounds, then 10% slower in 20; `bf16` is of the first only.

    The two arguments are head's commits in the two sessions.
    """
    head = [*noisy(25, 6, 0.003, 2), *noisy(27.5, 20, 0.003, 3)]
    both = result(
        scenario("bf16", noisy(25, 6, 0.003, 5), "base"),
        scenario("bf16", noisy(25, 6, 0.003, 6), "head"),
        scenario("default", noisy(25, 26, 0.003, 1), "base"),
        scenario("default", head, "head"),
    )
    base, other = both.code
    codes = [(base, replace(other, commit=name * 40, source=source)) for name in (first, then)]
    (session,) = both.sessions
    sessions = (
        replace(session, rounds=6),
        replace(session, first_round=6, rounds=20, code=codes[1]),
    )
    return replace(both, code=codes[0], sessions=sessions)


def test_the_rounds_of_the_last_code_are_judged(tmp_path: Path, capsys: Capture) -> None:
    status, printed = compared(tmp_path, capsys, continued(first="c", then="d"))
    assert status == 1
    assert printed["head"]["commit"] == "d" * 40
    rows = {row["scenario"]: row for row in printed["rows"] if row["quantity"] == "step"}
    default = rows["default"]
    assert (default["verdict"], default["rounds"]) == ("regressed", 20)
    assert default["ratio"] == pytest.approx(1.1, abs=0.005)
    assert default["head_ms"] == pytest.approx(27.5, abs=0.1)
    # It was measured with the first code only.
    assert rows["bf16"]["verdict"] == "not comparable"
    assert any("c" * 12 in note for note in printed["notes"])


def test_one_source_in_two_commits_is_one_code(tmp_path: Path, capsys: Capture) -> None:
    measured = continued(first="c", then="d", source="0123456789abcdef")
    _, printed = compared(tmp_path, capsys, measured)
    assert {(row["scenario"], row["rounds"]) for row in printed["rows"]} == {
        ("bf16", 6),
        ("default", 26),
    }
    assert not any("c" * 12 in note for note in printed["notes"])


def test_a_power_limit_counts_in_the_sessions_that_are_judged(
    tmp_path: Path, capsys: Capture
) -> None:
    """Two files of one code, of which one has a session of other code under another limit."""
    before, after = single(1.0), single(1.0)
    (session,) = before.sessions
    start = replace(session.start, power_limit_watts=700)
    of_first = replace(session, first_round=20, start=replace(start, power_limit_watts=350))
    code = (replace(before.code[0], commit="c" * 40),)
    continued_file = replace(
        before,
        code=code,
        sessions=(of_first, replace(session, start=start, code=before.code)),
    )
    other = replace(after, sessions=(replace(session, start=start),))
    _, printed = compared(tmp_path, capsys, continued_file, other)
    assert "not comparable" not in verdicts(printed)


def test_nothing_in_common_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    result(scenario("a", noisy(9, 9, 0.01, 1))).write(tmp_path / "a.json")
    result(scenario("b", noisy(9, 9, 0.01, 1))).write(tmp_path / "b.json")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "have no scenario in common: one has a, the other b" in capsys.readouterr().err


def test_the_control_of_an_interleaved_run_must_hold(tmp_path: Path, capsys: Capture) -> None:
    """The calibration is 5% slower on one side though it runs the same code there."""
    both = pair(0.9)
    slow = scenario("documented", noisy(52.5, 20, 0.003, 2), "head", calibration=True)
    scenarios = [slow if (s.name, s.side) == ("documented", "head") else s for s in both.scenarios]
    status, printed = compared(tmp_path, capsys, replace(both, scenarios=tuple(scenarios)))
    assert (status, verdicts(printed)) == (3, {"inconclusive"})
    assert "which runs no code of this project, differs by +5" in printed["rows"][0]["reason"]


def test_a_table_of_many_rows_errs_no_more_often_than_one(tmp_path: Path, capsys: Capture) -> None:
    """The interval of each row widens with their number."""

    def width(count: int) -> float:
        rows = [
            scenario(f"s{index}", noisy(25, 20, 0.01, 10 + 2 * index + (side == "head")), side)  # type: ignore[arg-type]
            for index in range(count)
            for side in ("base", "head")
        ]
        row = compared(tmp_path, capsys, result(*rows))[1]["rows"][0]
        return float(row["high"] - row["low"])

    assert width(10) > 1.3 * width(1)


def test_the_text_for_people(tmp_path: Path, capsys: Capture) -> None:
    both = pair(0.96)
    tired = replace(
        both.sessions[0],
        start=Conditions(at_ns=1, load_average=3.5),
        end=Conditions(at_ns=2, throttle_reasons=("sw_thermal_slowdown",)),
    )
    scenarios = tuple(
        replace(s, error_vs_fp32=0.012, settings={"attention": "cudnn"}) if s.side == "head" else s
        for s in both.scenarios
    )
    measured = replace(
        both,
        sessions=(tired,),
        scenarios=scenarios,
        partial=True,
        code=tuple(replace(code, dirty=code.side == "head") for code in both.code),
    )
    measured.write(tmp_path / "r.json")
    assert main(["compare", str(tmp_path / "r.json"), "--smallest-change", "0.5%"]) == 0
    said = capsys.readouterr().out
    assert "head  bbbbbbbbbbbb with changes  r.json" in said
    assert "2 cores of AMD EPYC, interleaved; changes under 0.5% do not matter" in said
    row = next(line.split() for line in said.splitlines() if line.startswith("default   step"))
    assert row[2:6] == [row[2], "ms", row[4], "ms"]
    assert row[6].startswith(("-3.", "-4."))
    assert row[-1] == "improved"
    assert "r.json was interrupted" in said
    assert "the machine was busy when the bench began: load 3.5 on 2 cores" in said
    assert "the GPU was throttled: sw_thermal_slowdown" in said
    assert "attention none -> cudnn" in said
    assert "error of one forward pass against float32 rose from 1e-05 to 0.012" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("r.json", "--scenario", "fp9"), "no scenario fp9 was measured; there are documented"),
        (("r.json", "r.json"), "holds both sides"),
        (("one.json",), "holds one side"),
        (("r.json",) * 3, "3 files were given"),
        (("nowhere.json",), "cannot be read: No such file"),
        (("r.json", "--smallest-change", "0"), "'0' is not a share between 0 and 50%"),
        (("r.json", "--smallest-change", "much"), "'much' is not a share"),
        (("r.json", "--smallest-change", "nan"), "'nan' is not a share"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(
    tmp_path: Path, capsys: Capture, arguments: tuple[str, ...], said: str
) -> None:
    pair(1.0).write(tmp_path / "r.json")
    single(1.0).write(tmp_path / "one.json")
    where = [str(tmp_path / part) if part.endswith(".json") else part for part in arguments]
    try:
        status = main(["compare", *where])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err


def test_one_scenario_can_be_selected(tmp_path: Path, capsys: Capture) -> None:
    printed = compared(tmp_path, capsys, pair(1.0), also=("--scenario", "documented"))[1]
    assert {row["scenario"] for row in printed["rows"]} == {"documented"}


def test_stages_can_be_selected(tmp_path: Path, capsys: Capture) -> None:
    """A stage that was not measured is not comparable."""
    stages = ("--quantity", "vae_decode", "image_encode")
    status, printed = compared(tmp_path, capsys, pair(0.9), also=stages)
    decode, encode = printed["rows"]
    assert (status, decode["verdict"], encode["verdict"]) == (3, "improved", "not comparable")
    assert encode["reason"] == "image_encode was not measured on both"


@pytest.mark.docs
def test_the_documented_comparison_is_that_of_its_file(capsys: Capture) -> None:
    assert main(["compare", str(NO_CHANGE)]) == 0
    page = (NO_CHANGE.parents[2] / "docs" / "bench.md").read_text()
    shown = in_place(page, "comparison")[1]
    assert shown == f"```text\n{capsys.readouterr().out.strip()}\n```"


def test_as_a_process(tmp_path: Path) -> None:
    """The exit status that CI sees; no model library is loaded."""
    pair(1.1).write(tmp_path / "r.json")
    code = (
        "import sys\nfrom bench.__main__ import main\n"
        f"status = main(['compare', {str(tmp_path / 'r.json')!r}])\n"
        "print(*sys.modules, file=sys.stderr)\nsys.exit(status)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "regressed" in ended.stdout
    assert set(ended.stderr.split()).isdisjoint({"torch", "diffusers", "transformers", "plotly"})
    assert CPU.cpu in ended.stdout
