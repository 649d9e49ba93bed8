"""Preparations that claim to be lossless draw the same pictures: equal scores, close pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bench.demo_model.evaluate import DrawSettings, HeldOutPrompt, score
from bench.demo_model.lossless import (
    PREPARATIONS,
    REWRITES,
    Distance,
    PictureComparison,
    as_text,
    compare,
    distance,
    draw,
    draw_all,
    prompts_by_row,
)
from bench.demo_model.scenes import Pixels, Scene, render
from kernels_warmup.compile import compile_model
from kernels_warmup.recipes import mode_for
from serve.model.loading import load_model
from serve.model.sdxl import SdxlModel

# In levels of 0 to 255. Rounding in another order moves a value by one level at most where nothing
# amplifies it; docs/demo-model.md has what was measured.
LARGEST_MEAN = 0.002
LARGEST_DISTANCE = 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain() -> SdxlModel:
    return load_model("demo", device_name="cpu")


def assert_lossless(plain: SdxlModel, prepared: SdxlModel, count: int) -> None:
    prompts = prompts_by_row(count)
    before, after = (draw_all(model, prompts, DrawSettings()) for model in (plain, prepared))
    for row, comparison in compare(prompts, before, after).items():
        assert comparison.prepared == comparison.plain, row
        assert comparison.distance.mean < LARGEST_MEAN, row
        assert comparison.distance.maximum <= LARGEST_DISTANCE, row


@pytest.mark.slow
def test_the_rewrites_are_lossless(plain: SdxlModel) -> None:
    prepared = load_model("demo", device_name="cpu")
    compile_model(prepared.pipeline, recipe=REWRITES)
    assert_lossless(plain, prepared, count=1)


def test_what_a_cpu_does_without_compiling_is_lossless(plain: SdxlModel) -> None:
    prepared = load_model("demo", device_name="cpu")
    assert mode_for("auto", prepared.device) == "rewritten"
    PREPARATIONS["rewritten"](prepared)
    assert_lossless(plain, prepared, count=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["regional", "default"])
def test_compiling_is_lossless(plain: SdxlModel, name: str) -> None:
    torch.compiler.reset()
    prepared = load_model("demo", device_name="cpu")
    PREPARATIONS[name](prepared)
    assert_lossless(plain, prepared, count=8)
    torch.compiler.reset()


def test_a_loss_would_be_seen(plain: SdxlModel) -> None:
    prepared = load_model("demo", device_name="cpu", dtype_name="bfloat16")
    prompts = {"one": prompts_by_row(1)["128x128 one object"]}
    before, after = (draw_all(model, prompts, DrawSettings()) for model in (plain, prepared))
    far = compare(prompts, before, after)["one"].distance
    assert far.mean > LARGEST_MEAN
    assert far.maximum > LARGEST_DISTANCE


def test_pictures_are_drawn_one_by_one_and_repeat(plain: SdxlModel) -> None:
    prompts = prompts_by_row(2)["160x96 one object"]
    first, second = (draw(plain, prompts, DrawSettings(steps=3)) for _ in range(2))
    assert [picture.shape for picture in first] == [(96, 160, 3)] * 2
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_distance_counts_levels() -> None:
    black: Pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    other = black.copy()
    other[0, 0, 0], other[1, 1, 2] = 255, 9
    assert distance([black, black], [black, other]) == Distance(11.0, 255, 2 / 24)
    assert distance([black], [black]) == Distance(0.0, 0, 0.0)


def test_a_changed_score_is_reported() -> None:
    scene = prompts_by_row(1)["128x128 one object"][0].scene
    prompts = [HeldOutPrompt(scene, "", 0)]
    right, wrong = ([render(some)] for some in (scene, Scene(128, 128, scene.background, ())))
    same, changed = (
        PictureComparison(
            score(prompts, right), score(prompts, pictures), distance(right, pictures)
        )
        for pictures in (right, wrong)
    )
    text = as_text("default", {"same": same, "changed": changed})
    assert [line.rsplit(" ", 1)[-1] for line in text.splitlines()] == ["same", "CHANGED"]
