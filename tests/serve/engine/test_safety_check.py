"""The safety check of a run: what is flagged, what its request gets, and what is withheld."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kernels_warmup.shapes import CompiledShape
from serve.engine.call import Call
from serve.engine.gpu_run import Previews
from serve.engine.planning import plan_request
from serve.engine.runtime import Runtime
from serve.errors import GenerationFailed, InvalidRequest
from serve.server import create_app
from tests.serve.conftest import request
from tests.serve.engine.demo_runtime import build, counted, generate, new_call, pixels, settings
from tests.support import tiny_checker
from tests.support.app_client import events, post

SHAPE = CompiledShape(128, 128)
UNSAFE: dict[str, Any] = {"prompt": "a red circle on a white background", "seed": 1}
SAFE: dict[str, Any] = {"prompt": "a blue square on a black background", "seed": 2}
UNCHECKED = {"enable_safety_checker": False}


@pytest.fixture(scope="module")
def pictures(runtime: Runtime) -> list[np.ndarray]:
    """One that the checker flags and one that it does not, drawn without a checker."""
    return [pixels(generate(runtime, format="png", **fields)) for fields in (UNSAFE, SAFE)]


@pytest.fixture(scope="module")
def checker(pictures: list[np.ndarray]) -> Any:
    made = tiny_checker.tiny_checker()
    tiny_checker.flag_one(made, *pictures)
    return made


@pytest.fixture(scope="module")
def checked(checker: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    directory = tiny_checker.save(checker, tmp_path_factory.mktemp("checker"))
    runtime = build(
        safety_checker=str(directory), safety_checker_optional=True, shapes=(SHAPE,), max_batch=4
    )
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


def is_black(picture: np.ndarray) -> bool:
    return not picture.any()


def test_a_flagged_image_is_black_and_the_response_says_so(checked: Runtime) -> None:
    before = counted(checked, "sdxl_flagged_images_total")
    unsafe = generate(checked, format="png", **UNSAFE)
    safe = generate(checked, format="png", **SAFE)
    assert (unsafe.has_nsfw_concepts, safe.has_nsfw_concepts) == ([True], [False])
    assert is_black(pixels(unsafe))
    assert not is_black(pixels(safe))
    assert counted(checked, "sdxl_flagged_images_total") == before + 1


def test_the_flags_are_those_of_diffusers_checker(
    checked: Runtime, checker: Any, pictures: list[np.ndarray]
) -> None:
    ours = checked.loaded.model.safety_checker
    assert ours is not None
    flags = ours.flagged(torch.from_numpy(np.stack(pictures))).tolist()
    assert flags == tiny_checker.flagged_by_diffusers(checker, pictures) == [True, False]


def test_the_check_is_a_stage_on_the_runs_clock(checked: Runtime) -> None:
    call = new_call(checked)
    answer = generate(checked, call, **SAFE)
    assert call.run is not None
    assert [stage.name for stage in call.run.stages] == [
        "text_encode",
        "denoise",
        "vae_decode",
        "safety_check",
    ]
    assert answer.timings.safety_check_ms is not None


def test_without_a_checker_there_is_no_stage_and_no_field(runtime: Runtime) -> None:
    call = new_call(runtime)
    answer = generate(runtime, call, **UNCHECKED)
    assert call.run is not None
    assert call.run.stage("safety_check") is None
    assert answer.timings.safety_check_ms is None
    assert "has_nsfw_concepts" not in json.loads(answer.model_dump_json())


def test_a_request_without_the_check_gets_its_picture_also_beside_others(
    checked: Runtime, pictures: list[np.ndarray]
) -> None:
    calls = [new_call(checked) for _ in range(3)]
    wanted = [request(format="png", **fields) for fields in (UNSAFE, UNSAFE | UNCHECKED, SAFE)]
    answers = asyncio.run(checked.generate_together(wanted, calls))
    assert len({call.runs[0].run_id for call in calls}) == 1
    assert [answer.has_nsfw_concepts for answer in answers] == [[True], None, [False]]
    assert [is_black(pixels(answer)) for answer in answers] == [True, False, False]
    assert np.abs(pixels(answers[1]).astype(int) - pictures[0]).max() <= 1


def test_a_run_without_a_checked_request_has_no_check(checked: Runtime) -> None:
    call = new_call(checked)
    generate(checked, call, **UNSAFE, **UNCHECKED)
    assert call.run is not None
    assert call.run.stage("safety_check") is None


def test_each_image_of_a_request_has_its_flag(checked: Runtime) -> None:
    answer = generate(checked, num_images=2, **UNSAFE)
    assert answer.has_nsfw_concepts is not None
    assert len(answer.has_nsfw_concepts) == 2
    assert answer.has_nsfw_concepts[0]


def test_only_the_operator_can_allow_a_request_without_the_check() -> None:
    def planned(**changes: Any) -> bool:
        return plan_request(request(**UNCHECKED), settings(**changes), [SHAPE], [SHAPE]).checked

    assert not planned()
    assert not planned(safety_checker="x/y", safety_checker_optional=True)
    with pytest.raises(InvalidRequest) as caught:
        planned(safety_checker="x/y")
    assert caught.value.problems[0].location == ("body", "enable_safety_checker")
    assert plan_request(request(), settings(safety_checker="x/y"), [SHAPE], [SHAPE]).checked


@pytest.mark.parametrize("decoded", [False, True])
def test_previews_are_withheld_from_checked_requests_only(checked: Runtime, decoded: bool) -> None:
    def previews(**fields: Any) -> list[Any]:
        seen: list[Any] = []
        asyncio.run(
            checked.generate(
                request(num_inference_steps=3, preview=True, **fields),
                new_call(checked),
                on_step=lambda _index, _ms, preview: seen.append(preview),
                previews=Previews(frozenset({0}), decoded=True) if decoded else None,
            )
        )
        return seen

    assert previews(**SAFE) == [None, None, None]
    assert any(preview is not None for preview in previews(**SAFE, **UNCHECKED))


def test_a_checker_that_fails_fails_the_request(
    checked: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise ValueError

    monkeypatch.setattr(checked.loaded.model.safety_checker, "flagged", broken)
    call: Call = new_call(checked)
    with pytest.raises(GenerationFailed):
        generate(checked, call, **SAFE)
    timing = call.finish(500)
    assert timing.failure is not None
    assert timing.run is not None
    stage = timing.run.stage("safety_check")
    assert stage is not None
    assert stage.start_ns <= timing.failure.at_ns <= stage.end_ns


def test_scores_that_are_not_finite_are_flagged(
    checked: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = checked.loaded.model.safety_checker
    assert ours is not None
    monkeypatch.setattr(ours, "_mean", torch.full((3, 1, 1), float("nan")))
    assert generate(checked, **SAFE).has_nsfw_concepts == [True]


def test_every_endpoint_blanks_and_says_so(checked: Runtime) -> None:
    app = create_app(checked)
    wanted = {**UNSAFE, "num_inference_steps": 2}
    assert post(app, wanted).json()["has_nsfw_concepts"] == [True]
    image = post(app, wanted, accept="image/png")
    assert image.headers["x-has-nsfw-concepts"] == "true"
    assert is_black(np.asarray(Image.open(io.BytesIO(image.content))))
    *_, (_, last) = events(post(app, {**wanted, "preview": True}, "/stream").text)
    assert last["has_nsfw_concepts"] == [True]
    openai = "/v1/images/generations"
    answer = post(app, wanted, openai).json()
    assert answer["has_nsfw_concepts"] == [True]
    picture = base64.b64decode(answer["data"][0]["b64_json"])
    assert is_black(np.asarray(Image.open(io.BytesIO(picture))))
    streamed = {**wanted, "stream": True, "partial_images": 1, "num_inference_steps": 3}
    assert [name for name, _ in events(post(app, streamed, openai).text)] == [
        "image_generation.completed"
    ]


def test_the_openapi_document_says_whether_the_check_can_be_turned_off(
    checked: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allowed() -> Any:
        schemas = create_app(checked).openapi()["components"]["schemas"]
        field = schemas["TextToImageRequest"]["properties"]["enable_safety_checker"]
        return field.get("const")

    assert allowed() is None
    always = checked.settings.model_copy(update={"safety_checker_optional": False})
    monkeypatch.setattr(checked, "settings", always)
    assert allowed() is True
