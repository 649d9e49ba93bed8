from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.schema import MAX_PROMPT_CHARACTERS, MAX_SEED, TextToImageRequest

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_defaults() -> None:
    request = TextToImageRequest(prompt="a red circle")
    assert (request.num_inference_steps, request.guidance_scale) == (None, None)
    assert (request.width, request.height, request.seed) == (None, None, None)
    assert request.format == "jpeg"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x" * MAX_PROMPT_CHARACTERS},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"num_inference_steps": 1},
        {"num_inference_steps": 100},
        {"guidance_scale": 0},
        {"guidance_scale": 20},
        {"negative_prompt": "x" * MAX_PROMPT_CHARACTERS},
        {"format": "webp"},
        {"deadline_seconds": 0.001},
    ],
)
def test_the_bounds_are_allowed(fields: dict[str, object]) -> None:
    TextToImageRequest.model_validate({"prompt": "x"} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": " \t\n"},
        {"prompt": None},
        {"prompt": 7},
        {"prompt": ["x"]},
        {"prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)},
        {"negative_prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)},
        {"num_inference_steps": 0},
        {"num_inference_steps": 101},
        {"num_inference_steps": -5},
        {"num_inference_steps": 10**30},
        {"num_inference_steps": 2.5},
        {"num_inference_steps": "20"},
        {"num_inference_steps": True},
        {"guidance_scale": float("nan")},
        {"guidance_scale": float("inf")},
        {"guidance_scale": -0.1},
        {"guidance_scale": 20.1},
        {"guidance_scale": "5"},
        {"seed": -1},
        {"seed": MAX_SEED + 1},
        {"seed": 1.5},
        {"width": "128"},
        {"width": 1.5},
        {"format": "jpg"},
        {"format": "gif"},
        {"preview": "yes"},
        {"deadline_seconds": 0},
        {"deadline_seconds": -1},
        {"deadline_seconds": float("nan")},
        {"steps": 3},
    ],
)
def test_everything_else_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TextToImageRequest.model_validate({"prompt": "x"} | fields)


def test_a_trace_context_is_read() -> None:
    request = TextToImageRequest.model_validate(
        {"prompt": "x", "trace_context": {"traceparent": PARENT, "tracestate": "a=1"}}
    )
    assert request.trace_context is not None
    assert request.trace_context.carrier() == {"traceparent": PARENT, "tracestate": "a=1"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


@pytest.mark.parser
@given(json_values)
def test_a_malformed_trace_context_is_ignored_never_an_error(value: object) -> None:
    request = TextToImageRequest.model_validate({"prompt": "x", "trace_context": value})
    assert request.trace_context is None


@pytest.mark.parser
@given(st.dictionaries(st.sampled_from(["traceparent", "tracestate"]), json_values))
def test_a_malformed_trace_context_of_the_right_form_is_ignored(value: object) -> None:
    request = TextToImageRequest.model_validate({"prompt": "x", "trace_context": value})
    assert request.trace_context is None
