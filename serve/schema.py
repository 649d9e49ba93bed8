"""The JSON of requests and responses."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

MAX_PROMPT_CHARACTERS = 2000
MAX_UNTIDY_CHARACTERS = 10_000
"""The longest prompt that the gateway accepts. It cuts the prompt to `MAX_PROMPT_CHARACTERS`."""

MAX_SEED = 2**63 - 1
MAX_DRAWN_SEED = 2**53 - 1
"""The largest seed that the service draws. JavaScript reads a larger one from JSON rounded, so that
it would draw another image."""

MAX_LORAS = 64
"""How many LoRAs one request may name. Each wrong one is an error of its own, so the list ends."""

ImageFormat = Literal["jpeg", "png", "webp"]

SizeName = Literal[
    "square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"
]

SIZES: dict[SizeName, tuple[int, int]] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
"""Width and height of fal's named sizes."""

REQUEST_ID = r"[0-9A-Za-z][0-9A-Za-z._:-]{0,127}"
"""A request id that may be logged and returned in a header."""
REQUEST_ID_OR_NONE = rf"^({REQUEST_ID})?$"

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


EXAMPLE_PICTURE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)
"""One white pixel."""


class TraceContext(BaseModel):
    """A caller's W3C trace context, for callers that cannot set headers."""

    model_config = ConfigDict(extra="ignore")

    traceparent: str
    tracestate: str = ""

    def carrier(self) -> dict[str, str]:
        """The context as a mapping for OpenTelemetry's propagator."""
        return {"traceparent": self.traceparent, "tracestate": self.tracestate}


def well_formed_context(value: Any) -> TraceContext | None:
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
    return TraceContext(
        traceparent=traceparent.strip(),
        tracestate=tracestate if isinstance(tracestate, str) else "",
    )


_NOT_BLANK: dict[str, Any] = {"pattern": r"\S"}
"""Says in the OpenAPI document what the validator below checks with a clearer message."""


def _any_value(schema: dict[str, Any]) -> None:
    """In the OpenAPI document: whatever is not a trace context is ignored."""
    schema["anyOf"].append({})


def _only_empty() -> Any:
    return Field(
        default=None,
        description="Only an empty list is accepted.",
        json_schema_extra={"maxItems": 0},
    )


class LoraWeight(BaseModel):
    """A LoRA that the server was configured with, and how strongly it is applied."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str = Field(
        min_length=1, max_length=64, description="The LoRA's name on this server. No URL, no file."
    )
    scale: float = Field(
        default=1.0, ge=-4, le=4, allow_inf_nan=False, description="0: without it."
    )
    force: bool = Field(default=False, description="Accepted and not used.")


def _distinct_loras(loras: list[LoraWeight] | None) -> list[LoraWeight] | None:
    if loras and len({lora.path for lora in loras}) < len(loras):
        raise ValueError("must name each LoRA once")
    return loras


LoraWeights = Annotated[
    list[LoraWeight], Field(max_length=MAX_LORAS), AfterValidator(_distinct_loras)
]


class ImageSize(BaseModel):
    """A size in pixels."""

    model_config = ConfigDict(extra="forbid", strict=True)

    width: int
    height: int


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
    guidance_end: float = Field(
        default=1.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description=(
            "The share of the steps that run with guidance, rounded to whole steps. Each step "
            "after them takes about half the time."
        ),
    )
    width: int | None = Field(default=None, description="Pixels; null: the default size.")
    height: int | None = Field(default=None, description="Pixels; null: the default size.")
    image_size: ImageSize | SizeName | None = Field(
        default=None,
        description="`{width, height}`, or the name of a size, instead of `width` and `height`.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="null: drawn, below 2^53; the response says which.",
    )
    num_images: int = Field(
        default=1,
        ge=1,
        description=(
            "How many images to draw, each with the next seed; the server's own limit is often 4."
        ),
    )
    loras: LoraWeights | None = Field(
        default=None, description="LoRAs of this server's list, several at once; null: none."
    )
    format: ImageFormat = Field(default="jpeg", description="The image's encoding.")
    image_quality: int | None = Field(
        default=None, ge=1, le=100, description="Of jpeg and webp; null: 95 and 90."
    )
    sync_mode: bool = Field(
        default=False, description="Answer with a data URI where images are uploaded otherwise."
    )
    preview: bool = Field(
        default=False,
        description=(
            "On /stream: a small picture with every step. None where the images are checked by a "
            "safety checker."
        ),
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="Give up after this long; null, or more than the server's own: the server's.",
    )
    trace_context: Annotated[TraceContext | None, BeforeValidator(well_formed_context)] = Field(
        default=None,
        description=(
            "The caller's W3C trace context; preferred to the headers. A malformed one is ignored."
        ),
        json_schema_extra=_any_value,
    )

    request_id: str = Field(
        default="",
        pattern=REQUEST_ID_OR_NONE,
        description="The caller's name for this request, in its log lines and response headers.",
    )

    enable_safety_checker: bool = Field(
        default=True,
        description=(
            "Whether images are checked, on a server with a safety checker: flagged ones are "
            "black, and previews are left out. false is refused unless the server allows it."
        ),
    )

    # Fields of fal-ai/fast-sdxl that this model has no use for. Each accepts what asks for nothing.
    safety_checker_version: Literal["v1", "v2"] | None = Field(
        default=None, description="Accepted; the server has one checker or none."
    )
    expand_prompt: bool = Field(default=False, description="true is refused.")
    embeddings: list[Any] | None = _only_empty()

    @field_validator("expand_prompt", "embeddings")
    @classmethod
    def _asks_for_nothing(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported by this service; leave it out")
        return value

    @field_validator("image_size")
    @classmethod
    def _one_size(cls, value: Any, info: ValidationInfo) -> Any:
        both = info.data.get("width") is not None or info.data.get("height") is not None
        if value is not None and both:
            raise ValueError("must be absent beside width and height")
        return value

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Width and height in pixels, as far as the request has them."""
        if isinstance(self.image_size, ImageSize):
            return self.image_size.width, self.image_size.height
        if self.image_size is not None:
            return SIZES[self.image_size]
        return self.width, self.height

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be blank")
        return value


class ImageToImageRequest(TextToImageRequest):
    """A request of text to image that begins with a picture. `image_url` is read only after the
    request is valid, and no answer repeats it."""

    image_url: str = Field(
        min_length=1,
        description=(
            "The picture: a data URI in base64 of a JPEG, PNG or WebP, or an https URL of a host "
            "that the server allows. It is scaled and cropped about its centre to the image's size."
        ),
        examples=[EXAMPLE_PICTURE],
    )
    strength: float = Field(
        default=0.95,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description=(
            "The share of the steps that run: low values stay close to the picture. A share of "
            "less than one step is refused."
        ),
    )


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


def _is_none(value: Any) -> bool:
    return value is None


class GeneratedImage(BaseModel):
    """The image's URL, or the image as a data URI: fal's image type, and the image's seed."""

    # fal's web page shows the image by this.
    model_config = ConfigDict(json_schema_extra={"ui": {"field": "image"}})

    url: str
    width: int
    height: int
    content_type: str
    seed: int = Field(description="It draws this image again, also in a request for one image.")


class Timings(BaseModel):
    """The stages' durations in milliseconds. A stage that did not run is null; `safety_check_ms` is
    absent then.

    Images may be drawn in several runs; the model's stages are then the sums over the runs, and
    `steps_ms` has the steps of each in turn.

    `clock` is what the model's stages were timed with: `cuda` events or the `host` clock.
    `inference` is for fal's clients: seconds of the model's stages.
    """

    receive_ms: float | None = None
    image_decode_ms: float | None = Field(
        default=None, description="Image to image: fetching, decoding and scaling the picture."
    )
    queue_ms: float | None = None
    lora_swap_ms: float | None = None
    text_encode_ms: float | None = None
    vae_encode_ms: float | None = Field(
        default=None, description="Image to image: encoding the picture to latents."
    )
    denoise_ms: float | None = None
    steps_ms: list[float] = Field(default_factory=list)
    vae_decode_ms: float | None = None
    safety_check_ms: float | None = Field(default=None, exclude_if=_is_none)
    image_encode_ms: float | None = None
    upload_ms: float | None = None
    inference: float
    clock: str


class TextToImageResponse(BaseModel):
    """The images, and what is needed to draw them again or to find their trace.

    `image` is the first of `images`, and `seed` its seed.
    """

    image: GeneratedImage
    images: list[GeneratedImage]
    seed: int
    prompt: str
    timings: Timings
    trace_id: str
    prompt_truncated: bool = Field(
        description="The text encoders did not read the whole prompt or negative prompt."
    )
    prompt_tokens: int = Field(
        description="Tokens of the whole prompt, also of what the text encoders did not read."
    )
    has_nsfw_concepts: list[bool] | None = Field(
        default=None,
        exclude_if=_is_none,
        description=(
            "For each image whether the safety checker flagged it; it is black then. Absent where "
            "images are not checked."
        ),
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
    eta_ms: float | None = Field(
        default=None, description="With 429 and 504: the estimated time of the request."
    )
