"""Data URIs: what is read, and that everything else is refused without being repeated."""

from __future__ import annotations

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.pictures.reading import data_uri_bytes
from serve.errors import MAX_PICTURE_BYTES, UnusablePicture

TYPES = st.sampled_from(["image/jpeg", "image/jpg", "image/png", "image/webp", "IMAGE/PNG"])
PARAMETERS = st.sampled_from(["", ";charset=utf-8", ";name=a.png;x=1"])


def refused(uri: str) -> str:
    began = time.monotonic()
    with pytest.raises(UnusablePicture) as caught:
        data_uri_bytes(uri)
    assert time.monotonic() - began < 1
    (problem,) = caught.value.problems
    assert problem.location == ("body", "image_url")
    return problem.kind


@pytest.mark.parser
@given(st.binary(max_size=200), TYPES, PARAMETERS)
def test_the_bytes_of_a_data_uri_are_read(data: bytes, media_type: str, parameters: str) -> None:
    encoded = base64.b64encode(data).decode()
    assert data_uri_bytes(f"data:{media_type}{parameters};base64,{encoded}") == data


@pytest.mark.parser
@given(st.sampled_from(["", "data:", "data:image/png;base64,"]), st.text(max_size=80))
def test_any_other_text_is_refused_and_not_repeated(head: str, text: str) -> None:
    mark = "zebra"
    message = ""
    try:
        data_uri_bytes(f"{head}{text}{mark}")
    except UnusablePicture as error:
        message = error.message
    assert mark not in message


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("data:,", "data_uri"),
        ("data:image/png,AAAA", "data_uri"),
        ("data:image/png;base64", "data_uri"),
        ("data:image/gif;base64,AAAA", "data_uri"),
        ("data:image/svg+xml;base64,AAAA", "data_uri"),
        ("data:text/html;base64,AAAA", "data_uri"),
        ("data:image/png" + ";a=b" * 100 + ";base64,AAAA", "data_uri"),
        ("data:image/png;base64,AAA", "base64"),
        ("data:image/png;base64,AA AA", "base64"),
        ("data:image/png;base64,AA-_", "base64"),
        ("data:image/png;base64,ÄÄÄÄ", "base64"),
        ("data:image/png;base64,%41AAA", "base64"),
    ],
)
def test_what_is_wrong_is_named(uri: str, kind: str) -> None:
    assert refused(uri) == kind


def test_a_picture_may_have_the_limits_size_and_no_byte_more() -> None:
    def uri(size: int) -> str:
        return "data:image/png;base64," + base64.b64encode(bytes(size)).decode()

    assert len(data_uri_bytes(uri(MAX_PICTURE_BYTES))) == MAX_PICTURE_BYTES
    for more in (1, 2, 3, 1000):
        assert refused(uri(MAX_PICTURE_BYTES + more)) == "too_large"
