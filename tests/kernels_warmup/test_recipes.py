import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch

from kernels_warmup.recipes import RECIPES, WAYS, Recipe, mode_for
from tests.support.processes import ROOT

OFF = RECIPES["off"]


def ways_of(recipe: Recipe) -> set[str]:
    """The ways that are on in a recipe."""
    return {name for name in WAYS if getattr(recipe, name) != getattr(OFF, name)}


def test_every_field_of_a_recipe_but_three_is_a_way() -> None:
    names = [field.name for field in fields(Recipe)]
    assert names[:3] == ["scope", "replay", "options"]
    assert set(names[3:]) == set(WAYS)


def test_the_default_mode_does_what_a_gpu_has_measured_and_max_every_lossless_way() -> None:
    measured = {name for name, way in WAYS.items() if way.measured is not None}
    lossless = {name for name, way in WAYS.items() if not way.fp8_only}
    assert ways_of(RECIPES["default"]) == ways_of(RECIPES["regional"]) == measured
    assert ways_of(RECIPES["max"]) == lossless
    for name in lossless:
        assert getattr(RECIPES["max"], name) == WAYS[name].on


def test_only_max_does_what_no_gpu_has_measured() -> None:
    def rewrites(mode: Any) -> tuple[object, ...]:
        recipe = RECIPES[mode]
        return recipe.group_norm, recipe.upsample, recipe.zero_text, recipe.time_once

    for mode in ("off", "regional", "default"):
        assert rewrites(mode) == (False, "nearest", False, False)
    assert rewrites("rewritten") == (False, "nearest", True, True)
    assert rewrites("max") == (True, "transposed", True, True)


def test_reading_the_recipes_loads_no_torch() -> None:
    code = "import sys, kernels_warmup.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("setting", "device", "mode"),
    [
        ("auto", "cuda", "default"),
        ("auto", "cpu", "rewritten"),
        ("off", "cpu", "off"),
        ("off", "cuda", "off"),
        ("max", "cpu", "max"),
    ],
)
def test_the_mode_for_auto_depends_on_the_device(setting: str, device: str, mode: str) -> None:
    assert mode_for(setting, torch.device(device)) == mode
