"""LoRAs in the weights: what they draw, and that going back restores the very bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels_warmup.recipes import RECIPES, Recipe
from kernels_warmup.shapes import CompiledShape
from serve.model.loras.files import Lora, read_lora
from serve.model.loras.in_place import LorasInPlace
from serve.model.loras.naming import PARTS
from serve.model.sdxl import SdxlModel
from tests.serve.model.loras.conftest import Load
from tests.support import loras

SHAPE = CompiledShape(64, 64)


def draw(model: SdxlModel, negative: str = "") -> np.ndarray:
    text = model.encode_prompts(["a red circle"], [negative], True, SHAPE)
    latents = model.denoise(
        text,
        shape=SHAPE,
        num_inference_steps=2,
        guidance_scale=5.0,
        seeds=[1],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda index, latents: None,
    )
    return np.array(model.decode(latents).pixels.numpy())


def weights_of(pipeline: Any) -> dict[str, torch.Tensor]:
    """All that a LoRA could change, and what was computed from it: parameters and buffers."""
    found = {}
    for part in PARTS:
        module = getattr(pipeline, part)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            # Not what a run fills.
            if not name.endswith(("text_key", "text_value", "added_condition")):
                found[f"{part}.{name}"] = tensor.detach().clone()
    return found


def read(pipeline: Any, folder: Path, **made: loras.Made) -> list[Lora]:
    result = []
    for name, each in made.items():
        file = loras.save(loras.as_peft(each), folder / f"{name}.safetensors")
        result.append(read_lora(name, file, pipeline))
    return result


WAYS = {
    "off": RECIPES["off"],
    "rewritten": RECIPES["rewritten"],
    "phases": Recipe(scope="none", replay="none", upsample="phases", group_norm=True),
    "transposed": Recipe(
        scope="none", replay="none", upsample="transposed", zero_text=True, time_once=True
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_in_place_draw_what_a_model_with_fused_weights_draws(
    load: Load, tmp_path: Path, way: str
) -> None:
    """The reference is a model whose weights had the LoRAs before it was rewritten, so every copy
    and sum that a rewrite made of a weight has to follow."""
    sources: list[Lora] = []
    made: list[loras.Made] = []

    def read_both(pipeline: Any) -> None:
        made.extend((loras.make(pipeline, seed=1), loras.make(pipeline, rank=3, seed=2)))
        sources.extend(read(pipeline, tmp_path, ink=made[0], chalk=made[1]))

    def fuse(pipeline: Any) -> None:
        for each, scale in zip(made, (0.5, -1.0), strict=True):
            for target, weight in loras.merged(pipeline, each, scale).items():
                module = getattr(pipeline, target.part).get_submodule(target.module)
                module.weight.data.copy_(weight)

    model = load("off", WAYS[way], before=read_both)
    reference = load("off", WAYS[way], before=fuse)
    base, loaded = draw(model), weights_of(model.pipeline)
    in_place = LorasInPlace(sources, model.pipeline)
    in_place.use((("chalk", -1.0), ("ink", 0.5)))
    wanted = weights_of(reference.pipeline)
    for name, weight in weights_of(model.pipeline).items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    drawn = draw(model)
    assert np.abs(drawn.astype(int) - draw(reference)).max() <= 2
    assert np.abs(drawn.astype(int) - base).mean() > 5
    in_place.use(())
    after = weights_of(model.pipeline)
    assert all(torch.equal(after[name], loaded[name]) for name in loaded)
    assert np.array_equal(draw(model), base)


def test_the_bytes_are_those_that_were_loaded_after_200_changes(load: Load, tmp_path: Path) -> None:
    sources: list[Lora] = []

    def read_both(pipeline: Any) -> None:
        made = [loras.make(pipeline, seed=seed) for seed in (1, 2)]
        sources.extend(read(pipeline, tmp_path, ink=made[0], chalk=made[1]))

    model = load("rewritten", before=read_both)
    loaded, base = weights_of(model.pipeline), draw(model, "a blue square")
    in_place = LorasInPlace(sources, model.pipeline)
    first = None
    for number in range(100):
        in_place.use((("ink", 0.01 * (number + 1)),))
        in_place.use((("chalk", 1.0), ("ink", -0.3)) if number % 2 else ())
        if number == 1:
            first = weights_of(model.pipeline)
    assert first is not None
    last = weights_of(model.pipeline)
    assert all(torch.equal(first[name], last[name]) for name in first)
    in_place.use(())
    after = weights_of(model.pipeline)
    assert all(torch.equal(after[name], loaded[name]) for name in loaded)
    assert np.array_equal(draw(model, "a blue square"), base)


def test_only_weights_that_differ_are_written(load: Load, tmp_path: Path) -> None:
    sources: list[Lora] = []

    def read_both(pipeline: Any) -> None:
        one = loras.make(pipeline, chosen=lambda part, name: part == "unet" and "to_q" in name)
        two = loras.make(pipeline, chosen=lambda part, name: part != "unet" and "fc1" in name)
        sources.extend(read(pipeline, tmp_path, ink=one, chalk=two))

    model = load("rewritten", before=read_both)
    in_place = LorasInPlace(sources, model.pipeline)
    in_place.use((("ink", 1.0),))
    weight = model.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    weight.data.fill_(7.0)  # would be written over
    in_place.use((("chalk", 1.0), ("ink", 1.0)))
    assert bool((weight == 7.0).all())
    in_place.use(())
    assert not bool((weight == 7.0).any())


def test_a_change_that_fails_leaves_the_weights_as_loaded(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[Lora] = []
    model = load(
        "rewritten",
        before=lambda pipeline: sources.extend(read(pipeline, tmp_path, ink=loras.make(pipeline))),
    )
    loaded = weights_of(model.pipeline)
    in_place = LorasInPlace(sources, model.pipeline)
    addmm, calls = torch.addmm, 0

    def fails_late(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise torch.OutOfMemoryError("made up")
        return addmm(*arguments, **options)

    monkeypatch.setattr(torch, "addmm", fails_late)
    with pytest.raises(torch.OutOfMemoryError):
        in_place.use((("ink", 1.0),))
    assert in_place.active == ()
    after = weights_of(model.pipeline)
    assert all(torch.equal(after[name], loaded[name]) for name in loaded)

    # The weights cannot be written back either: nothing is known of them, so all are written next.
    copy_ = torch.Tensor.copy_

    def cannot(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("made up")

    calls = 0
    monkeypatch.setattr(torch.Tensor, "copy_", cannot)
    with pytest.raises(torch.OutOfMemoryError):
        in_place.use((("ink", 1.0),))
    assert in_place.active is None
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    in_place.use(())
    after = weights_of(model.pipeline)
    assert all(torch.equal(after[name], loaded[name]) for name in loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_16_bits_is_rounded_once(load: Load, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load("off")
    made = [loras.make(model.pipeline, seed=seed) for seed in (1, 2)]
    sources = read(model.pipeline, tmp_path, ink=made[0], chalk=made[1])
    unet = model.pipeline.unet.to(dtype)
    exact = {
        target: unet.get_submodule(target.module).weight.detach().float()
        + sum(
            each[target][0].to(dtype).float() @ each[target][1].to(dtype).float().flatten(1)
            for each in made
        ).reshape(each_weight.shape)
        for target in made[0]
        if target.part == "unet"
        for each_weight in [unet.get_submodule(target.module).weight]
    }
    LorasInPlace(sources, model.pipeline).use((("chalk", 1.0), ("ink", 1.0)))
    for target, wanted in exact.items():
        now = unet.get_submodule(target.module).weight.detach().float()
        assert (now - wanted).abs().max() <= 0.51 * torch.finfo(dtype).eps * wanted.abs().max()
