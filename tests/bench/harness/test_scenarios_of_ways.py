"""Every way in `kernels_warmup.recipes` can be measured: the bench has scenarios for it."""

import pytest

from bench.harness.scenarios import KERNELS, SCENARIOS, Scenario, chosen
from kernels_warmup.recipes import WAYS

MEASURED = {name for name, way in WAYS.items() if way.measured is not None}
UNMEASURED = [name for name, way in WAYS.items() if name not in MEASURED and not way.fp8_only]


def ways_of(scenario: Scenario) -> set[str]:
    """The ways that a scenario's own recipe turns on."""
    recipe = scenario.recipe or {}
    return {name for name, way in WAYS.items() if recipe.get(name) == way.on}


@pytest.mark.parametrize("name", WAYS)
def test_a_scenario_turns_it_on(name: str) -> None:
    assert any(name in ways_of(scenario) for scenario in SCENARIOS)


@pytest.mark.parametrize("name", UNMEASURED)
def test_what_no_gpu_has_measured_has_a_scenario_with_it_alone_and_one_without_it(
    name: str,
) -> None:
    alone = MEASURED | {name}
    if name == "residual_products":
        alone |= {"layer_norm"}
    assert any(ways_of(scenario) == alone for scenario in SCENARIOS)
    (everything,) = chosen(["all-lossless"])
    (all_but,) = chosen([f"all-but-{name.replace('_', '-')}"])
    assert ways_of(everything) == MEASURED | set(UNMEASURED)
    assert name in ways_of(everything) - ways_of(all_but)


def test_the_benchs_kernels_are_the_lossless_triton_kernels() -> None:
    assert set(KERNELS) == {n for n, way in WAYS.items() if way.triton and not way.fp8_only}
