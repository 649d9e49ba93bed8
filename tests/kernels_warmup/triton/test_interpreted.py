"""What the Triton kernels compute, in Triton's interpreter, without a GPU.

`test_compiled` checks that they compile for Hopper; tests/gpu checks what they compute there.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from tests.kernels_warmup.triton_here import require_triton
from tests.support.processes import ROOT, clean_environment

require_triton()

pytestmark = pytest.mark.timeout(240)

ROUNDING = {"float32": 1e-6, "float16": 3e-4}
"""Relative error of one operator. Rounding an exact result to float16 alone gives 2.8e-4."""


DTYPES = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)]
)
"""The same cases in both types: float32 shows a wrong computation by far more."""


@functools.cache
def figures(*wanted: str) -> dict[str, dict[str, float]]:
    """Check -> case -> figure, from a separate process: Triton reads the switch at its import."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels_warmup.triton.interpreted", *wanted],
        env=clean_environment({"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, dict[str, float]] = json.loads(done.stdout)
    return result


@pytest.fixture
def found(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("dtype") == "float16":
        return figures("float16")
    return figures("float32", "checks")


@DTYPES
@pytest.mark.parametrize(
    ("kernel", "cases"),
    [("norms", 15), ("attentions", 11), ("self_attentions", 10), ("geglus", 3), ("residual", 12)],
)
def test_a_kernel_computes_what_its_reference_does(
    kernel: str, cases: int, dtype: str, found: dict[str, dict[str, float]]
) -> None:
    errors = {
        case: error
        for case, error in found[f"{kernel} {dtype}"].items()
        if case != "norm far from zero"
    }
    assert len(errors) == cases
    assert max(errors.values()) < ROUNDING[dtype], errors


@DTYPES
def test_a_norm_as_fp8_is_the_reference_rounded(
    dtype: str, found: dict[str, dict[str, float]]
) -> None:
    errors = found[f"norms_fp8 {dtype}"]
    by = {
        kind: [error for case, error in errors.items() if case.startswith(kind)]
        for kind in ("sum", "scales", "values", "fp8's own")
    }
    assert [len(each) for each in by.values()] == [12, 9, 18, 3]
    assert sum(map(len, by.values())) == len(errors)
    assert max(by["sum"]) < ROUNDING[dtype]
    assert max(by["scales"]) < ROUNDING["float32"]
    # A value in the middle of two fp8 numbers may be rounded to either.
    assert max(by["values"]) < 1e-3
    # fp8 has three binary digits: an error of 1/16 at most, for evenly spread values less.
    assert all(0.01 < error < 0.035 for error in by["fp8's own"])


def test_the_norm_of_values_far_from_zero_stays_precise(
    found: dict[str, dict[str, float]],
) -> None:
    # A thousand standard deviations from zero, float32 itself has four digits left.
    assert found["norms float32"]["norm far from zero"] < 1e-4


def test_gelu_is_the_exact_one_to_float32(found: dict[str, dict[str, float]]) -> None:
    assert found["gelu"]["gelu"] < 3e-6
    assert found["gelu"]["gelu far below"] == 0


def test_the_registered_operators_match_their_implementations(
    found: dict[str, dict[str, float]],
) -> None:
    failures = found["operators"]
    assert len(failures) == 12
    assert not any(failures.values()), failures


def test_their_flops_are_counted(found: dict[str, dict[str, float]]) -> None:
    operators = ("geglu", "few_keys_attention", "self_attention", "add_product")
    assert found["flops"] == dict.fromkeys(operators, 1)


def test_the_bench_has_a_row_for_every_candidate(found: dict[str, dict[str, float]]) -> None:
    assert found["rows"] == {
        "norm": 5 + 1,
        "geglu": 6,
        "attention": 4,
        # 16 keys are few enough for both kernels.
        "attention to itself": 4 + 6,
    }


@pytest.mark.slow
def test_a_whole_unet_by_the_kernels_gives_the_unmodified_result() -> None:
    whole = dict(figures("whole")["whole"])
    calls = {name: whole.pop(name) for name in list(whole) if "stepspan." in name}
    in_residual = {
        name.removeprefix("residual "): calls.pop(name)
        for name in list(calls)
        if name.startswith("residual ")
    }
    # 11 blocks in 7 transformers; each transformer begins with a norm without a sum.
    assert calls == {
        "stepspan.layer_norm.default": 7,
        "stepspan.add_layer_norm.default": 3 * 11 - 7,
        "stepspan.few_keys_attention.default": 11,
        "stepspan.geglu.default": 11,
    }
    # Every sum is computed by its product; no norm follows the last sum of a transformer.
    assert in_residual == {
        "stepspan.layer_norm.default": 7,
        "stepspan.add_product.default": 3 * 11,
        "stepspan.shifted_layer_norm.default": 3 * 11 - 7,
        "stepspan.self_attention.default": 11,
        "stepspan.few_keys_attention.default": 11,
        "stepspan.geglu.default": 11,
    }
    residual = {"residual", "residual, traced", "residual, half without text"}
    assert whole.keys() == {"by block", "all", "traced", "all, half without text"} | residual
    assert max(whole.values()) < 1e-5, whole


@pytest.mark.slow
def test_a_whole_unet_with_norms_as_fp8_gives_what_plain_operators_do() -> None:
    whole = dict(figures("whole")["whole_fp8"])
    for way in ("by row", "static"):
        calls = {
            name.removeprefix(f"{way} stepspan."): whole.pop(name)
            for name in list(whole)
            if name.startswith(f"{way} stepspan")
        }
        # The first and third norms of 11 blocks in 7 transformers; the second is not fp8.
        assert calls == {
            "layer_norm_fp8.default": 7,
            "add_layer_norm_fp8.default": 2 * 11 - 7,
            "add_layer_norm.default": 11,
        }
        assert whole.pop(f"{way} against operators") < 1e-3
        assert 0.003 < whole.pop(f"{way} against the unmodified") < 0.03
        assert whole.pop(f"{way} traced") < 1e-5
    assert not whole
