"""`python -m bench show`: its table, and its page in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.harness.result_file import BenchResult, NotRun
from bench.report.page import as_page
from bench.report.plots import PLOTS, drift
from bench.report.rows import lines
from tests.bench.made_up import GPU, noisy, request, result, scenario
from tests.bench.stats.test_compare import pair

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
Capture = pytest.CaptureFixture[str]


def stack() -> BenchResult:
    return result(
        scenario("documented", noisy(50, 12, 0.01, 1), calibration=True),
        scenario("bf16", noisy(40, 12, 0.01, 2)),
        scenario("fp8", noisy(20, 12, 0.01, 3), lossy=True, dtype="fp8", flops=None),
        scenario("default", noisy(25, 12, 0.01, 4), images=2),
    )


def test_the_table(tmp_path: Path, capsys: Capture) -> None:
    measured = replace(stack(), not_run=(NotRun("cudnn", "needs a CUDA device"),), partial=True)
    measured.write(tmp_path / "r.json")
    assert main(["show", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().out
    header = next(line for line in said.splitlines() if line.startswith("scenario"))
    assert re.split(r"\s{2,}", header) == [
        "scenario", "requests", "step ms", "of the first", "interval", "request ms", "images/s",
        "MFU", "x floor", "memory", "error", "per 1000",
    ]  # fmt: skip
    row = next(line for line in said.splitlines() if line.startswith("default"))
    assert re.search(r"default +12 +(24|25)\.\d\d +-7[45]\.\d% +-7\d\.\d% to -7\d\.\d%", row)
    assert "note: default draws 2 images a request" in said
    # 20 GFLOP at 1.5 TFLOP/s is a floor of 13.3 ms.
    assert row.split()[-5] in ("1.86", "1.87", "1.88", "1.89")
    assert "cudnn: needs a CUDA device" in said
    assert "was interrupted" in said
    assert "note: fp8 is lossy" in said
    assert "ceilings   float32 1.500 TFLOP/s; copy 20.00 GB/s" in said


def test_columns_without_a_figure_are_left_out(tmp_path: Path, capsys: Capture) -> None:
    bare = result(
        scenario("a", [25.0] * 3, peak_memory_bytes=None, flops=None, error_vs_fp32=None),
        environment=GPU,
    )
    replace(bare, price_per_hour=None).write(tmp_path / "r.json")
    assert main(["show", str(tmp_path / "r.json")]) == 0
    header = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("scenario"))
    assert header.split() == ["scenario", "requests", "step", "ms", "request", "ms", "images/s"]


def test_both_sides_are_shown_each_with_a_baseline() -> None:
    shown = lines(pair(0.9))
    assert [line.label for line in shown] == [
        "documented (base)", "documented (head)", "default (base)", "default (head)",
    ]  # fmt: skip
    ratios = [line.of_baseline.ratio if line.of_baseline else None for line in shown]
    assert ratios == [None, None, pytest.approx(0.5, abs=0.01), pytest.approx(0.45, abs=0.01)]


def test_a_batch_is_compared_by_its_images() -> None:
    """Four images in three times the time take a quarter less time each."""
    batch = scenario("batch-4", noisy(75, 12, 0.01, 2), images=4)
    (_, line) = lines(result(scenario("one", noisy(25, 12, 0.01, 1)), batch))
    assert line.ratio == pytest.approx(0.75, abs=0.02)
    assert line.of_baseline is not None
    assert line.of_baseline.verdict == "improved"
    assert line.times_floor == pytest.approx(75 / 13.33, rel=0.03)


def test_a_plot_of_many_lines_begins_with_two() -> None:
    many = [scenario(f"s{index}", noisy(25, 8, 0.01, index)) for index in range(9)]
    shown = lines(result(*many))
    drawn = [trace.name for trace in drift(shown).data if trace.visible is True]
    assert drawn == ["s0", "s8"]
    assert all(trace.visible is True for trace in drift(shown[:4]).data)


def test_too_few_rounds_show_no_interval() -> None:
    shown = lines(result(scenario("a", [25.0, 26.0]), scenario("b", [20.0, 21.0])))
    assert [line.of_baseline for line in shown] == [None, None]
    assert shown[1].ratio == pytest.approx((20 / 25 + 21 / 26) / 2)


def two_sessions(rounds: int) -> BenchResult:
    """The machine is slower in the second; `a` and `b` are as fast as the first scenario."""
    first, second = noisy(20, rounds, 0.004, 1), noisy(30, rounds, 0.004, 2)
    of_second = enumerate(noisy(30, rounds, 0.004, 4), start=rounds)
    return result(
        scenario("documented", first + second),
        scenario("a", noisy(20, rounds, 0.004, 3)),
        scenario("b", [30], requests=tuple(request(index, ms) for index, ms in of_second)),
    )


def test_a_ratio_is_that_of_the_rounds_of_its_interval() -> None:
    _, *others = lines(two_sessions(6))
    assert len(others) == 2
    for line in others:
        judged = line.of_baseline
        assert judged is not None
        assert judged.low is not None
        assert judged.high is not None
        assert line.ratio == judged.ratio
        assert judged.low < line.ratio < judged.high
        assert line.ratio == pytest.approx(1, abs=0.02)


def test_a_ratio_without_an_interval_is_of_the_common_rounds() -> None:
    _, *others = lines(two_sessions(3))
    assert len(others) == 2
    for line in others:
        assert line.of_baseline is None
        assert line.ratio == pytest.approx(1, abs=0.02)


def test_without_a_common_round_there_is_no_ratio() -> None:
    alone = scenario("b", [20], requests=(request(1, 20.0),))
    first, other = lines(result(scenario("a", [25.0]), alone))
    assert (first.is_baseline, other.is_baseline) == (True, False)
    assert other.ratio is None


def test_the_page_is_one_file_that_loads_nothing() -> None:
    page = as_page(stack(), "h200")
    outside = page[: page.index("<script>")] + page[page.rindex("<script>") :]
    assert "http" not in outside
    assert not re.search(r"<(script|img|iframe|link)[^>]*(src|href)=\"(?!data:)", outside)
    assert "<title>h200</title>" in page
    for _, name, _ in PLOTS:
        assert f"<h2>{name}</h2>" in page


def test_a_page_shows_no_plot_of_what_was_not_measured() -> None:
    page = as_page(result(scenario("a", [25.0], flops=None)), "r")
    assert "Distance from the floor" not in page
    assert "Through the run" not in page
    assert "The stack" in page


def test_a_page_of_two_sides_begins_with_the_verdict() -> None:
    page = as_page(pair(1.1), "r")
    assert page.index("Did it help") < page.index("The stack")
    assert '<tr class="red"><td>default</td><td>step</td>' in page


def test_text_from_a_file_is_escaped() -> None:
    nasty = "</script><b onclick=alert(1)>"
    page = as_page(result(scenario(nasty, noisy(20, 8, 0.01, 1), what=nasty)), nasty)
    assert nasty not in page
    assert "&lt;/script&gt;" in page


@pytest.mark.e2e
@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium, which is not installed"
)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(stack, id="one side", marks=pytest.mark.slow),
        pytest.param(lambda: pair(1.1), id="two sides"),
    ],
)
def test_a_browser_draws_every_plot(make: Callable[[], BenchResult], tmp_path: Path) -> None:
    make().write(tmp_path / "r.json")
    page = tmp_path / "page.html"
    assert main(["show", str(tmp_path / "r.json"), "--html", str(page)]) == 0
    assert CHROMIUM is not None
    ended = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=20000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    document = ended.stdout
    assert f'data-drawn="{len(PLOTS)}"' in document
    # No plot is empty.
    assert document.count('class="main-svg"') >= len(PLOTS)
    assert document.count('class="trace bars"') + document.count('class="point"') > len(PLOTS)
    # An error of the page's own script would be here.
    assert "Uncaught" not in ended.stderr


def test_a_missing_plotting_library_is_an_error(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack().write(tmp_path / "r.json")
    for name in ("page", "plots"):
        monkeypatch.delitem(sys.modules, f"bench.report.{name}")
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    assert main(["show", str(tmp_path / "r.json"), "--html", str(tmp_path / "p.html")]) == 2
    assert "pip install 'stepspan[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.json"], "cannot be read: No such file"),
        (["r.json", "--html", "no/p.html"], "cannot be written: No such file"),
    ],
)
def test_wrong_usage(
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    stack().write(tmp_path / "r.json")
    try:
        status = main(["show", *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err
