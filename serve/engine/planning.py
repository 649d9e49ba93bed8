"""A valid request with everything decided that it left open: size, steps, guidance, seed."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kernels_warmup.shapes import ALLOWED_SIDES, CompiledShape
from metrics.records import GenerationFacts, LoraSet
from serve.errors import FieldProblem, InvalidRequest
from serve.schema import MAX_DRAWN_SEED, MAX_SEED, ImageToImageRequest, TextToImageRequest
from serve.settings import ServeSettings

CountChunks = Callable[[str, str, bool], int]
"""How many chunks of 75 tokens a run needs for a prompt and a negative prompt, with guidance or
without it."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request that this process can serve, with its defaults filled in.

    Attributes:
        strength: of image to image; None: text to image.
        picture: what image to image begins with, (height, width, 3) uint8 of the request's shape,
            once it has been decoded.
    """

    request: TextToImageRequest
    shape: CompiledShape
    num_inference_steps: int
    guidance_scale: float
    seed: int
    loras: LoraSet = ()
    chunks: int = 1
    """How many chunks of 75 tokens its prompts are encoded in."""
    checked: bool = False
    """Whether the safety checker checks its images."""
    strength: float | None = None
    picture: Any = field(default=None, compare=False, repr=False)

    @property
    def run_key(self) -> tuple[object, ...]:
        """What the images of one run have in common. The number of chunks is among it: padding to
        another request's number would change the picture."""
        return (
            self.shape,
            self.num_inference_steps,
            self.guidance_scale if self.guided else 1.0,
            self.guided_steps,
            self.loras,
            self.chunks,
            self.steps_to_run,
            self.from_picture,
        )

    @property
    def from_picture(self) -> bool:
        return self.strength is not None

    @property
    def steps_to_run(self) -> int:
        """The steps that run: all, or the last ones with a picture. Rounded as diffusers does."""
        if self.strength is None:
            return self.num_inference_steps
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    @property
    def num_images(self) -> int:
        return self.request.num_images

    def seed_of(self, image: int) -> int:
        """The seed of one of its images. It draws the same image in a request of its own."""
        return self.seed + image

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs. It doubles the UNet's batch."""
        return self.guided_steps > 0

    @property
    def guided_steps(self) -> int:
        """The first of the steps that run, which have guidance; those after them have none."""
        if self.guidance_scale <= 1:
            return 0
        return int(self.request.guidance_end * self.steps_to_run + 0.5)

    def facts(self, model_name: str, with_prompt: bool) -> GenerationFacts:
        """What the trace and the metrics say of the request.

        Args:
            with_prompt: include the prompt's text; without it only its length is recorded.
        """
        return GenerationFacts(
            model_name=model_name,
            prompt_length=len(self.request.prompt),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            guidance_end=self.request.guidance_end,
            width=self.shape.width,
            height=self.shape.height,
            seed=self.seed,
            num_images=self.num_images,
            strength=self.strength,
            steps_left_out=self.num_inference_steps - self.steps_to_run,
            prompt=self.request.prompt if with_prompt else None,
            loras=self.loras,
        )


def serves_guidance(settings: ServeSettings) -> bool:
    """Whether guidance is served. A checkpoint made to run without it needs no graph for it."""
    return settings.guidance_scale > 1


def must_be_checked(settings: ServeSettings) -> bool:
    """Whether every image goes through the safety checker, whatever its request says."""
    return settings.safety_checker is not None and not settings.safety_checker_optional


def plan_request(
    request: TextToImageRequest,
    settings: ServeSettings,
    warm_shapes: Sequence[CompiledShape],
    trained_shapes: Sequence[CompiledShape],
    count_chunks: CountChunks = lambda *_: 1,
) -> PlannedRequest:
    """Fill in what a request left open.

    Args:
        warm_shapes: the shapes that are warm; the first is the default size.
        trained_shapes: the sizes that the model was trained for. With `SDXL_SERVE_COLD_SHAPES` the
            largest shape of both bounds the image's size.
        count_chunks: called where prompts may have several chunks.

    Raises:
        InvalidRequest: the size, the steps, the guidance, a LoRA, the number of images or an image
            without a safety check is not served here, or the strength leaves no step to run.
    """
    _require_images(request, settings)
    planned = PlannedRequest(
        request,
        _choose_shape(request, settings, warm_shapes, trained_shapes),
        _choose_steps(request, settings),
        _choose_guidance_scale(request, settings),
        _choose_seed(request),
        loras=_choose_loras(request, settings),
        checked=_choose_check(request, settings),
        strength=request.strength if isinstance(request, ImageToImageRequest) else None,
    )
    _require_a_step(planned)
    if settings.prompt_chunks == 1:
        return planned
    chunks = count_chunks(request.prompt, request.negative_prompt, planned.guided)
    return replace(planned, chunks=chunks)


def _require_a_step(planned: PlannedRequest) -> None:
    if planned.steps_to_run < 1:
        message = (
            f"must be at least {1 / planned.num_inference_steps:.3g} with "
            f"{planned.num_inference_steps} steps: it is the share of the steps that run, and at "
            "least one must run"
        )
        raise InvalidRequest([FieldProblem(("body", "strength"), message, "strength")])


def _require_images(request: TextToImageRequest, settings: ServeSettings) -> None:
    if request.num_images > settings.max_images:
        message = f"must be at most {settings.max_images}"
        raise InvalidRequest([FieldProblem(("body", "num_images"), message, "num_images")])


def _choose_check(request: TextToImageRequest, settings: ServeSettings) -> bool:
    if settings.safety_checker is None:
        return False
    if not request.enable_safety_checker and must_be_checked(settings):
        message = "must be true: this server checks every image"
        name = "enable_safety_checker"
        raise InvalidRequest([FieldProblem(("body", name), message, "safety_checker")])
    return request.enable_safety_checker


def _choose_steps(request: TextToImageRequest, settings: ServeSettings) -> int:
    steps = request.num_inference_steps or settings.default_steps
    if settings.timesteps is not None and steps != settings.default_steps:
        message = f"must be {settings.default_steps}: this model runs at fixed timesteps"
        raise InvalidRequest([FieldProblem(("body", "num_inference_steps"), message, "steps")])
    return steps


def _choose_seed(request: TextToImageRequest) -> int:
    """The seed of the first image. Each further image has the next one, which must exist too."""
    further = request.num_images - 1
    if request.seed is None:
        return secrets.randbelow(MAX_DRAWN_SEED - further + 1)
    largest = MAX_SEED - further
    if request.seed > largest:
        message = (
            f"must be at most {largest} with {request.num_images} images: each has the next seed"
        )
        raise InvalidRequest([FieldProblem(("body", "seed"), message, "seed")])
    return request.seed


def _choose_loras(request: TextToImageRequest, settings: ServeSettings) -> LoraSet:
    """The LoRAs that change the picture, sorted: like sets share a run, however they were sent."""
    names = [each.name for each in settings.loras]
    wanted = request.loras or ()
    for place, lora in enumerate(wanted):
        if lora.path not in names:
            message = "must be left out: this server has no LoRAs"
            if names:
                message = f"must be one of this server's LoRAs: {', '.join(names)}"
            raise InvalidRequest([FieldProblem(("body", "loras", place, "path"), message, "lora")])
    return tuple(sorted((lora.path, lora.scale) for lora in wanted if lora.scale != 0))


def _choose_shape(
    request: TextToImageRequest,
    settings: ServeSettings,
    warm_shapes: Sequence[CompiledShape],
    trained_shapes: Sequence[CompiledShape],
) -> CompiledShape:
    default = warm_shapes[0]
    wanted_width, wanted_height = request.size
    width = default.width if wanted_width is None else wanted_width
    height = default.height if wanted_height is None else wanted_height
    for shape in warm_shapes:
        if (shape.width, shape.height) == (width, height):
            return shape
    allowed = f"one of {', '.join(str(shape) for shape in warm_shapes)}"
    if settings.serve_cold_shapes:
        most = max(shape.pixels for shape in (*warm_shapes, *trained_shapes))
        allowed += f", or any of at most {most} pixels with {ALLOWED_SIDES}"
        with contextlib.suppress(ValueError):
            shape = CompiledShape(width, height)
            if shape.pixels <= most:
                return shape
    field_name = "width" if request.width is not None else "height"
    if request.image_size is not None:
        field_name = "image_size"
    raise InvalidRequest(
        [FieldProblem(("body", field_name), f"the size must be {allowed}", "shape")]
    )


def _choose_guidance_scale(request: TextToImageRequest, settings: ServeSettings) -> float:
    scale = request.guidance_scale
    if scale is None:
        return settings.guidance_scale
    if scale > 1 and not serves_guidance(settings):
        message = "must be at most 1: this model runs without guidance"
        raise InvalidRequest([FieldProblem(("body", "guidance_scale"), message, "guidance")])
    return scale
