"""A valid request with everything decided that it left open: size, steps, guidance, seed."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from kernels_warmup.shapes import ALLOWED_SIDES, CompiledShape
from metrics.records import GenerationFacts
from serve.errors import FieldProblem, InvalidRequest
from serve.schema import MAX_SEED, TextToImageRequest
from serve.settings import ServeSettings


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request that this process can serve, with its defaults filled in."""

    request: TextToImageRequest
    shape: CompiledShape
    num_inference_steps: int
    guidance_scale: float
    seed: int

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs. It doubles the UNet's batch."""
        return self.guidance_scale > 1

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
            width=self.shape.width,
            height=self.shape.height,
            seed=self.seed,
            prompt=self.request.prompt if with_prompt else None,
        )


def serves_guidance(settings: ServeSettings) -> bool:
    """Whether guidance is served. A checkpoint made to run without it needs no graph for it."""
    return settings.guidance_scale > 1


def plan_request(
    request: TextToImageRequest,
    settings: ServeSettings,
    warm_shapes: Sequence[CompiledShape],
    trained_shapes: Sequence[CompiledShape],
) -> PlannedRequest:
    """Fill in what a request left open.

    Args:
        warm_shapes: the shapes that are warm; the first is the default size.
        trained_shapes: the sizes that the model was trained for. With `SDXL_SERVE_COLD_SHAPES` the
            largest shape of both bounds the image's size.

    Raises:
        InvalidRequest: the size or the guidance is not served here.
    """
    return PlannedRequest(
        request,
        _choose_shape(request, settings, warm_shapes, trained_shapes),
        request.num_inference_steps or settings.steps,
        _choose_guidance_scale(request, settings),
        secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
    )


def can_share_a_run(requests: Sequence[PlannedRequest]) -> bool:
    """Whether the requests have one shape, one number of steps and one guidance scale."""
    return len({(r.shape, r.num_inference_steps, r.guidance_scale) for r in requests}) == 1


def _choose_shape(
    request: TextToImageRequest,
    settings: ServeSettings,
    warm_shapes: Sequence[CompiledShape],
    trained_shapes: Sequence[CompiledShape],
) -> CompiledShape:
    default = warm_shapes[0]
    width = default.width if request.width is None else request.width
    height = default.height if request.height is None else request.height
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
