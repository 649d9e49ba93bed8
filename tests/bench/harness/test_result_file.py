"""Results are read as they were written; an invalid file is refused with one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.errors import ResultFileError
from bench.harness import result_file
from bench.harness.result_file import BenchResult, NotRun, RequestSample, Session
from tests.bench.made_up import noisy, request, result, scenario


def two_scenarios() -> BenchResult:
    return result(
        scenario("eager", noisy(25, 8, 0.01, seed=1), calibration=True),
        scenario("default", noisy(20, 8, 0.01, seed=2), images=2),
    )


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = replace(two_scenarios(), not_run=(NotRun("fp8", "needs a GPU"),), partial=True)
    written.write(tmp_path / "r.json")
    assert BenchResult.read(tmp_path / "r.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_layout_is_free_but_content_is_not(tmp_path: Path) -> None:
    """Reformatting a file does not change its content."""
    text = two_scenarios().to_json()
    assert BenchResult.parse(json.dumps(json.loads(text), indent=7)) == two_scenarios()


def test_each_request_is_on_a_line_of_its_own() -> None:
    """So that people can read a file and compare two."""
    lines = [line for line in two_scenarios().to_json().splitlines() if '"round"' in line]
    assert len(lines) == 18
    assert all(line.strip(" ,")[-1] == "}" and '"steps_ms": [' in line for line in lines)


def test_the_figures_in_a_file_are_what_its_samples_give() -> None:
    measured = two_scenarios()
    written = json.loads(measured.to_json())["result"]["scenarios"][1]["figures"]
    head = measured.of_side("head")["default"]
    seconds = head.request_ms / 1000
    assert written["images_per_second"] == pytest.approx(2 / seconds)
    assert written["cost_per_thousand_images"] == pytest.approx(2.5 * seconds / 3600 * 1000 / 2)
    # 20 GFLOP a step against 1.5 TFLOP/s would take 13.3 ms.
    assert written["mfu"] == pytest.approx(2e10 / 1.5e12 * 1000 / head.step_ms)


def test_ceilings_are_the_best_of_all_sessions() -> None:
    measured = two_scenarios()
    first = measured.sessions[0]
    assert first.ceilings is not None
    better = replace(first.ceilings, matmul_tflops={"float32": 1.7}, copy_gb_per_second=10.0)
    more = replace(measured, sessions=(first, Session(8, 2, first.start, ceilings=better)))
    assert more.ceilings == result_file.Ceilings({"float32": 1.7}, 20.0)


@pytest.mark.timeout(20)
def test_a_session_may_have_any_number_of_rounds() -> None:
    many = edited(lambda c: c["sessions"][0].update(rounds=10**12), signed=True)
    assert BenchResult.parse(many).sessions[0].rounds == 10**12


@pytest.mark.parametrize(("first_round", "shared"), [(7, True), (8, False), (0, True)])
def test_sessions_may_not_share_a_round_in_any_order(first_round: int, shared: bool) -> None:
    measured = two_scenarios()
    (first,) = measured.sessions
    assert (first.first_round, first.rounds) == (0, 8)
    for sessions in permutations([Session(first_round, 2, first.start), first]):
        if shared:
            with pytest.raises(ValidationError, match="share a round"):
                replace(measured, sessions=sessions)
        else:
            assert replace(measured, sessions=sessions)


def edited(change: Callable[[dict[str, Any]], None], *, signed: bool) -> str:
    """The file with its content changed; `signed` gives it the digest of its new content."""
    document = json.loads(two_scenarios().to_json())
    change(document["result"])
    if signed:
        document["digest"] = result_file._digest(result_file._canonical(document["result"]))
    return json.dumps(document)


def set_first_step(value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["scenarios"][0]["requests"][2]["steps_ms"][0] = value

    return change


def test_an_edit_by_hand_is_noticed() -> None:
    with pytest.raises(ResultFileError, match=r"^here was changed after it was written"):
        BenchResult.parse(edited(set_first_step(19.0), signed=False), name="here")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("workload"), "workload is missing"),
        (lambda c: c["scenarios"][0].pop("requests"), "scenarios.0.requests is missing"),
        (lambda c: c["scenarios"][0].update(speed=1), "scenarios.0.speed is not a field"),
        (lambda c: c["scenarios"][0].update(requests=[]), "scenarios.0.requests: .* at least 1"),
        (lambda c: c["scenarios"][0]["requests"][0].update(steps_ms=[]), "at least 1"),
        (lambda c: c.update(scenarios=[]), "scenarios: .* at least 1"),
        (set_first_step(0), "steps_ms.0: .* greater than 0"),
        (set_first_step(-3.0), "steps_ms.0: .* greater than 0"),
        (set_first_step("20"), "steps_ms.0: .* valid number"),
        (set_first_step(None), "steps_ms.0: .* valid number"),
        (lambda c: c["scenarios"].append(c["scenarios"][0]), "eager is there twice"),
        (lambda c: c["scenarios"][0].update(side="base"), "side without code"),
        (lambda c: c["scenarios"][0]["requests"][0].update(round=99), "round 99, which no session"),
        (lambda c: c["workload"].update(steps=9), "6 steps instead of 9"),
        (lambda c: c["workload"].update(shape="big"), "workload.shape"),
        (
            lambda c: c["scenarios"][0]["requests"][0].update(gpu_queue_ms=[1.0]),
            "1 values for 6 steps",
        ),
        (lambda c: c.update(code=c["code"] * 2), "names the side head twice"),
        (lambda c: c.update(sessions=c["sessions"] * 2), "two sessions share a round"),
    ],
)
def test_an_unsound_result_is_refused_even_with_its_digest(
    change: Callable[[dict[str, Any]], None], said: str
) -> None:
    with pytest.raises(ResultFileError, match=said) as caught:
        BenchResult.parse(edited(change, signed=True), name="here")
    assert str(caught.value).startswith("here ")
    assert "\n" not in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


VALID = result(scenario("a", [25.0, 26.0])).to_json()


@pytest.mark.parser
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused_with_a_sentence(data: st.DataObject) -> None:
    """One node of a valid file is replaced by any value, and the digest is made again."""
    document = json.loads(VALID)
    node, key = document, "result"
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 3)):
        node = node[key]
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
    node[key] = data.draw(JSON_VALUES)
    document["digest"] = result_file._digest(result_file._canonical(document["result"]))
    with suppress(ResultFileError):
        assert isinstance(BenchResult.parse(json.dumps(document)), BenchResult)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_is_not_a_number_is_refused(value: str) -> None:
    text = edited(set_first_step("X"), signed=False).replace('"X"', value)
    with pytest.raises(ResultFileError, match=f"here holds {value}, which is not a measurement"):
        BenchResult.parse(text, name="here")


def test_a_number_past_every_float_is_refused() -> None:
    document = json.loads(edited(set_first_step(math.inf), signed=True), parse_constant=float)
    text = json.dumps(document).replace("Infinity", "1e999")
    with pytest.raises(ResultFileError, match="finite number"):
        BenchResult.parse(text)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    text = two_scenarios().to_json()
    (tmp_path / "r.json").write_text(text[: int(share * len(text))])
    with pytest.raises(ResultFileError, match=r"is not complete JSON \(line \d+, column \d+\)"):
        BenchResult.read(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not a result of this bench"),
        ('{"scenarios": {}}', "not a result of this bench"),
        ('{"format": "stepspan-bench"}', "schema version None; this bench reads version 1"),
        ('{"format": "stepspan-bench", "schema_version": 2}', "schema version 2"),
        ('{"format": "stepspan-bench", "schema_version": 1}', "has no result in it"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_another_kind_of_file_is_refused(text: str, said: str) -> None:
    with pytest.raises(ResultFileError, match=said):
        BenchResult.parse(text)


def test_a_file_that_cannot_be_read_or_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match="cannot be read: No such file"):
        BenchResult.read(tmp_path / "none.json")
    with pytest.raises(ResultFileError, match="cannot be read: Is a directory"):
        BenchResult.read(tmp_path)
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ResultFileError, match="is not a text file"):
        BenchResult.read(tmp_path / "picture")
    with pytest.raises(ResultFileError, match="cannot be written: No such file"):
        two_scenarios().write(tmp_path / "no" / "r.json")


def test_a_request_says_no_more_than_was_measured() -> None:
    with pytest.raises(ValidationError):
        replace(request(0, 20), steps_ms=(math.nan,))
    assert isinstance(replace(request(0, 20), gpu_queue_ms=()), RequestSample)
