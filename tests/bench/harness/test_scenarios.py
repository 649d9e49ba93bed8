"""The table of scenarios, and what each prepares on the demo model."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import drive
from bench.harness.result_file import BenchResult
from bench.harness.scenarios import SCENARIOS, chosen
from bench.harness.torch_state import (
    LibrarySettings,
    check_settings_unchanged,
    compiler_settings,
)
from bench.harness.work import ScenarioFailed, choose_work
from kernels_warmup.recipes import RECIPES, TUNED
from serve.model.loading import load_model
from serve.settings import DEMO_MODEL
from tests.bench import made_up


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_batch_is_warm_and_a_run_that_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tracing without code generation is enough for a shape to be cold.
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_eagerly(function))
    work = choose_work("demo", "cpu", "64x64", 2)
    (compiled,) = (replace(s, compile="off", recipe={"scope": "whole"}) for s in chosen(["served"]))
    with asyncio.Runner() as runner:
        batch = drive.Served(replace(compiled, images=2), work, runner)
        assert batch.request(0, 0).total_ms > 0
        batch._scenario = replace(compiled, images=3)
        with pytest.raises(RuntimeError, match="fell back to running eagerly"):
            batch.request(0, 0)
        batch.close()


def test_scenarios_have_names_of_their_own_and_recipes_that_exist() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
    assert names[0] == "documented"
    assert names[-1] == "default"
    for scenario in SCENARIOS:
        for fields in (scenario.recipe, scenario.decoder):
            if fields is not None:
                drive.recipe_of(fields)


def test_a_scenario_may_have_steps_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    (offline_scenario,) = chosen(["offline"])
    work = choose_work("demo", "cpu", "64x64", 2)
    with asyncio.Runner() as runner:
        batch = drive.load_scenario(replace(offline_scenario, images=2, steps=3), work, runner)
        sample = batch.request(0, 0)
        batch.close()
    assert len(sample.steps_ms) == 2
    served, offline = (made_up.scenario(name, [2.0]) for name in ("served", "offline"))
    written = made_up.result(served, replace(offline, steps=made_up.STEPS))
    written.write(out)
    assert BenchResult.read(out).of_side("head")["offline"].steps == made_up.STEPS
    with pytest.raises(ValueError, match="steps instead of 3"):
        made_up.result(replace(offline, steps=3))


def test_what_max_does_is_all_lossless_and_tuning() -> None:
    (all_lossless,) = chosen(["all-lossless"])
    assert replace(RECIPES["max"], options={}) == drive.recipe_of(all_lossless.recipe)


def test_compiled_by_its_fields_is_compiled_by_its_mode() -> None:
    (pdl,) = chosen(["pdl"])
    assert replace(drive.recipe_of(pdl.recipe), options={}) == RECIPES["default"]


@pytest.mark.parametrize("name", [s.name for s in SCENARIOS if s.way == "served"])
def test_no_scenario_changes_how_another_is_compiled(name: str) -> None:
    (scenario,) = chosen([name])
    if scenario.quantize == "fp8" or scenario.attention not in ("auto", "math"):
        pytest.skip("cannot be prepared without a GPU; there `run` itself refuses such a change")
    before = compiler_settings()
    drive.prepare(scenario, load_model(DEMO_MODEL, None, "cpu", "float32"))
    check_settings_unchanged(before, compiler_settings())


def test_a_scenario_that_changes_the_compiler_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    def careless(*_: Any) -> None:
        config.coordinate_descent_tuning = not config.coordinate_descent_tuning

    (served,) = chosen(["served"])
    work = choose_work("demo", "cpu", "64x64", 2)
    defaults = LibrarySettings()
    monkeypatch.setattr(drive, "prepare", careless)
    try:
        with asyncio.Runner() as runner, pytest.raises(ScenarioFailed) as failed:
            drive.load_scenario(served, work, runner)
        assert "coordinate_descent_tuning" in str(failed.value)
        # The setting may belong to the process, as before torch 2.12; it is put back either way.
        careless()
        defaults.apply()
        assert LibrarySettings()._compiler == defaults._compiler
    finally:
        defaults.apply()


def test_only_the_kind_of_run_that_is_timed_is_warmed() -> None:
    (text_once,) = chosen(["text-once"])
    work = choose_work("demo", "cpu", "64x64", 2)
    with asyncio.Runner() as runner:
        for images in (1, 2):
            driven = drive.Served(replace(text_once, images=images), work, runner)
            shapes = driven.with_pipeline(lambda pipeline: pipeline.unet.forward.functions[0].met)
            assert [key[0][0][0] for key in shapes] == [2 * images]
            driven.close()


def test_every_option_for_inductor_is_one() -> None:
    from torch._inductor import config

    recipes = [*RECIPES.values()]
    for scenario in SCENARIOS:
        recipes += [drive.recipe_of(f) for f in (scenario.recipe, scenario.decoder) if f]
    (tuned,) = chosen(["tuned-products"])
    assert drive.recipe_of(tuned.recipe).options == TUNED
    named = {option for recipe in recipes for option in recipe.options}
    assert named
    assert named <= set(config.get_config_copy())
