"""Prompts of several chunks of 75 tokens: what is read of them, and which requests share a run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kernels_warmup.cuda_graphs import Fallbacks
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import compiler_counts
from serve.engine.runtime import Runtime
from serve.model.prompt_tokens import PromptRules, tokenise
from serve.schema import TextToImageResponse
from tests.serve.conftest import request
from tests.serve.engine.demo_runtime import build, counted, generate, new_call, pixels

SHAPES = (CompiledShape(128, 128),)
LONG = "a small red circle on a white background " * 12 + "and one blue square"
"""100 tokens, of which the last are in the second chunk."""
OTHER_END = LONG.replace("blue square", "green star")
TOO_LONG = LONG + " and a circle" * 40


@pytest.fixture(scope="module")
def one() -> Iterator[Runtime]:
    runtime = build(shapes=SHAPES, max_batch=2)
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


@pytest.fixture(scope="module")
def two() -> Iterator[Runtime]:
    """With weights too, which change nothing for a prompt without them."""
    runtime = build(shapes=SHAPES, max_batch=2, prompt_chunks=2, prompt_syntax="weighted")
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


def draw(runtime: Runtime, **fields: Any) -> TextToImageResponse:
    return generate(runtime, format="png", **fields)


def test_a_short_prompt_gives_the_same_bytes_whatever_the_most_chunks(
    one: Runtime, two: Runtime
) -> None:
    for fields in ({}, {"negative_prompt": "blue"}, {"guidance_scale": 1.0}):
        assert draw(one, **fields).image.url == draw(two, **fields).image.url


def test_the_end_of_a_long_prompt_is_read_if_there_are_chunks_for_it(
    one: Runtime, two: Runtime
) -> None:
    cut, read = draw(one, prompt=LONG), draw(two, prompt=LONG)
    assert (cut.prompt_truncated, read.prompt_truncated) == (True, False)
    assert cut.prompt_tokens == read.prompt_tokens > 77
    assert np.array_equal(pixels(cut), pixels(draw(one, prompt=OTHER_END)))
    assert not np.array_equal(pixels(read), pixels(draw(two, prompt=OTHER_END)))


def test_what_is_beyond_the_most_chunks_is_cut_and_counted(two: Runtime) -> None:
    before = counted(two, "sdxl_truncated_prompts_total")
    first = draw(two, prompt=TOO_LONG)
    assert first.prompt_truncated
    assert counted(two, "sdxl_truncated_prompts_total") == before + 1
    other = draw(two, prompt=TOO_LONG + " and a green star")
    assert np.array_equal(pixels(first), pixels(other))


def by_hand(runtime: Runtime, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of a text in two chunks, from the parts of diffusers' pipeline."""
    pipeline = runtime.loaded.model.pipeline
    hidden, pooled = [], None
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        content = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        states = []
        for chunk in (content[:75], content[75:150]):
            ids = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * (77 - len(ids))
            output = encoder(torch.tensor([ids]), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            if not len(states) > 1:
                pooled = output[0]
        hidden.append(torch.cat(states, dim=1))
    assert pooled is not None
    return torch.cat(hidden, dim=-1), pooled


@pytest.mark.parametrize(
    ("prompt", "negative"), [(LONG, ""), (LONG, "blue"), ("a red circle", LONG)]
)
@torch.no_grad()
def test_the_picture_is_that_of_diffusers_pipeline_with_both_chunks(
    two: Runtime, prompt: str, negative: str
) -> None:
    pipeline = two.loaded.model.pipeline
    embeds, pooled = by_hand(two, prompt)
    if negative:
        negative_embeds, negative_pooled = by_hand(two, negative)
    else:
        negative_embeds, negative_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    expected = pipeline(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative_embeds,
        negative_pooled_prompt_embeds=negative_pooled,
        latents=noise,
        num_inference_steps=2,
        guidance_scale=5.0,
        height=128,
        width=128,
        output_type="np",
    ).images[0]
    drawn = pixels(draw(two, prompt=prompt, negative_prompt=negative))
    assert np.abs(drawn - expected * 255).max() <= 1


def test_only_requests_of_the_same_number_of_chunks_share_a_run(two: Runtime) -> None:
    prompts = ("a red circle", LONG, "a blue square", OTHER_END)
    calls = [new_call(two) for _ in prompts]
    wanted = [request(prompt=prompt, format="png") for prompt in prompts]
    answers = asyncio.run(two.generate_together(wanted, calls))
    ids = [call.runs[0].run_id for call in calls]
    assert ids[0] == ids[2] != ids[1] == ids[3]
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = pixels(draw(two, prompt=prompt)).astype(np.int16)
        assert np.abs(pixels(answer) - alone).max() <= 1


def test_a_negative_prompt_counts_only_where_there_is_guidance(two: Runtime) -> None:
    for scale, chunks in ((5.0, 2), (1.0, 1)):
        wanted = request(negative_prompt=LONG, guidance_scale=scale)
        assert two._plan(wanted, new_call(two)).chunks == chunks


def test_weights_are_read_where_the_operator_wants_them(one: Runtime, two: Runtime) -> None:
    def picture(runtime: Runtime, prompt: str) -> str:
        return draw(runtime, prompt=prompt).image.url

    plain = picture(one, "a red circle")
    assert picture(two, "a (red:1.0) circle") == plain
    assert picture(two, "a (red:1.8) circle") != plain
    literal = picture(one, "a (red:1.8) circle")
    assert picture(two, r"a \(red:1.8\) circle") == literal != plain


def test_each_chunk_has_a_start_and_an_end_and_an_absent_one_is_an_empty_text(two: Runtime) -> None:
    tokenizer = two.loaded.model.pipeline.tokenizer
    rules = PromptRules(3)
    content = tokenizer("circle", add_special_tokens=False).input_ids * 80
    tokens = tokenise(tokenizer, rules.read(["circle " * 80, ""]), 3)
    assert tokens.ids.shape == (6, 77)
    empty = tokenise(tokenizer, rules.read([""])).ids[0]
    assert tokens.ids[0].tolist() == [
        tokenizer.bos_token_id,
        *content[:75],
        tokenizer.eos_token_id,
    ]
    assert tokens.ids[1].tolist()[:7] == [
        tokenizer.bos_token_id,
        *content[75:],
        tokenizer.eos_token_id,
    ]
    assert all(torch.equal(row, empty) for row in tokens.ids[2:])
    assert tokens.cut == (False, False)
    assert tokenise(tokenizer, rules.read(["circle " * 80]), 1).cut == (True,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own insides
def test_every_number_of_chunks_is_warm(traced: None) -> None:
    runtime = build(compile="default", shapes=SHAPES, prompt_chunks=2)
    asyncio.run(runtime.start())
    # Of the UNet with and without guidance for each number of chunks, and one of the decoder.
    assert runtime.readiness.as_json()["compile"]["graphs"] == 5
    before = compiler_counts()
    for prompt in ("a red circle", LONG, TOO_LONG, "a blue square"):
        for fields in ({}, {"negative_prompt": "blue"}, {"guidance_scale": 1.0}):
            call = new_call(runtime)
            generate(runtime, call, prompt=prompt, **fields)
            assert call.run is not None
            assert not call.run.eager_fallback
    assert compiler_counts() == before
    assert runtime.loaded.fallbacks == Fallbacks()
    runtime.close(1)
