import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kernels_warmup import triton
from kernels_warmup.attention import StepAttention, transformer_blocks
from kernels_warmup.blocks import ZERO_TEXT
from kernels_warmup.compile import (
    MODES,
    RECIPES,
    Captured,
    Fallbacks,
    PerShape,
    Recipe,
    capture_text_encoders,
    compile_model,
    inductor_options,
    mode_for,
)
from kernels_warmup.warmup import compiler_counts
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_models

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def test_off_leaves_every_module_as_it_was() -> None:
    models = tiny_models()
    plain = copy.deepcopy(models)
    compiled = compile_model(models, "off")
    assert compiled.functions == ()
    assert "forward" not in vars(models.unet)
    assert "forward" not in vars(models.vae.decoder)
    processor = transformer_blocks(models.unet)[0].attn1.processor
    assert type(processor) is type(transformer_blocks(plain.unet)[0].attn1.processor)
    inputs = step_inputs(2)
    assert torch.equal(models.unet(**inputs)[0], plain.unet(**inputs)[0])


def test_off_still_takes_a_named_attention() -> None:
    models = tiny_models()
    compile_model(models, "off", attention="math")
    attn = transformer_blocks(models.unet)[0].attn1
    assert attn.processor.backend == "math"
    assert not attn.fused_projections


def test_wrong_names_are_refused_before_anything_changes() -> None:
    models = tiny_models()
    with pytest.raises(ValueError, match="one of off, rewritten, regional, default, max is"):
        compile_model(models, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a CUDA device"):
        compile_model(models, "default", attention="cudnn")
    assert "forward" not in vars(models.unet)


def test_residual_products_need_norms_that_reach_across_blocks() -> None:
    for recipe in (
        Recipe(residual_products=True),
        Recipe("blocks", layer_norm=True, residual_products=True),
    ):
        models = tiny_models()
        with pytest.raises(ValueError, match="needs layer_norm"):
            compile_model(models, "default", recipe=recipe)
        assert "forward" not in vars(models.unet)


def test_kernels_for_another_machine_leave_the_blocks_as_they_are() -> None:
    models = tiny_models()
    plain = copy.deepcopy(models)
    recipe = Recipe(
        "none",
        "none",
        layer_norm=True,
        residual_products=True,
        self_attention=True,
        cross_attention=True,
        geglu=True,
    )
    compile_model(models, "default", recipe=recipe)
    theirs, ours = transformer_blocks(plain.unet), transformer_blocks(models.unet)
    for before, after in zip(theirs, ours, strict=True):
        assert type(after) is type(before)
        assert type(after.ff.net[0]) is type(before.ff.net[0])
        assert type(after.attn1.processor) is type(after.attn2.processor) is StepAttention
    inputs = step_inputs(2)
    assert relative_error(models.unet(**inputs)[0], plain.unet(**inputs)[0]) < 1e-5


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "reason"),
    [
        ("cpu", torch.bfloat16, (9, 0), "need a CUDA device; this is cpu"),
        ("cuda", torch.float32, (9, 0), "the model is torch.float32"),
        ("cuda", torch.bfloat16, (8, 0), "built for Hopper"),
        ("cuda", torch.bfloat16, (9, 0), None),
    ],
)
def test_kernels_say_why_they_cannot_run(
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(triton, "find_spec", lambda _: object())
    told = triton.why_unusable(torch.device(device), dtype)
    assert (told is None) if reason is None else (reason in str(told))
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    if reason is None:
        assert "triton is not installed" in str(triton.why_unusable(torch.device(device), dtype))


def test_the_decoder_and_the_unet_keep_their_signatures() -> None:
    models = tiny_models()
    plain = copy.deepcopy(models)
    compile_model(models, "default", recipe=Recipe(scope="none", replay="none"))
    inputs = step_inputs(2) | {"return_dict": True}
    assert relative_error(models.unet(**inputs).sample, plain.unet(**inputs).sample) < 1e-5
    with pytest.raises(TypeError, match="does not take mid_block_additional_residual"):
        models.unet(**inputs, mid_block_additional_residual=torch.zeros(1))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = plain.vae.decode(latents, return_dict=False)[0]
    assert relative_error(models.vae.decode(latents, return_dict=False)[0], expected) < 1e-5
    with pytest.raises(TypeError, match="latent_embeds"):
        models.vae.decoder(torch.zeros(1, 4, 8, 8), torch.zeros(1))


REWRITTEN = Recipe(
    scope="whole",
    replay="none",
    group_norm=True,
    upsample="phases",
    zero_text=True,
    time_once=True,
)


def test_a_run_without_negative_has_a_function_of_its_own() -> None:
    models = tiny_models()
    plain = copy.deepcopy(models.unet)
    compiled = compile_model(models, recipe=replace(REWRITTEN, scope="none"))
    full, short, _ = compiled.functions
    inputs = step_inputs(2)
    inputs["encoder_hidden_states"][:1] = 0
    told = inputs | {"cross_attention_kwargs": {ZERO_TEXT: True}}
    expected = plain(**inputs)[0]
    assert relative_error(models.unet(**told)[0], expected) < 1e-5
    assert (len(full.met), len(short.met)) == (0, 1)
    assert relative_error(models.unet(**inputs)[0], expected) < 1e-5
    assert (len(full.met), len(short.met)) == (1, 1)
    # Turn about, over the same buffers of keys and values.
    other = step_inputs(2, seed=5)
    assert relative_error(models.unet(**other)[0], plain(**other)[0]) < 1e-5
    assert relative_error(models.unet(**told)[0], expected) < 1e-5
    compiled.freeze()
    models.unet(**told)
    models.unet(**inputs)
    assert compiled.fallbacks == Fallbacks()
    compiled.thaw()
    assert not short.frozen


def test_what_is_said_of_the_text_is_taken_where_it_is_made_use_of_alone() -> None:
    models = tiny_models()
    compile_model(models, recipe=replace(REWRITTEN, scope="none", zero_text=False))
    assert not models.unet.forward.takes_zero_text
    told = step_inputs(2) | {"cross_attention_kwargs": {ZERO_TEXT: True}}
    with pytest.raises(TypeError, match="does not take zero_text"):
        models.unet(**told)
    models = tiny_models()
    compile_model(models, recipe=replace(REWRITTEN, scope="none"))
    assert models.unet.forward.takes_zero_text
    told["cross_attention_kwargs"] = {ZERO_TEXT: True, "scale": 0.5}
    with pytest.raises(TypeError, match="does not take scale"):
        models.unet(**told)
    with pytest.raises(ValueError, match="zero_text needs text_once"):
        compile_model(tiny_models(), recipe=replace(REWRITTEN, text_once=False))


def test_only_max_does_what_no_gpu_has_measured() -> None:
    def rewrites(mode: Any) -> tuple[object, ...]:
        recipe = RECIPES[mode]
        return recipe.group_norm, recipe.upsample, recipe.zero_text, recipe.time_once

    for mode in ("off", "regional", "default"):
        assert rewrites(mode) == (False, "nearest", False, False)
    assert rewrites("rewritten") == (False, "nearest", True, True)
    assert rewrites("max") == (True, "transposed", True, True)


def test_under_the_guard_a_shape_never_warmed_runs_eagerly_and_is_counted() -> None:
    function = PerShape(lambda a: a + 1, RECIPES["default"], CPU)
    function(torch.zeros(2))
    function(torch.zeros(2))
    function(torch.zeros(3))
    assert len(function.met) == 2
    function.frozen = True
    assert torch.equal(function(torch.zeros(4)), torch.ones(4))
    assert len(function.met) == 2
    assert function.fallbacks == Fallbacks(cold=1)


def test_under_the_guard_a_recompile_is_refused_run_eagerly_and_counted() -> None:
    """A guard on something that no input's shape tells, as a changed global is."""
    scale = {"by": 2.0}
    traced = []

    def function(tensor: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            traced.append("eager")
        return tensor * scale["by"]

    per_shape = PerShape(
        torch.compile(function, backend="eager", fullgraph=True, dynamic=False),
        RECIPES["default"],
        CPU,
    )
    per_shape(torch.ones(2))
    per_shape.frozen = True
    assert torch.equal(per_shape(torch.ones(2)), torch.full((2,), 2.0))
    assert traced == []
    assert per_shape.fallbacks == Fallbacks()
    scale["by"] = 3.0
    before = compiler_counts().graphs
    assert torch.equal(per_shape(torch.ones(2)), torch.full((2,), 3.0))
    assert traced == ["eager"]
    assert compiler_counts().graphs == before
    assert per_shape.fallbacks == Fallbacks(recompiles=1)
    scale["by"] = 2.0
    per_shape(torch.ones(2))
    assert traced == ["eager"]
    per_shape.frozen = False
    scale["by"] = 3.0
    per_shape(torch.ones(2))
    assert traced == ["eager"]
    assert compiler_counts().graphs == before + 1
    torch.compiler.reset()


def test_the_guard_hides_no_other_error() -> None:
    def broken(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")

    per_shape = PerShape(broken, RECIPES["default"], CPU)
    per_shape.met.add(((torch.Size([1]), torch.float32),))
    per_shape.frozen = True
    with pytest.raises(RuntimeError, match="out of order"):
        per_shape(torch.zeros(1))
    assert per_shape.fallbacks == Fallbacks()


def test_where_nothing_is_compiled_no_shape_is_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the compiler was asked")

    per_shape = PerShape(lambda a: a + 1, RECIPES["rewritten"], CPU)
    per_shape.frozen = True
    monkeypatch.setattr(torch.compiler, "set_stance", never)
    assert per_shape(torch.zeros(1)) == 1
    assert per_shape(torch.zeros(2)).shape == (2,)
    assert per_shape.fallbacks == Fallbacks()
    # A captured graph has its shape, compiled or not.
    captured = replace(RECIPES["rewritten"], replay="captured")
    assert PerShape(torch.relu, captured, torch.device("cuda"))._has_graphs


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
def test_what_auto_means_on_a_device(setting: str, device: str, mode: str) -> None:
    assert mode_for(setting, torch.device(device)) == mode


def test_more_shapes_than_dynamos_own_limit_stay_compiled() -> None:
    traced = []

    def function(tensor: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return tensor + 1
        traced.append(tensor.shape)
        return tensor + 1

    compiled = torch.compile(function, backend="eager", dynamic=False)
    per_shape = PerShape(compiled, RECIPES["default"], CPU)
    for size in range(2, 14):
        per_shape(torch.zeros(size))
    for size in range(2, 14):
        per_shape(torch.zeros(size))
    assert not traced
    torch.compiler.reset()


def test_every_option_is_one_inductor_knows_and_a_cpu_gets_none() -> None:
    known = set(torch._inductor.list_options())
    for mode in MODES:
        recipe = RECIPES[mode]
        assert inductor_options(recipe, CPU) == {}
        assert set(inductor_options(recipe, torch.device("cuda"))) <= known
    trees = inductor_options(Recipe(replay="trees"), torch.device("cuda"))
    assert trees == {"triton.cudagraphs": True}


class Recorded:
    """Stands in for a captured graph: as the real one, it gives what it was captured with."""

    made: ClassVar[list[tuple[int, ...]]] = []
    replays = 0

    def __init__(self, function: Any, inputs: tuple[torch.Tensor, ...], pool: Any) -> None:
        self.made.append(tuple(inputs[0].shape))
        self._function = function

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        type(self).replays += 1
        return self._function(*inputs)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """Graphs that can be captured on a CPU, by what believes to be on CUDA."""
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(Recorded, "replays", 0)
    monkeypatch.setattr("kernels_warmup.compile.Captured", Recorded)
    return Recorded


def test_a_graph_of_several_outputs_is_captured_once_a_shape(recorded: type[Recorded]) -> None:
    calls = []

    def both(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(tuple(ids.shape))
        return ids + 1, ids * 2

    per_shape = PerShape(both, Recipe(scope="none", replay="captured"), torch.device("cuda"))
    for batch in (1, 2, 1, 2):
        first, second = per_shape(torch.full((batch, 7), 3))
        assert (first == 4).all()
        assert (second == 6).all()
    assert recorded.made == [(1, 7), (2, 7)]
    assert recorded.replays == 2
    per_shape.frozen = True
    first, _ = per_shape(torch.full((4, 7), 3))
    assert (first == 4).all()
    assert per_shape.fallbacks == Fallbacks(cold=1)
    assert recorded.made == [(1, 7), (2, 7)]


@pytest.mark.parametrize("several", [False, True])
def test_what_a_replay_gives_is_the_callers_own(several: bool) -> None:
    held, output = torch.zeros(2), torch.zeros(2)
    captured = object.__new__(Captured)
    captured._inputs = (held,)
    captured._output = (output, output) if several else output
    captured._graph = SimpleNamespace(replay=lambda: output.copy_(held))
    kept = [captured.replay((torch.full((2,), value),)) for value in (1.0, 2.0)]
    for value, given in zip((1.0, 2.0), kept, strict=True):
        for one in given if several else (given,):
            assert torch.equal(one, torch.full((2,), value))


def text_encoders() -> Any:
    """SDXL's two: one with a projection and one without, the first of an older configuration."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 7,
    }
    first = CLIPTextModel(CLIPTextConfig(**common, num_hidden_layers=3, eos_token_id=2))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(**common, num_hidden_layers=4, projection_dim=24, eos_token_id=59)
    )
    return SimpleNamespace(text_encoder=first.eval(), text_encoder_2=second.eval())


def test_captured_text_encoders_give_what_sdxl_reads_of_them(recorded: type[Recorded]) -> None:
    models = text_encoders()
    plain = copy.deepcopy(models)
    for encoder in (models.text_encoder, models.text_encoder_2):
        type(encoder).device = property(lambda _: torch.device("cuda"))
    try:
        functions = capture_text_encoders(models, Recipe(scope="none", replay="none"))
    finally:
        for encoder in (models.text_encoder, models.text_encoder_2):
            del type(encoder).device
    ids = torch.randint(0, 59, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 59
    for batch in (1, 2, 2):
        for name in ("text_encoder", "text_encoder_2"):
            ours = getattr(models, name)(ids[:batch], output_hidden_states=True)
            theirs = getattr(plain, name)(ids[:batch], output_hidden_states=True)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours.hidden_states[-2], theirs.hidden_states[-2])
    assert recorded.made == [(1, 7), (1, 7), (2, 7), (2, 7)]
    assert recorded.replays == 2
    for function in functions:
        function.frozen = True
    models.text_encoder(ids[:1].repeat(5, 1), output_hidden_states=True)
    assert [function.fallbacks.cold for function in functions] == [1, 0]
    with pytest.raises(TypeError, match="hidden states"):
        models.text_encoder(ids, output_hidden_states=False)


def test_text_encoders_are_captured_by_max_alone_and_on_no_cpu() -> None:
    assert [mode for mode in MODES if RECIPES[mode].text_encoders] == ["max"]
    models = text_encoders()
    first, second = capture_text_encoders(models, RECIPES["max"])
    ids = torch.full((1, 7), 59)
    models.text_encoder(ids, output_hidden_states=True)
    models.text_encoder(ids, output_hidden_states=True)
    assert first._captured == {}
    assert (len(first.met), len(second.met)) == (1, 0)


def test_encoding_text_reads_no_value_and_branches_on_none() -> None:
    """What a graph may not hold fails here as it would in a capture: on the meta device no value
    can be read."""
    for encoder in vars(text_encoders()).values():
        with torch.device("meta"):
            twin = type(encoder)(encoder.config).eval()
            output = twin(torch.zeros(2, 7, dtype=torch.long), output_hidden_states=True)
        assert output.hidden_states[-2].shape == (2, 7, 32)


def test_capture_is_what_cuda_does_by_default() -> None:
    assert PerShape(torch.relu, RECIPES["default"], torch.device("cuda"))._replay == "captured"
    assert PerShape(torch.relu, RECIPES["default"], CPU)._replay == "none"
    assert callable(Captured.replay)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["regional", "default", "max"])
def test_compiled_gives_the_unmodified_result(mode: str) -> None:
    torch.compiler.reset()
    models = tiny_models()
    plain = copy.deepcopy(models)
    compiled = compile_model(models, mode)  # type: ignore[arg-type]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for batch, seed in ((2, 1), (1, 2), (2, 3)):
        inputs = step_inputs(batch, seed=seed)
        assert relative_error(models.unet(**inputs)[0], plain.unet(**inputs)[0]) < 1e-4
    expected = plain.vae.decode(latents).sample
    assert relative_error(models.vae.decode(latents).sample, expected) < 1e-4
    assert compiled.shapes_met == 3
    if models.unet.forward.takes_zero_text:
        inputs = step_inputs(2)
        inputs["encoder_hidden_states"][:1] = 0
        expected = plain.unet(**inputs)[0]
        told = inputs | {"cross_attention_kwargs": {ZERO_TEXT: True}}
        assert relative_error(models.unet(**told)[0], expected) < 1e-4
        assert compiled.shapes_met == 4
    compiled.freeze()
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 1):
            inputs = step_inputs(batch, seed=9)
            assert relative_error(models.unet(**inputs)[0], plain.unet(**inputs)[0]) < 1e-4
        models.vae.decode(latents)
    torch.compiler.reset()
