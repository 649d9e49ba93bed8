"""What is refused of a body, where and as what; the answers are in test_endpoints.py."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.errors import (
    MAX_NAME_CHARACTERS,
    MAX_PROBLEMS,
    FieldProblem,
    InvalidRequest,
    UnsupportedMediaType,
)
from serve.http.error_responses import field_problems
from serve.http.request_body import (
    MAX_BODY_BYTES,
    MAX_DIGITS,
    MAX_GATEWAY_BODY_BYTES,
    MAX_NESTING,
    MAX_PICTURE_BODY_BYTES,
    MAX_VALUES,
    json_object,
)
from serve.schema import MAX_LORAS, ImageToImageRequest, TextToImageRequest

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "location", "kind"),
    [
        (b"", ("body",), "missing"),
        (b"null", ("body",), "not_an_object"),
        (b"[1]", ("body",), "not_an_object"),
        (b"NaN", ("body",), "not_an_object"),
        (b"{", ("body",), "json_invalid"),
        (b'{"a": 1} {}', ("body",), "json_invalid"),
        (b'{"a": "\n"}', ("body",), "json_invalid"),
        (b'{"a": "\xff"}', ("body",), "not_utf8"),
        ('{"a": 1}'.encode("utf-16"), ("body",), "not_utf8"),
        (b"[" * 10_000, ("body",), "nested_too_deep"),
        (
            b'{"a":' * (MAX_NESTING + 1) + b"1" + b"}" * (MAX_NESTING + 1),
            ("body",),
            "nested_too_deep",
        ),
        (b'{"a": NaN}', ("body", "a"), "not_finite"),
        (b'{"a": {"b": [0, -Infinity]}}', ("body", "a", "b", 1), "not_finite"),
        (b'{"a": ' + b"1" * 5000 + b"}", ("body", "a"), "too_many_digits"),
        (b'{"a": -' + b"1" * (MAX_DIGITS + 1) + b"}", ("body", "a"), "too_many_digits"),
        (b'{"a": 1, "b": 2, "a": 1}', ("body", "a"), "repeated_key"),
        (b'{"a": [{"b": 1, "b": NaN}]}', ("body", "a", 0, "b"), "repeated_key"),
    ],
)
def test_the_cause_and_the_place_are_named(
    body: bytes, location: tuple[str | int, ...], kind: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        json_object(JSON, body)
    [problem] = refused.value.problems
    assert (problem.location, problem.kind) == (location, kind)


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "APPLICATION/JSON; charset=utf-8",
        "application/problem+json",
    ],
)
def test_json_media_types(media_type: str) -> None:
    assert json_object({"content-type": media_type}, b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("headers", "accepted"),
    [
        ({}, {"Accept": "application/json"}),
        ({"content-type": "text/plain"}, {"Accept": "application/json"}),
        ({"content-type": "application/x-www-form-urlencoded"}, {"Accept": "application/json"}),
        ({"content-type": "application/jsonlines"}, {"Accept": "application/json"}),
        (JSON | {"content-encoding": "gzip"}, {"Accept-Encoding": "identity"}),
    ],
)
def test_what_is_not_declared_as_json_is_told_what_is_accepted(
    headers: dict[str, str], accepted: dict[str, str]
) -> None:
    with pytest.raises(UnsupportedMediaType) as refused:
        json_object(headers, b'{"a": 1}')
    assert accepted.items() <= refused.value.headers.items()


MOST_SECONDS = 1.0
"""Of the processor, for the widest body there may be: far above the measured 30 ms, and far below
the two minutes of an error for each value."""


def unknown_keys(size: int) -> bytes:
    return b",".join(b'"%06x":0' % number for number in range(size // 11))


def filled(size: int, piece: bytes) -> bytes:
    return piece + (b"," + piece) * (size // (len(piece) + 1) - 1)


@pytest.mark.parametrize("size", [MAX_BODY_BYTES - 100, MAX_PICTURE_BODY_BYTES - 100])
@pytest.mark.parametrize("piece", [b"{}", b"[]", b'""', b"1", b'{"a":0}', None])
def test_a_wide_body_is_one_problem_and_costs_little(size: int, piece: bytes | None) -> None:
    inside = unknown_keys(size) if piece is None else b'"loras":[' + filled(size, piece) + b"]"
    body = b'{"prompt":"a",' + inside + b"}"
    assert size * 0.9 < len(body) <= MAX_PICTURE_BODY_BYTES
    began = time.thread_time()
    with pytest.raises(InvalidRequest) as refused:
        json_object(JSON, body)
    took = time.thread_time() - began
    [problem] = refused.value.problems
    assert (problem.location, problem.kind) == (("body",), "too_many_values")
    assert took < MOST_SECONDS


def test_as_many_values_as_are_allowed_are_read() -> None:
    body = {"a": [[0] * (MAX_VALUES - 4), {"b": 1}]}
    assert json_object(JSON, json.dumps(body).encode()) == body
    body["a"].append(0)
    with pytest.raises(InvalidRequest):
        json_object(JSON, json.dumps(body).encode())


def test_a_picture_whose_slashes_are_escaped_is_read() -> None:
    """As PHP writes JSON; beside prompts of nothing but quotes and commas."""
    body = {"prompt": '"' * 2000, "negative_prompt": "," * 2000}
    body["image_url"] = "data:image/png;base64," + "abcdefghijklmnop/rstuvwxyzABCDEF" * 200_000
    written = json.dumps(body).replace("/", "\\/").encode()
    assert json_object(JSON, written) == body


def test_the_gateways_longest_prompts_are_read_whatever_they_consist_of() -> None:
    body = {"prompt": '"' * 10_000, "negative_prompt": '"' * 6_500 + "\N{LARGE RED CIRCLE}" * 3_500}
    written = json.dumps(body).encode()
    assert MAX_BODY_BYTES < len(written) < MAX_GATEWAY_BODY_BYTES
    assert json_object(JSON, written) == body


def test_an_answer_names_few_of_many_wrong_fields() -> None:
    fields = {f"k{number}": 0 for number in range(MAX_VALUES)}
    with pytest.raises(ValidationError) as refused:
        TextToImageRequest.model_validate({"prompt": "a", **fields})
    assert len(field_problems(refused.value.errors())) == MAX_PROBLEMS


def test_a_list_of_loras_has_an_end() -> None:
    loras = [{"path": f"l{number}"} for number in range(MAX_LORAS + 1)]
    body = {"prompt": "a", "image_url": "data:,"}
    assert ImageToImageRequest.model_validate({**body, "loras": loras[1:]})
    with pytest.raises(ValidationError) as refused:
        ImageToImageRequest.model_validate({**body, "loras": loras})
    assert [error["type"] for error in refused.value.errors()] == ["too_long"]
    with pytest.raises(ValidationError) as refused:
        TextToImageRequest.model_validate({"prompt": "a", "loras": [{}] * MAX_VALUES})
    assert refused.value.error_count() <= MAX_LORAS + 1


finite = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**MAX_DIGITS) + 1, 10**MAX_DIGITS - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3)
    ),
    max_leaves=5,  # fewer levels than are refused
)


@pytest.mark.parser
@given(st.dictionaries(st.text(), finite, max_size=4), st.booleans())
def test_all_other_json_is_read_as_it_is(value: dict[str, object], marked: bool) -> None:
    body = json.dumps(value).encode("utf-8-sig" if marked else "utf-8")
    assert json_object(JSON, body) == value


@pytest.mark.parser
@given(st.binary(max_size=200))
def test_no_bytes_are_an_unforeseen_error(body: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        json_object(JSON, body)


def test_an_answer_does_not_grow_with_the_names_of_unknown_fields() -> None:
    problems = [FieldProblem(("body", "k" * 60_000), "is unknown", "extra") for _ in range(3000)]
    error = InvalidRequest(problems)
    assert len(error.problems) == MAX_PROBLEMS
    assert len(error.message) < MAX_PROBLEMS * (MAX_NAME_CHARACTERS + 30)
