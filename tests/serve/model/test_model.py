"""Loading a model from each supported place, and the error where it cannot be loaded."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file, save_file

from kernels_warmup.shapes import SDXL_SHAPES, CompiledShape
from serve.demo_model import checkpoint_path
from serve.errors import ModelError
from serve.model import loading
from serve.model.loading import load_model
from serve.model.sdxl import SdxlModel
from serve.model.sdxl_base import UNET_CONFIG, VAE_CONFIG, materialise
from serve.model.weights import non_finite_tensor
from serve.settings import SDXL_BASE, SDXL_BASE_COMMIT

SHAPE = CompiledShape(128, 128)


def draw(model: SdxlModel, seed: int = 3) -> torch.Tensor:
    conditioning = model.encode_prompts(["a red circle"], [""], guided=True)
    latents = model.denoise(
        conditioning,
        shape=SHAPE,
        num_inference_steps=2,
        guidance_scale=5.0,
        seeds=[seed],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda *_: None,
    )
    return model.decode(latents).pixels[0]


@pytest.fixture(scope="module")
def demo() -> SdxlModel:
    return load_model("demo", device_name="cpu")


def test_the_demo_is_what_a_machine_without_cuda_gets(demo: SdxlModel) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device gets SDXL base")
    assert load_model(None).name == demo.name == "demo"


@pytest.mark.parametrize(
    ("name", "revision", "loaded"),
    [
        (None, None, SDXL_BASE_COMMIT),
        (SDXL_BASE, None, SDXL_BASE_COMMIT),
        (SDXL_BASE, "main", "main"),
        ("someone/else", None, None),
    ],
)
def test_the_default_model_is_one_commit(
    name: str | None, revision: str | None, loaded: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def load_hub(name: str, revision: str | None, _dtype: torch.dtype) -> None:
        asked.append((name, revision))
        raise ModelError("enough")

    monkeypatch.setattr(loading, "_load_hub", load_hub)
    monkeypatch.setattr(loading, "choose_device", lambda _name: torch.device("cuda"))
    with pytest.raises(ModelError, match="enough"):
        load_model(name, revision)
    assert asked == [(name or SDXL_BASE, loaded)]
    assert re.fullmatch("[0-9a-f]{40}", SDXL_BASE_COMMIT)


def test_a_local_directory_plain_and_in_fp16(demo: SdxlModel, tmp_path: Path) -> None:
    plain, halves = tmp_path / "plain", tmp_path / "halves"
    demo.pipeline.save_pretrained(plain)
    demo.pipeline.save_pretrained(halves, variant="fp16")
    assert list((halves / "unet").glob("*.fp16.safetensors"))
    expected = draw(demo)
    for directory in (plain, halves):
        model = load_model(str(directory), device_name="cpu")
        assert model.name == directory.name
        assert model.dtype is torch.float32
        assert model.trained_shapes == (SHAPE,)
        # Not bit for bit: weights at other addresses may take other vector instructions.
        difference = (draw(model).to(torch.int16) - expected.to(torch.int16)).abs()
        assert int(difference.max()) <= 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "neither a directory here nor a hub repository"),
        ("/nowhere/at/all", "neither a directory here nor a hub repository"),
        ("nonsense", "neither a directory here nor a hub repository"),
        ("random:sdxl-huge", "neither a directory here nor a hub repository"),
    ],
)
def test_an_unknown_name_is_refused(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load_model(name, device_name="cpu")
    assert name in str(caught.value)


def copy_of_demo(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(checkpoint_path(), directory)
    return directory


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load_model(str(tmp_path), device_name="cpu")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    directory = copy_of_demo(tmp_path)
    weights = directory / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(directory), device_name="cpu")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    directory = copy_of_demo(tmp_path)
    (directory / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(directory), device_name="cpu")


def test_pickled_weights_are_not_run(tmp_path: Path) -> None:
    directory = copy_of_demo(tmp_path)
    weights = directory / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(directory), device_name="cpu")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_code_in_a_checkpoint_is_not_run(part: str, tmp_path: Path) -> None:
    """Neither a part's own class, in a file of the checkpoint, nor a pipeline of its own."""
    directory = copy_of_demo(tmp_path)
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Own: pass\n"
    for folder in (directory, directory / part):
        for name in ("own", "pipeline"):
            (folder / f"{name}.py").write_text(code)
    config = directory / part / "config.json"
    if config.is_file():
        content = json.loads(config.read_text())
        content["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel"), "own.Own")
        config.write_text(json.dumps(content))
    load_model(str(directory), device_name="cpu")
    index = directory / "model_index.json"
    for changes in ({part: ["own", "Own"]}, {"_class_name": ["pipeline", "Own"]}):
        index_before = index.read_text()
        index.write_text(json.dumps(json.loads(index_before) | changes))
        with contextlib.suppress(ModelError):
            load_model(str(directory), device_name="cpu")
        index.write_text(index_before)
    assert not ran.exists()


@pytest.mark.parametrize("content", ["{", '{"in_channels": "four"}', "[]"])
def test_a_configuration_that_is_none(content: str, tmp_path: Path) -> None:
    directory = copy_of_demo(tmp_path)
    (directory / "unet" / "config.json").write_text(content)
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(directory), device_name="cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_that_is_not_finite_is_found_by_name(value: float, dtype: torch.dtype) -> None:
    fine = torch.nn.Linear(8, 8, dtype=dtype)
    spoilt = torch.nn.Sequential(torch.nn.Linear(8, 8, dtype=dtype), torch.nn.BatchNorm2d(4))
    parts = {"scheduler": object(), "vae": fine, "unet": spoilt}
    assert non_finite_tensor(parts) is None
    with torch.no_grad():
        spoilt[0].bias[3] = value
    assert non_finite_tensor(parts) == "unet.0.bias"


def test_a_model_with_weights_that_are_not_finite(tmp_path: Path) -> None:
    directory = copy_of_demo(tmp_path)
    path = directory / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="not finite") as caught:
        load_model(str(directory), device_name="cpu")
    assert f"text_encoder.{name}" in str(caught.value)


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    directory = copy_of_demo(tmp_path)
    (directory / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(directory), device_name="cpu")


def test_another_kind_of_pipeline_is_refused(tmp_path: Path) -> None:
    directory = copy_of_demo(tmp_path)
    index = json.loads((directory / "model_index.json").read_text())
    for part in ("text_encoder_2", "tokenizer_2"):
        del index[part]
    (directory / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lacks text_encoder_2"):
        load_model(str(directory), device_name="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_refused() -> None:
    with pytest.raises(ModelError, match="0 CUDA devices"):
        load_model("demo", device_name="cuda:1")


@pytest.mark.parametrize(
    ("name", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])]
)
def test_a_gpu_with_a_number_is_the_threads_current_one_before_anything_is_on_it(
    monkeypatch: pytest.MonkeyPatch, name: str, current: list[torch.device]
) -> None:
    """Streams, events and graphs belong to the current device, not to that of the tensors."""
    made_current: list[torch.device] = []
    moved: list[list[torch.device]] = []

    def on_device(_: str, pipeline: Any, device: torch.device) -> Any:
        moved.append([*made_current])
        return pipeline

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setattr(loading, "_on_device", on_device)
    assert load_model("demo", device_name=name, dtype_name="float32").device == torch.device(name)
    assert moved == [current]


def test_a_prompt_is_never_logged(demo: SdxlModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    conditioning = demo.encode_prompts(["quagga " * 300], ["okapi " * 300], guided=True)
    assert conditioning.truncated == (True,)
    for prompt, negative, guided, truncated in (
        ("short", "okapi " * 300, True, True),
        ("quagga " * 300, "short", True, True),
        ("quagga " * 300, "", True, True),
        ("short", "short", True, False),
        ("short", " " * 300, True, False),
        # Without guidance nothing reads the negative prompt.
        ("short", "okapi " * 300, False, False),
    ):
        assert demo.encode_prompts([prompt], [negative], guided).truncated == (truncated,)
    two = demo.encode_prompts(["short", "short"], ["short", "okapi " * 300], guided=True)
    assert two.truncated == (False, True)
    assert "quagga" not in caplog.text
    assert "okapi" not in caplog.text


def test_an_empty_negative_prompt_is_zeros_as_sdxl_expects(demo: SdxlModel) -> None:
    conditioning = demo.encode_prompts(["a red circle"], [" "], guided=True)
    assert conditioning.negative is not None
    assert not conditioning.negative.any()
    assert conditioning.zero_negative
    unguided = demo.encode_prompts(["a red circle"], ["blue"], guided=False)
    assert unguided.negative is None
    assert not unguided.zero_negative


def test_negatives_are_zero_only_if_all_prompts_of_the_run_are_empty(
    demo: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zero(*negatives: str) -> bool:
        prompts = ["a red circle"] * len(negatives)
        conditioning = demo.encode_prompts(prompts, negatives, guided=True)
        assert conditioning.negative is not None
        assert conditioning.zero_negative is not bool(conditioning.negative.any())
        return conditioning.zero_negative

    assert zero("", " ")
    assert not zero("", "blue")
    other = FrozenDict({**demo.pipeline.config, "force_zeros_for_empty_prompt": False})
    monkeypatch.setattr(demo.pipeline, "_internal_dict", other)
    assert not zero("", " ")


def test_encoding_agrees_with_diffusers(demo: SdxlModel) -> None:
    ours = demo.encode_prompts(["a red circle"], ["blue"], guided=True)
    theirs = demo.pipeline.encode_prompt(
        "a red circle", negative_prompt="blue", do_classifier_free_guidance=True
    )
    for mine, reference in zip(
        (ours.prompt, ours.negative, ours.pooled, ours.negative_pooled), theirs, strict=True
    ):
        assert mine is not None
        # Encoded two at a time here and one by one there.
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


def test_decoding_agrees_with_diffusers(demo: SdxlModel) -> None:
    conditioning = demo.encode_prompts(["a red circle"], [""], guided=True)
    generator = torch.Generator("cpu").manual_seed(3)
    noise = torch.randn((1, 4, 16, 16), generator=generator)
    reference = demo.pipeline(
        prompt_embeds=conditioning.prompt,
        pooled_prompt_embeds=conditioning.pooled,
        negative_prompt_embeds=conditioning.negative,
        negative_pooled_prompt_embeds=conditioning.negative_pooled,
        num_inference_steps=2,
        guidance_scale=5.0,
        latents=noise,
        height=128,
        width=128,
        output_type="np",
    ).images[0]
    expected = torch.from_numpy((reference * 255).round()).to(torch.int16)
    difference = (draw(demo).to(torch.int16) - expected).abs()
    assert int(difference.max()) <= 1


def test_previews_resemble_the_picture(demo: SdxlModel) -> None:
    demo.fit_preview()
    latents = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(5))
    latents = torch.nn.functional.interpolate(latents, scale_factor=4.0)
    vae = demo.pipeline.vae
    pixels = demo.decode(latents).pixels[0].permute(2, 0, 1).float()
    small = torch.nn.functional.interpolate(pixels[None], size=(16, 16), mode="area")[0]
    preview = demo.preview(latents[0] / vae.config.scaling_factor).permute(2, 0, 1).float()
    naive = (small - small.mean()).abs().mean()
    assert (small - preview).abs().mean() < naive


def test_the_full_size_architecture_is_sdxl_base() -> None:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel(**UNET_CONFIG)
        vae = AutoencoderKL(**VAE_CONFIG)
    # As published for stable-diffusion-xl-base-1.0.
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert SDXL_SHAPES[0].latent == (UNET_CONFIG["sample_size"],) * 2


def test_random_weights_are_seeded_and_keep_activations_in_range() -> None:
    def build(seed: int) -> torch.nn.Sequential:
        with torch.device("meta"):
            module = torch.nn.Sequential(
                torch.nn.Conv2d(4, 64, 3, padding=1),
                torch.nn.GroupNorm(8, 64),
                torch.nn.Conv2d(64, 64, 3, padding=1),
            )
        materialise(module, torch.device("cpu"), torch.float32, seed)
        return module

    first, same, other = build(0), build(0), build(1)
    assert torch.equal(first[0].weight, same[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    output = first(torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert 0.3 < float(output.std()) < 3
    assert not any(p.is_meta for p in first.parameters())
