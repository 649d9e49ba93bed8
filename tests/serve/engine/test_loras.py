"""Requests with LoRAs, on the demo model: what is drawn, recorded and refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import GUIDED_BY_NOTHING, compiler_counts
from metrics.spans import request_tree
from serve.engine.build import build_runtime
from serve.engine.runtime import OPENAI_IMAGES, Runtime
from serve.errors import InvalidRequest, ModelError, OutOfMemory
from serve.model.loading import load_model
from serve.server import create_app
from serve.settings.fields import parse_loras
from tests.serve.conftest import request
from tests.serve.engine.demo_runtime import build, counted, generate, new_call, pixels, settings
from tests.support import loras

SHAPE = CompiledShape(64, 64)
INK = [{"path": "ink"}]
CHALK = [{"path": "chalk", "scale": -0.5}]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three files of two LoRAs, as `SDXL_LORAS` names them. `ink` and `same` are one LoRA in two
    namings."""
    folder = tmp_path_factory.mktemp("loras")
    pipeline = load_model("demo", None, "cpu").pipeline
    ink, chalk = (loras.make(pipeline, seed=seed) for seed in (1, 2))
    files = {
        "ink": loras.as_peft(ink),
        "same": loras.as_kohya(ink, pipeline.unet.config),
        "chalk": loras.as_diffusers(chalk),
    }
    paths = {
        name: loras.save(tensors, folder / f"{name}.safetensors") for name, tensors in files.items()
    }
    return ",".join(f"{name}={path}" for name, path in paths.items())


def started(**changes: Any) -> Runtime:
    runtime = build(shapes=(SHAPE,), **changes)
    asyncio.run(runtime.start())
    return runtime


@pytest.fixture(scope="module")
def served(sources: str) -> Iterator[Runtime]:
    runtime = started(compile="auto", loras=parse_loras(sources))
    yield runtime
    runtime.close(5)


def drawn(runtime: Runtime, **fields: Any) -> np.ndarray:
    return pixels(generate(runtime, format="png", **fields))


def test_base_pictures_are_the_same_bytes_before_and_after_loras(served: Runtime) -> None:
    base = drawn(served)
    ink, chalk, both = (
        drawn(served, loras=INK),
        drawn(served, loras=CHALK),
        drawn(served, loras=[*CHALK, *INK]),
    )
    assert np.array_equal(drawn(served), base)
    assert np.array_equal(drawn(served, loras=[{"path": "ink", "scale": 0}]), base)
    pictures = [base, ink, chalk, both]
    for index, one in enumerate(pictures):
        for other in pictures[:index]:
            assert np.abs(one.astype(int) - other).mean() > 1
    assert np.array_equal(drawn(served, loras=[*INK, *CHALK]), both)
    same = drawn(served, loras=[{"path": "same", "force": True}])
    assert np.abs(same.astype(int) - ink).max() <= 1


def test_a_change_is_a_stage_of_the_run_that_needs_it(served: Runtime) -> None:
    generate(served)

    def swap_ms(**fields: Any) -> float | None:
        return generate(served, **fields).timings.lora_swap_ms

    first = swap_ms(loras=INK)
    assert first is not None
    assert first > 0
    assert swap_ms(loras=INK) is None
    assert swap_ms(loras=INK, prompt="a blue square") is None
    assert swap_ms(loras=[{"path": "ink", "scale": 0.5}]) is not None
    assert swap_ms() is not None
    assert swap_ms() is None


def test_the_trace_and_the_metrics_name_the_loras(served: Runtime) -> None:
    generate(served)
    before = {
        name: counted(served, "sdxl_lora_requests_total", lora=name)
        for name in ("ink", "same", "chalk")
    }
    call = new_call(served)
    generate(served, call, loras=[*INK, *CHALK])
    timing = call.finish(200)
    root = request_tree(timing)
    assert root.attributes["lora.names"] == "chalk,ink"
    assert root.attributes["lora.scales"] == "-0.5,1"
    [inference] = [child for child in root.children if child.name == "inference"]
    assert inference.attributes["lora.names"] == "chalk,ink"
    names = [child.name for child in inference.children]
    assert names == ["lora_swap", "text_encode", "denoise", "vae_decode"]
    swaps = counted(served, "sdxl_stage_duration_seconds_count", stage="lora_swap")
    served.metrics.observe_request(timing, None)
    after = counted(served, "sdxl_stage_duration_seconds_count", stage="lora_swap")
    assert after == swaps + 1
    for name, more in (("ink", 1), ("same", 0), ("chalk", 1)):
        assert counted(served, "sdxl_lora_requests_total", lora=name) == before[name] + more
    call = new_call(served)
    generate(served, call)
    assert "lora.names" not in request_tree(call.finish(200)).attributes


@pytest.mark.parametrize(
    ("wanted", "place"),
    [
        ([{"path": "nobody"}], ("body", "loras", 0, "path")),
        ([*INK, {"path": "/etc/passwd"}], ("body", "loras", 1, "path")),
        ([{"path": "nobody", "scale": 0}], ("body", "loras", 0, "path")),
    ],
)
def test_only_the_servers_loras_are_served(
    served: Runtime, wanted: list[Any], place: tuple[str | int, ...]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate(served, loras=wanted)
    [problem] = caught.value.problems
    assert problem.location == place
    assert "ink, same, chalk" in problem.message
    assert wanted[-1]["path"] not in problem.message


@pytest.mark.parametrize(
    "wanted",
    [
        [*INK, *INK],
        [{"path": "ink", "scale": 4.5}],
        [{"path": "ink", "scale": float("nan")}],
        [{"path": "ink", "scale": "1"}],
        [{"path": ""}],
        [{"scale": 1}],
        [{"path": "ink", "weight_name": "x"}],
        ["ink"],
    ],
)
def test_a_wrong_list_is_refused(wanted: list[Any]) -> None:
    with pytest.raises(ValueError, match="loras"):
        request(loras=wanted)


def test_requests_of_one_set_share_a_run_and_others_do_not(served: Runtime) -> None:
    async def together() -> list[Any]:
        fields = [{"loras": INK}, {}, {"loras": INK}, {"loras": CHALK}]
        calls = [new_call(served) for _ in fields]
        for call in calls:
            call.timeline.begin_at_arrival("receive")
        requests = [request(seed=index, **each) for index, each in enumerate(fields)]
        await served.generate_together(requests, calls)
        return [call.runs[0].run_id for call in calls]

    first, plain, second, chalk = asyncio.run(together())
    assert first == second
    assert len({first, plain, chalk}) == 3


def test_a_failed_change_fails_its_request_and_no_other(
    served: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = drawn(served)
    with monkeypatch.context() as patched:

        def fails(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("made up")

        patched.setattr(torch, "addmm", fails)
        call = new_call(served)
        with pytest.raises(OutOfMemory):
            generate(served, call, loras=INK)
    assert call.run is not None
    assert [stage.name for stage in call.run.stages] == ["lora_swap"]
    assert np.array_equal(drawn(served), base)
    assert not np.array_equal(drawn(served, loras=INK), base)


def test_every_endpoint_takes_them(served: Runtime) -> None:
    """fal's fields on `/` and `/stream`; OpenAI's endpoint takes them as an extension."""
    app = create_app(served)

    async def post(path: str, **fields: Any) -> httpx.Response:
        body = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1} | fields
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    def image(path: str, wanted: list[Any]) -> str:
        openai = path == OPENAI_IMAGES
        answer = asyncio.run(post(path, loras=wanted, **({} if openai else {"format": "png"})))
        assert answer.status_code == 200
        if path == "/stream":
            return json.loads(answer.text.split("data: ")[-1])["image"]["url"].split(",")[1]
        body = answer.json()
        return body["data"][0]["b64_json"] if openai else body["image"]["url"].split(",")[1]

    paths = ("/", "/stream", OPENAI_IMAGES)
    with_ink = {image(path, INK) for path in paths}
    without = {image(path, []) for path in paths}
    assert len(with_ink) == len(without) == 1
    assert with_ink != without
    for path, status in (("/", 422), ("/stream", 422), (OPENAI_IMAGES, 400)):
        refused = asyncio.run(post(path, loras=[{"path": "https://example.com/nobody"}]))
        assert refused.status_code == status
        assert "ink, same, chalk" in refused.text
        assert "example.com" not in refused.text


def test_the_openapi_document_lists_them(served: Runtime) -> None:
    lora = create_app(served).openapi()["components"]["schemas"]["LoraWeight"]
    assert lora["properties"]["path"]["enum"] == ["ink", "same", "chalk"]


def test_ready_lists_them_with_their_memory(served: Runtime) -> None:
    ready = served.readiness.as_json()
    assert ready["loras"] == ["ink", "same", "chalk"]
    assert ready["lora_bytes"] > 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own insides
def test_generated_code_reads_the_changed_weights(served: Runtime, sources: str) -> None:
    """The compiler generates code here. It must have put no weight into it."""
    chosen = settings(compile="default", shapes=(SHAPE,), loras=parse_loras(sources))
    runtime = build_runtime(chosen, CollectorRegistry(), kinds=(GUIDED_BY_NOTHING,))
    asyncio.run(runtime.start())
    try:
        before = compiler_counts()
        for wanted in ([], INK, CHALK, [*INK, *CHALK], []):
            compiled, other = drawn(runtime, loras=wanted), drawn(served, loras=wanted)
            assert np.abs(compiled.astype(int) - other).max() <= 1
        assert compiler_counts() == before
        assert counted(runtime, "sdxl_recompiles_total") == 0
    finally:
        runtime.close(5)


@pytest.mark.parametrize("source", ["/nowhere/ink.safetensors", "demo:nothing"])
def test_a_wrong_source_stops_the_start(source: str) -> None:
    runtime = build(shapes=(SHAPE,), loras=parse_loras(f"ink={source}"))
    with pytest.raises(ModelError, match="ink"):
        asyncio.run(runtime.start())
    runtime.close(5)


def test_without_loras_every_lora_is_refused(runtime: Runtime) -> None:
    with pytest.raises(InvalidRequest):
        generate(runtime, loras=INK)
    assert generate(runtime, loras=[]).timings.lora_swap_ms is None
    assert runtime.readiness.as_json()["loras"] == []
