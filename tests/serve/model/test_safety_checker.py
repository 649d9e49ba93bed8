"""Loading a safety checker, and its flags beside those of diffusers' own."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.errors import ModelError
from serve.model.safety_checker import (
    PREPROCESSING,
    WEIGHTS,
    Preprocessing,
    SafetyChecker,
    load_safety_checker,
)
from tests.support.hub_endpoint import hub_endpoint
from tests.support.processes import clean_environment
from tests.support.tiny_checker import (
    NEVER,
    embedded,
    flagged_by_diffusers,
    prepared,
    save,
    tiny_checker,
)

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tiny_checker(), tmp_path)


def pictures() -> list[np.ndarray]:
    """Noise of several sizes of grain, in a shape that is cropped."""
    generator = np.random.default_rng(0)
    made = []
    for grain in (1, 2, 4, 8, 16, 32):
        small = generator.integers(0, 256, (96 // grain, 160 // grain, 3), dtype=np.uint8)
        made.append(small.repeat(grain, axis=0).repeat(grain, axis=1))
    return made


def changed(path: Path, **changes: Any) -> None:
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings))


def refused(directory: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        load_safety_checker(str(directory), CPU)
    return str(caught.value)


def test_the_images_are_prepared_as_by_clips_processor(directory: Path) -> None:
    checker = load_safety_checker(str(directory), CPU)
    for width, height in ((160, 96), (96, 160), (100, 100), (97, 131)):
        noise = np.random.default_rng(1).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
        ours = checker._prepared(torch.from_numpy(noise))
        difference = (ours - prepared(list(noise))).abs() * checker._std * 255
        # Pillow computes with whole numbers, so some values are rounded the other way.
        assert difference.max() < 1.01
        assert difference.mean() < 0.01


def test_flags_equal_diffusers_near_a_threshold_and_with_special_care(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = pictures()
    seen = prepared(drawn)
    monkeypatch.setattr(SafetyChecker, "_prepared", lambda *_: seen)
    checker = tiny_checker()
    one = embedded(checker, drawn)
    checker.concept_embeds[0] = one[0]
    cosines = (one @ one[0]).tolist()
    flagged = []
    for special in (NEVER, -1.0):  # with the second, every image gets the adjustment of 0.01
        checker.special_care_embeds_weights.fill_(special)
        for cosine in cosines:
            for distance in (-0.001, 0.001, 0.0095, 0.0105):
                checker.concept_embeds_weights[0] = cosine + distance
                flags = SafetyChecker(checker, Preprocessing()).flagged(torch.zeros(1)).tolist()
                assert flags == flagged_by_diffusers(checker, drawn)
                flagged += flags
    assert {True, False} == set(flagged)


def test_a_check_reads_no_value() -> None:
    """On the meta device, which has no values to read. On a GPU a read would wait."""
    checker = SafetyChecker(tiny_checker().to("meta"), Preprocessing(32, 32))
    flags = checker.flagged(torch.zeros(2, 96, 128, 3, dtype=torch.uint8, device="meta"))
    assert flags.shape == (2,)
    assert flags.is_meta


def test_weights_under_the_names_of_older_libraries(directory: Path) -> None:
    expected = load_safety_checker(str(directory), CPU)
    weights = load_file(directory / WEIGHTS)
    older = {
        key.replace("vision_model.", "vision_model.vision_model."): weights[key] for key in weights
    }
    older["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)
    save_file(older, directory / WEIGHTS)
    drawn = torch.from_numpy(np.stack(pictures()))
    seen = expected._prepared(drawn)
    loaded = load_safety_checker(str(directory), CPU)
    both = [each._checker.vision_model(seen)[1] for each in (expected, loaded)]
    assert torch.equal(*both)


def test_a_checker_without_settings_of_its_images_has_clips(directory: Path) -> None:
    (directory / PREPROCESSING).unlink()
    assert "224" in refused(directory)  # the tiny one sees 32 pixels


@pytest.mark.parametrize("size", [32, {"shortest_edge": 32}])
def test_settings_of_older_and_newer_image_processors(directory: Path, size: object) -> None:
    changed(directory / PREPROCESSING, size=size, crop_size=32)
    load_safety_checker(str(directory), CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"resample": 2},
        {"do_center_crop": False},
        {"size": {"height": 32, "width": 32}},
        {"image_mean": [0.5]},
        {"size": 16},
        {"crop_size": "small"},
    ],
)
def test_other_settings_of_the_images_are_refused(
    directory: Path, changes: dict[str, object]
) -> None:
    changed(directory / PREPROCESSING, **changes)
    assert PREPROCESSING in refused(directory)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "nonsense", "a/b@", "a/b/c", "a/b@../x", "a/b@/x"]
)
def test_a_name_of_nothing_is_refused(name: str) -> None:
    assert name in refused(name)


def test_a_directory_of_another_model_is_refused(directory: Path) -> None:
    changed(directory / "config.json", architectures=["CLIPModel"])
    assert "StableDiffusionSafetyChecker" in refused(directory)
    (directory / "config.json").write_text("[]")
    assert "StableDiffusionSafetyChecker" in refused(directory)


def test_pickled_weights_are_not_read(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert WEIGHTS in refused(directory)


def test_weights_that_do_not_fit_are_refused(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    lacking = {key: tensor for key, tensor in weights.items() if key != "concept_embeds"}
    save_file(lacking, directory / WEIGHTS)
    assert "concept_embeds" in refused(directory)
    save_file(weights | {"concept_embeds": torch.zeros(3, 16)}, directory / WEIGHTS)
    refused(directory)
    nan = torch.full_like(weights["visual_projection.weight"], float("nan"))
    save_file(weights | {"visual_projection.weight": nan}, directory / WEIGHTS)
    assert "visual_projection.weight" in refused(directory)
    (directory / WEIGHTS).write_bytes(b"{}")
    refused(directory)


LOAD = """
import sys, torch
from serve.errors import ModelError
from serve.model.safety_checker import load_safety_checker
for name in sys.argv[1:]:
    try:
        print("loaded", type(load_safety_checker(name, torch.device("cpu"))).__name__)
    except ModelError as error:
        print("refused", error)
"""


def load_in_a_process(url: str, cache: Path, *names: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        env=clean_environment(
            {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        ),
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_repository_of_the_hub_and_its_revisions(directory: Path, tmp_path: Path) -> None:
    name, pickled = "someone/checker", tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(directory / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"a pickle that must not be fetched")
    cache = tmp_path / "cache"
    with hub_endpoint(name, {"main": pickled, "safe": directory}) as hub:
        fetched, missing, without = load_in_a_process(
            hub.url, cache, f"{name}@safe", f"{name}@nowhere", name
        )
        url = hub.url
    assert fetched == "loaded SafetyChecker"
    assert missing.startswith("refused")
    assert "'nowhere'" in missing
    assert without.startswith("refused")
    assert WEIGHTS in without
    assert not list(cache.rglob("*.bin"))
    # The hub is gone: what was downloaded before is used.
    assert load_in_a_process(url, cache, f"{name}@safe") == ["loaded SafetyChecker"]
