"""docs/scaling.md shows what the commands print."""

from __future__ import annotations

import re
import shlex

import pytest

from bench.__main__ import main
from bench.capacity import tables
from bench.capacity.service_times import read
from bench.capacity.trace_volume import trace_volume
from tests.support.processes import ROOT

pytestmark = pytest.mark.docs

PAGE = ROOT / "docs" / "scaling.md"


def between(name: str) -> str:
    _, _, rest = PAGE.read_text().partition(f"<!-- {name}: begin -->\n")
    return rest.partition(f"\n<!-- {name}: end -->")[0]


def test_the_command_answers_what_the_page_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    [(command, shown)] = re.findall(
        r"```console\n\$ python -m bench (capacity .*)\n((?:.*\n)+?)```", PAGE.read_text()
    )
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == shown


def test_the_table_of_spans_is_the_exporters() -> None:
    steps = read(tables.RESULTS).steps
    assert between("spans table") == tables.spans(steps)
    assert f"a span is {trace_volume(steps).span_bytes:.0f} bytes" in PAGE.read_text()


def test_the_table_of_predicted_and_seen_is_that_of_the_recorded_loads() -> None:
    assert between("check table") == tables.checks()


@pytest.mark.slow
def test_the_table_of_queues_is_the_simulations() -> None:
    assert between("queueing table") == tables.queueing(read(tables.RESULTS))
