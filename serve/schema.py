"""The JSON of requests and responses."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

MAX_PROMPT_CHARACTERS = 2000
MAX_UNTIDY_CHARACTERS = 10_000
"""The longest prompt that the gateway accepts. It cuts the prompt to `MAX_PROMPT_CHARACTERS`."""

MAX_SEED = 2**63 - 1

ImageFormat = Literal["jpeg", "png", "webp"]

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class TraceContext(BaseModel):
    """A caller's W3C trace context, for callers that cannot set headers."""

    model_config = ConfigDict(extra="ignore")

    traceparent: str
    tracestate: str = ""

    def carrier(self) -> dict[str, str]:
        """The context as a mapping for OpenTelemetry's propagator."""
        return {"traceparent": self.traceparent, "tracestate": self.tracestate}


def _well_formed_or_none(value: Any) -> Any:
    """A well-formed trace context, else None: a wrong one is no reason to refuse a request."""
    if isinstance(value, TraceContext):
        return value
    if not isinstance(value, dict):
        return None
    traceparent, tracestate = value.get("traceparent"), value.get("tracestate")
    if not isinstance(traceparent, str) or not _TRACEPARENT.fullmatch(traceparent.strip()):
        return None
    if isinstance(tracestate, list) and all(isinstance(part, str) for part in tracestate):
        tracestate = ",".join(tracestate)  # as several headers are combined
    return {
        "traceparent": traceparent.strip(),
        "tracestate": tracestate if isinstance(tracestate, str) else "",
    }


_NOT_BLANK: dict[str, Any] = {"pattern": r"\S"}
"""Says in the OpenAPI document what the validator below checks with a clearer message."""


def _any_value(schema: dict[str, Any]) -> None:
    """In the OpenAPI document: whatever is not a trace context is ignored."""
    schema["anyOf"].append({})


class TextToImageRequest(BaseModel):
    """What to draw and how. A number must be a JSON number: `"20"` and `true` are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(
        min_length=1,
        max_length=MAX_PROMPT_CHARACTERS,
        description="What to draw.",
        examples=["a red circle on a white background"],
        json_schema_extra=_NOT_BLANK,
    )
    negative_prompt: str = Field(
        default="", max_length=MAX_PROMPT_CHARACTERS, description="What to keep out."
    )
    num_inference_steps: int | None = Field(
        default=None, ge=1, le=100, description="Denoising steps; null: the model's own, often 20."
    )
    guidance_scale: float | None = Field(
        default=None,
        ge=0,
        le=20,
        allow_inf_nan=False,
        description=(
            "How closely to follow the prompt; 1 and below turn guidance off; null: the model's "
            "own, often 5."
        ),
    )
    width: int | None = Field(default=None, description="Pixels; null: the default size.")
    height: int | None = Field(default=None, description="Pixels; null: the default size.")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="null: drawn; the response says which."
    )
    format: ImageFormat = Field(default="jpeg", description="The image's encoding.")
    preview: bool = Field(default=False, description="On /stream: a small picture with every step.")
    deadline_seconds: float | None = Field(
        default=None,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="Give up after this long; null, or more than the server's own: the server's.",
    )
    trace_context: Annotated[TraceContext | None, BeforeValidator(_well_formed_or_none)] = Field(
        default=None,
        description=(
            "The caller's W3C trace context; preferred to the headers. A malformed one is ignored."
        ),
        json_schema_extra=_any_value,
    )

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be blank")
        return value


class PromptRequest(TextToImageRequest):
    """The gateway's request: the same, but with longer prompts, which the gateway cuts."""

    prompt: str = Field(
        min_length=1,
        max_length=MAX_UNTIDY_CHARACTERS,
        description="What to draw; made tidy, and cut at 2,000 characters.",
        examples=["a red circle   on a\twhite background"],
        json_schema_extra=_NOT_BLANK,
    )
    negative_prompt: str = Field(
        default="", max_length=MAX_UNTIDY_CHARACTERS, description="What to keep out."
    )


class GeneratedImage(BaseModel):
    """The image's URL, or the image as a data URI. A subset of fal's image type."""

    # fal's web page shows the image by this.
    model_config = ConfigDict(json_schema_extra={"ui": {"field": "image"}})

    url: str
    width: int
    height: int
    content_type: str


class Timings(BaseModel):
    """The stages' durations in milliseconds. A stage that did not run is null.

    `clock` is what the model's stages were timed with: `cuda` events or the `host` clock.
    """

    receive_ms: float | None = None
    queue_ms: float | None = None
    text_encode_ms: float | None = None
    denoise_ms: float | None = None
    steps_ms: list[float] = Field(default_factory=list)
    vae_decode_ms: float | None = None
    image_encode_ms: float | None = None
    upload_ms: float | None = None
    clock: str


class TextToImageResponse(BaseModel):
    """The image, and what is needed to draw it again or to find its trace."""

    image: GeneratedImage
    seed: int
    timings: Timings
    trace_id: str
    prompt_truncated: bool = Field(
        description="The text encoders did not read the whole prompt or negative prompt."
    )


class InvalidField(BaseModel):
    """What is wrong with a field. Never repeats what was sent."""

    loc: list[str | int]
    msg: str
    type: str


class ErrorBody(BaseModel):
    """The body of every error. `trace_id` is also in the service's log."""

    detail: str | list[InvalidField]
    error_type: str
    trace_id: str = Field(pattern="^[0-9a-f]{32}$")
