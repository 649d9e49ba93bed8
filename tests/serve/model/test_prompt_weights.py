"""`(words:1.3)`: which texts have weights, and what weights do to the encoded text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.model.loading import load_model
from serve.model.prompt_tokens import PromptRules, tokenise
from serve.model.prompt_weights import MOST_WEIGHT, parse, weigh
from serve.model.sdxl import Conditioning, SdxlModel


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    model = load_model("demo", device_name="cpu")
    model.prompt_rules = PromptRules(weighted=True)
    return model


def spans(text: str) -> list[tuple[str, float]]:
    """The text in parts of one weight."""
    parts: list[tuple[str, float]] = []
    parsed = parse(text)
    for character, weight in zip(parsed.text, parsed.weights, strict=True):
        if parts and parts[-1][1] == weight:
            parts[-1] = (parts[-1][0] + character, weight)
        else:
            parts.append((character, weight))
    return parts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle", [("a red circle", 1)]),
        ("", []),
        ("a (red:1.3) circle", [("a ", 1), ("red", 1.3), (" circle", 1)]),
        ("(red:0)(blue: 2. )", [("red", 0), ("blue", 2)]),
        ("(red:.5)", [("red", 0.5)]),
        ("((red:1.5) circle:0.5)", [("red", 0.75), (" circle", 0.5)]),
        ("((red:2) circle:1.5)", [("red", MOST_WEIGHT), (" circle", 1.5)]),
        ("((red) circle:1.5)", [("(red) circle", 1.5)]),
        ("a (big) (red circle:1.5)", [("a (big) ", 1), ("red circle", 1.5)]),
        ("time: 12:30 (noon)", [("time: 12:30 (noon)", 1)]),
        (r"(\(red\):1.5)", [("(red)", 1.5)]),
        (r"\(red:1.5\)", [("(red:1.5)", 1)]),
        ("red\\", [("red\\", 1)]),
    ],
)
def test_parentheses_with_a_number_are_weights(
    text: str, expected: list[tuple[str, float]]
) -> None:
    assert spans(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("(red)", "(red:)", "(red:2.1)", "(red:-1)", "(red:1e1)", "(red:nan)", "(red:1,5)"),
        *("(red:1.5", "red:1.5)", ")(red", "[red:1.5]", "{red:1.5}", "(red;1.5)", "(red 1.5)"),
        *("(" * 2000, ")" * 2000, ":" * 2000, ":1)" * 600),
    ],
)
def test_what_has_another_form_is_text(text: str) -> None:
    parsed = parse(text)
    assert parsed.text == text
    assert not parsed.is_weighted


def test_weights_may_be_nested_deeply() -> None:
    depth = 400
    parsed = parse("(" * depth + "red" + ":1)" * depth)
    assert parsed.text == "red"
    assert parsed.weights == (1.0,) * 3


SYNTAX = st.text(st.sampled_from("ab :.()\\0129é"), max_size=40)


@pytest.mark.parser
@given(SYNTAX)
def test_every_text_is_parsed_and_loses_nothing_but_syntax(text: str) -> None:
    parsed = parse(text)
    assert len(parsed.text) == len(parsed.weights)
    assert all(0 <= weight <= MOST_WEIGHT for weight in parsed.weights)
    letters = "".join(each for each in text if each in "abé")
    assert "".join(each for each in parsed.text if each in "abé") == letters


@pytest.mark.parser
@given(SYNTAX.filter(lambda text: not text.endswith("\\")), st.sampled_from([0.0, 0.5, 1.3, 2.0]))
def test_an_escaped_text_is_itself_and_may_have_a_weight(text: str, weight: float) -> None:
    escaped = text.replace("(", "\\(").replace(")", "\\)")
    assert parse(escaped).text == text
    parsed = parse(f"({escaped}:{weight})")
    assert (parsed.text, set(parsed.weights)) == (text, {weight} if text else set())


@given(st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_every_token_has_a_weight(model: SdxlModel, before: str, inside: str) -> None:
    texts = model.prompt_rules.read([f"{before} ({inside}:1.5)", ""])
    tokens = tokenise(model.pipeline.tokenizer, texts, 2)
    if tokens.weights is not None:
        assert tokens.weights.shape == tokens.ids.shape


def encode(model: SdxlModel, prompt: str, negative: str = "", chunks: int = 1) -> Conditioning:
    return model.encode_prompts([prompt], [negative], True, None, chunks)


def test_the_ids_are_those_of_the_text_without_its_weights(model: SdxlModel) -> None:
    (weighted,) = model.prompt_rules.read(["a (red:1.5) (circle, on:0.5) white"])
    (plain,) = model.prompt_rules.read(["a red circle, on white"])
    for tokenizer in (model.pipeline.tokenizer, model.pipeline.tokenizer_2):
        tokens, expected = tokenise(tokenizer, [weighted]), tokenise(tokenizer, [plain])
        assert torch.equal(tokens.ids, expected.ids)
        assert tokens.counts == expected.counts
        assert tokens.weights is not None
        words = tokenizer.convert_ids_to_tokens(tokens.ids[0].tolist())
        by_word = dict(zip(words, tokens.weights[0].tolist(), strict=True))
        assert by_word["red</w>"] == 1.5
        assert by_word["circle</w>"] == by_word[",</w>"] == by_word["on</w>"] == 0.5
        assert by_word["white</w>"] == by_word["a</w>"] == 1.0


def test_weights_move_states_from_the_last_state_of_their_chunk(model: SdxlModel) -> None:
    words = "circle " * 76
    plain = encode(model, words + "red", chunks=2)
    weighted = encode(model, words + "(red:1.5)", chunks=2)
    chunk, whole = plain.prompt[0, 77:], plain.prompt[0]
    place = 2  # in the second chunk: its start, one more circle, red
    moved = chunk[-1] + (chunk[place] - chunk[-1]) * 1.5
    assert torch.allclose(weighted.prompt[0, 77 + place], moved, atol=1e-5)
    others = [index for index in range(154) if index != 77 + place]
    assert torch.equal(weighted.prompt[0, others], whole[others])
    assert torch.equal(weighted.pooled, plain.pooled)
    assert weighted.tokens == plain.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_one_changes_no_bit(dtype: torch.dtype) -> None:
    hidden = (torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    assert torch.equal(weigh(hidden, torch.ones(2, 77)), hidden)


def test_negative_prompts_have_weights_and_texts_beside_them_stay(model: SdxlModel) -> None:
    plain = encode(model, "a red circle", "a blue square")
    weighted = encode(model, "a red circle", "a (blue:1.5) square")
    assert plain.negative is not None
    assert weighted.negative is not None
    assert torch.equal(weighted.prompt, plain.prompt)
    assert not torch.equal(weighted.negative, plain.negative)
