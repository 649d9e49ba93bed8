"""The JSON of OpenAI's images API, and what it means here.

Every field of the API is declared. One that this service cannot honour is refused by its name,
unless its value asks for nothing. The limits that both APIs share are checked by
`TextToImageRequest`, once.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from serve.schema import ImageFormat, LoraWeights, TextToImageRequest

MOST_IMAGES = 10
MOST_PARTIAL_IMAGES = 3

Quality = Literal["auto", "standard", "low", "medium", "high", "hd", "xhigh", "max"]

ResponseQuality = Literal["low", "medium", "high", "xhigh", "max"]

STEPS_BY_QUALITY: dict[Quality, float] = {
    "low": 0.5,
    "auto": 1.0,
    "standard": 1.0,
    "medium": 1.0,
    "high": 1.5,
    "hd": 1.5,
    "xhigh": 2.0,
    "max": 2.5,
}
"""Denoising steps of a quality, as a factor of the model's own number of steps."""

FEW_STEPS = 10
"""Below this, the model was made for its own number of steps, and quality does not change it."""

_SIZE = re.compile(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})")


class ImageGenerationRequest(BaseModel):
    """`POST /v1/images/generations`: OpenAI's fields, and ours at the end."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to draw.")
    model: str | None = Field(
        default=None, description="One of GET /v1/models; null: the only one."
    )
    n: int | None = Field(default=None, ge=1, le=MOST_IMAGES, description="Images; null: 1.")
    size: str | None = Field(
        default=None,
        description="`WIDTHxHEIGHT` of a warm size; `auto` and null: the default size.",
    )
    quality: Quality | None = Field(default=None, description="Sets the number of steps.")
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        default=None, description="`transparent` is refused."
    )
    moderation: Literal["auto", "low"] | None = Field(
        default=None, description="Accepted; there is no moderation by prompt."
    )
    output_format: Literal["png", "jpeg", "webp", "gif", "svg"] | None = Field(
        default=None, description="null: png. `gif` and `svg` are refused."
    )
    output_compression: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="The encoder's quality, of jpeg and webp; 0 means 1.",
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        default=None, description="null: b64_json. `url` needs a server that uploads its images."
    )
    stream: bool | None = Field(default=None, description="Server-sent events.")
    partial_images: int | None = Field(
        default=None,
        ge=0,
        le=MOST_PARTIAL_IMAGES,
        description="Previews in a stream; null: none. With a safety checker there are none.",
    )
    user: str | None = Field(default=None, max_length=512, description="Accepted and not used.")
    safety_identifier: str | None = Field(
        default=None, max_length=512, description="Accepted and not used."
    )
    style: str | None = Field(default=None, description="Refused.")
    complexity: str | None = Field(default=None, description="Refused.")
    frame_count: int | None = Field(default=None, description="Refused.")
    frame_duration_ms: int | None = Field(default=None, description="Refused.")
    svg: dict[str, Any] | None = Field(default=None, description="Refused.")

    # Ours
    negative_prompt: str = Field(default="", description="What to keep out.")
    num_inference_steps: int | None = Field(default=None, description="Overrides `quality`.")
    guidance_scale: float | None = Field(default=None, description="As in `POST /`.")
    guidance_end: float = Field(default=1.0, description="As in `POST /`.")
    seed: int | None = Field(default=None, description="Image i has this seed + i; null: drawn.")
    loras: LoraWeights | None = Field(default=None, description="As in `POST /`.")
    decoded_partial_images: bool = Field(
        default=False,
        description="Partial images by the model's decoder; otherwise a linear map, enlarged.",
    )

    @field_validator("style", "complexity", "frame_count", "frame_duration_ms", "svg")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("is not supported by this model; leave it out")
        return value

    @field_validator("background")
    @classmethod
    def _opaque(cls, value: str | None) -> str | None:
        if value == "transparent":
            raise ValueError("must be auto or opaque: this model draws every pixel")
        return value

    @field_validator("output_format")
    @classmethod
    def _still_image(cls, value: str | None) -> str | None:
        if value in ("gif", "svg"):
            raise ValueError("must be png, jpeg or webp")
        return value

    @field_validator("size")
    @classmethod
    def _well_formed_size(cls, value: str | None) -> str | None:
        if value is not None and value != "auto" and not _SIZE.fullmatch(value):
            raise ValueError("must be auto or WIDTHxHEIGHT in pixels, like 1024x1024")
        return value

    @field_validator("output_compression")
    @classmethod
    def _needs_lossy_format(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("output_format") in (None, "png"):
            raise ValueError("needs output_format jpeg or webp")
        return value

    @field_validator("partial_images")
    @classmethod
    def _needs_stream(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("stream"):
            raise ValueError("needs stream: true")
        if value and (info.data.get("n") or 1) > 1:
            raise ValueError("needs n of 1")
        return value

    @field_validator("decoded_partial_images")
    @classmethod
    def _needs_partial_images(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("partial_images"):
            raise ValueError("needs partial_images of 1 and more")
        return value

    @property
    def response_quality(self) -> ResponseQuality:
        """The quality in the words of a response, which has fewer."""
        match self.quality:
            case None | "auto" | "standard":
                return "medium"
            case "hd":
                return "high"
            case other:
                return other

    @property
    def image_format(self) -> ImageFormat:
        return self.output_format or "png"  # type: ignore[return-value]  # the others are refused

    @property
    def image_quality(self) -> int | None:
        """`output_compression` as the encoder's quality, which begins at 1."""
        return None if self.output_compression is None else max(1, self.output_compression)

    def text_to_image(self, model_steps: int, fixed_steps: bool = False) -> TextToImageRequest:
        """The same request in this service's own words.

        Args:
            model_steps: the number of denoising steps that the model takes by default.
            fixed_steps: the model takes no other number, so `quality` does not change it.

        Raises:
            RequestValidationError: a value that `TextToImageRequest` does not allow.
        """
        size = None if self.size is None else _SIZE.fullmatch(self.size)
        steps = self.num_inference_steps
        if steps is None and not fixed_steps:
            steps = self._steps(model_steps)
        fields = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": steps,
            "guidance_scale": self.guidance_scale,
            "guidance_end": self.guidance_end,
            "width": int(size[1]) if size else None,
            "height": int(size[2]) if size else None,
            "seed": self.seed,
            "loras": self.loras,
            "num_images": self.n or 1,
            "format": self.image_format,
            "image_quality": self.image_quality,
            "sync_mode": self.response_format != "url",
            "preview": bool(self.partial_images),
        }
        try:
            return TextToImageRequest.model_validate(fields)
        except ValidationError as error:
            problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
            raise RequestValidationError(problems) from None

    def _steps(self, model_steps: int) -> int | None:
        if self.quality is None or model_steps < FEW_STEPS:
            return None
        return min(100, round(STEPS_BY_QUALITY[self.quality] * model_steps))


class TextTokens(BaseModel):
    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """What the request took, in tokens: those of the prompt. This model makes no output tokens."""

    input_tokens: int
    input_tokens_details: TextTokens
    output_tokens: int = 0
    total_tokens: int

    @classmethod
    def of_prompt(cls, tokens: int) -> Usage:
        return cls(
            input_tokens=tokens,
            input_tokens_details=TextTokens(text_tokens=tokens),
            total_tokens=tokens,
        )


class Image(BaseModel):
    """One of the two fields is there."""

    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    """The response of `POST /v1/images/generations`. The last four fields are ours."""

    created: int = Field(description="Unix seconds.")
    data: list[Image]
    size: str
    output_format: ImageFormat
    background: Literal["opaque"] = "opaque"
    quality: ResponseQuality
    usage: Usage
    seeds: list[int]
    trace_id: str
    prompt_truncated: bool
    has_nsfw_concepts: list[bool] | None = Field(
        default=None,
        description=(
            "With a safety checker: for each image whether it was flagged; it is black then."
        ),
    )


class StreamedImage(BaseModel):
    """What both events of a stream that hold an image have."""

    b64_json: str
    created_at: int = Field(description="Unix seconds.")
    size: str
    output_format: ImageFormat
    background: Literal["opaque"] = "opaque"
    quality: ResponseQuality


class PartialImage(StreamedImage):
    """The event `image_generation.partial_image`: a preview."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedImage(StreamedImage):
    """The event `image_generation.completed`: one of the images. The last two fields are ours."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage
    seed: int
    has_nsfw_concepts: list[bool] | None = Field(
        default=None,
        description="With a safety checker: whether this image was flagged; it is black then.",
    )


class Model(BaseModel):
    """One of the names that a request's `model` may have."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["stepspan"] = "stepspan"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class OpenAIErrorBody(BaseModel):
    """The body of every error on OpenAI's endpoints."""

    error: Error
    trace_id: str
