from __future__ import annotations

import re
from dataclasses import replace

import pytest

from bench.harness.result_file import NotRun
from bench.report.table import PAGE, in_place, is_shown, render_run, tables
from tests.bench.made_up import GPU, noisy, request, result, scenario


@pytest.mark.docs
@pytest.mark.parametrize("name", ["gpu table", "target table", "cpu table", "bench tables"])
def test_the_page_shows_what_the_results_say(name: str) -> None:
    assert in_place(PAGE.read_text(), name)[1] == tables()[name]


def test_a_run_is_one_table_in_the_order_of_its_stack() -> None:
    measured = result(
        scenario("documented", [20.0, 20.2, 19.8, 20.1, 20.0, 19.9, 20.0, 20.1]),
        scenario("default", [10.0, 10.1, 9.9, 10.05, 10.0, 9.95, 10.0, 10.05]),
    )
    measured = replace(measured, not_run=(NotRun("graph", "it needs a CUDA device"),))
    text = render_run(measured)
    rows = [line for line in text.splitlines() if line.startswith(("| documented", "| default"))]
    assert rows[0].startswith("| documented | 20.00 | 1 |")
    assert rows[1].startswith("| default | 10.00 | 0.500 (0.500 to 0.500)")
    assert "2 cores of AMD EPYC, torch 2.13.0" in text
    assert "Not run here: graph (it needs a CUDA device)." in text
    random_weights = replace(
        measured, workload=replace(measured.workload, model="random:sdxl-base")
    )
    assert "not accuracy-qualified" in render_run(random_weights)


def test_the_ratio_on_the_page_is_within_its_interval() -> None:
    """The machine is slower in the second half, which only the first scenario has."""
    measured = result(
        scenario("documented", [*noisy(20, 8, 0.004, 1), *noisy(30, 10, 0.004, 2)]),
        scenario("default", noisy(20, 8, 0.004, 3)),
    )
    row = next(line for line in render_run(measured).splitlines() if line.startswith("| default"))
    ratio, low, high = (float(figure) for figure in re.findall(r"\d\.\d{3}", row)[:3])
    assert low < ratio < high


def test_a_scenario_without_a_common_round_has_no_ratio_on_the_page() -> None:
    alone = scenario("default", [20], requests=(request(1, 20.0),))
    text = render_run(result(scenario("documented", [25.0]), alone))
    assert "| documented | 25.00 | 1 |" in text
    assert "| default | 20.00 | - |" in text


def test_a_full_size_model_on_a_cpu_is_not_on_the_page() -> None:
    measured = result(scenario("documented", [20.0] * 3))
    assert is_shown(measured)
    work = replace(measured.workload, model="random:sdxl-base")
    assert not is_shown(replace(measured, workload=work))
    assert is_shown(replace(measured, workload=work, environment=GPU))
