import copy
from dataclasses import replace

import pytest
import torch

from kernels_warmup import triton
from kernels_warmup.attention import StepAttention, transformer_blocks
from kernels_warmup.compile import compile_model, inductor_options
from kernels_warmup.cuda_graphs import Fallbacks
from kernels_warmup.recipes import MODES, RECIPES, Recipe
from kernels_warmup.rewrites.vae_attention import WideHeadAttention
from kernels_warmup.rewrites.zero_text import ZERO_TEXT
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
    with pytest.raises(ValueError, match="one of off, rewritten, regional, default, max"):
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
    found = triton.why_unusable(torch.device(device), dtype)
    assert (found is None) if reason is None else (reason in str(found))
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


def test_the_decoder_may_have_a_recipe_of_its_own() -> None:
    models = tiny_models()
    plain = copy.deepcopy(models)
    compiled = compile_model(
        models,
        "off",
        recipe=RECIPES["off"],
        decoder_recipe=replace(RECIPES["off"], vae_attention=True),
    )
    assert compiled.text is None
    assert len(compiled.functions) == 2
    assert not transformer_blocks(models.unet)[0].attn1.fused_projections
    processor = models.vae.decoder.mid_block.attentions[0].processor
    assert isinstance(processor, WideHeadAttention)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = plain.vae.decode(latents, return_dict=False)[0]
    assert relative_error(models.vae.decode(latents, return_dict=False)[0], expected) < 1e-5


REWRITTEN = Recipe(
    scope="whole",
    replay="none",
    group_norm=True,
    upsample="phases",
    zero_text=True,
    time_once=True,
)


def test_a_run_without_negative_has_a_separate_function() -> None:
    models = tiny_models()
    plain = copy.deepcopy(models.unet)
    compiled = compile_model(models, recipe=replace(REWRITTEN, scope="none"))
    full, short, _ = compiled.functions
    inputs = step_inputs(2)
    inputs["encoder_hidden_states"][:1] = 0
    without_negative = inputs | {"cross_attention_kwargs": {ZERO_TEXT: True}}
    expected = plain(**inputs)[0]
    assert relative_error(models.unet(**without_negative)[0], expected) < 1e-5
    assert (len(full.met), len(short.met)) == (0, 1)
    assert relative_error(models.unet(**inputs)[0], expected) < 1e-5
    assert (len(full.met), len(short.met)) == (1, 1)
    # Alternating, with the same buffers of keys and values.
    other = step_inputs(2, seed=5)
    assert relative_error(models.unet(**other)[0], plain(**other)[0]) < 1e-5
    assert relative_error(models.unet(**without_negative)[0], expected) < 1e-5
    compiled.freeze()
    models.unet(**without_negative)
    models.unet(**inputs)
    assert compiled.fallbacks == Fallbacks()
    compiled.thaw()
    assert not short.frozen


def test_zero_text_is_accepted_only_by_a_unet_that_uses_it() -> None:
    models = tiny_models()
    compile_model(models, recipe=replace(REWRITTEN, scope="none", zero_text=False))
    assert not models.unet.forward.takes_zero_text
    without_negative = step_inputs(2) | {"cross_attention_kwargs": {ZERO_TEXT: True}}
    with pytest.raises(TypeError, match="does not take zero_text"):
        models.unet(**without_negative)
    models = tiny_models()
    compile_model(models, recipe=replace(REWRITTEN, scope="none"))
    assert models.unet.forward.takes_zero_text
    without_negative["cross_attention_kwargs"] = {ZERO_TEXT: True, "scale": 0.5}
    with pytest.raises(TypeError, match="does not take scale"):
        models.unet(**without_negative)
    with pytest.raises(ValueError, match="zero_text needs text_once"):
        compile_model(tiny_models(), recipe=replace(REWRITTEN, text_once=False))


def test_inductor_knows_every_option_and_a_cpu_has_none() -> None:
    known = set(torch._inductor.list_options())
    for mode in MODES:
        recipe = RECIPES[mode]
        assert inductor_options(recipe, CPU) == {}
        assert set(inductor_options(recipe, torch.device("cuda"))) <= known
    trees = inductor_options(Recipe(replay="trees"), torch.device("cuda"))
    assert trees == {"triton.cudagraphs": True}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["regional", "default", "max"])
def test_compiled_gives_the_unmodified_result(mode: str) -> None:
    torch.compiler.reset()
    models = tiny_models()
    plain = copy.deepcopy(models)
    # The tiny models have no text encoders.
    recipe = replace(RECIPES[mode], text_encoders=False)  # type: ignore[index]
    compiled = compile_model(models, mode, recipe=recipe)  # type: ignore[arg-type]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for batch, seed in ((2, 1), (1, 2), (2, 3)):
        inputs = step_inputs(batch, seed=seed)
        assert relative_error(models.unet(**inputs)[0], plain.unet(**inputs)[0]) < 1e-4
    expected = plain.vae.decode(latents).sample
    assert relative_error(models.vae.decode(latents).sample, expected) < 1e-4
    assert sum(len(function.met) for function in compiled.functions) == 3
    if models.unet.forward.takes_zero_text:
        inputs = step_inputs(2)
        inputs["encoder_hidden_states"][:1] = 0
        expected = plain.unet(**inputs)[0]
        without_negative = inputs | {"cross_attention_kwargs": {ZERO_TEXT: True}}
        assert relative_error(models.unet(**without_negative)[0], expected) < 1e-4
        assert sum(len(function.met) for function in compiled.functions) == 4
    compiled.freeze()
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 1):
            inputs = step_inputs(batch, seed=9)
            assert relative_error(models.unet(**inputs)[0], plain.unet(**inputs)[0]) < 1e-4
        models.vae.decode(latents)
    torch.compiler.reset()
