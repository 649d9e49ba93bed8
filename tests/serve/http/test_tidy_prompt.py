"""Tidying a prompt at the gateway: spaces, control characters, and where it is cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.http.gateway.client import tidy_prompt


@pytest.mark.parametrize(
    ("untidy", "tidy"),
    [
        ("a red circle", "a red circle"),
        ("  a\t red\r\n\n circle\u00a0", "a red circle"),
        ("a\x00b\x1b[31mc\x7f", "ab[31mc"),
        ("\ufeffa\u200bb\u202ec", "abc"),
        ("e\u0301", "é"),
        ("family \U0001f468\u200d\U0001f469", "family \U0001f468\u200d\U0001f469"),
        ("\u2028", ""),
    ],
)
def test_a_prompt_is_made_tidy(untidy: str, tidy: str) -> None:
    assert tidy_prompt(untidy) == tidy


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two"),
        ("one two three", 7, "one two"),
        ("one two three", 6, "one"),
        ("onetwothree", 6, "onetwo"),
    ],
)
def test_a_long_prompt_is_cut_at_the_end_of_a_word(text: str, limit: int, cut: str) -> None:
    assert tidy_prompt(text, limit) == cut


@pytest.mark.parser
@given(st.text(max_size=200), st.integers(1, 60))
def test_tidying_a_tidy_prompt_changes_nothing(text: str, limit: int) -> None:
    tidy = tidy_prompt(text, limit)
    assert tidy_prompt(tidy, limit) == tidy
    assert len(tidy) <= limit
    assert tidy == tidy.strip()
    assert "  " not in tidy
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", tidy)
