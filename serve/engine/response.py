"""The JSON response of a request whose images are stored."""

from __future__ import annotations

from collections.abc import Sequence

from serve.engine.call import Call
from serve.engine.gpu_run import GeneratedPixels
from serve.engine.images import CONTENT_TYPES
from serve.engine.planning import PlannedRequest
from serve.schema import GeneratedImage, TextToImageResponse, Timings


def build_response(
    planned: PlannedRequest, call: Call, urls: Sequence[str], drawn: Sequence[GeneratedPixels]
) -> TextToImageResponse:
    """The response. `urls` has one for each image, in the order of their seeds."""
    images = [
        GeneratedImage(
            url=url,
            width=planned.shape.width,
            height=planned.shape.height,
            content_type=CONTENT_TYPES[planned.request.format],
            seed=planned.seed_of(image),
        )
        for image, url in enumerate(urls)
    ]
    return TextToImageResponse(
        image=images[0],
        images=images,
        seed=planned.seed,
        prompt=planned.request.prompt,
        timings=_timings(call),
        trace_id=call.identity.trace_id_hex,
        prompt_truncated=any(image.prompt_truncated for image in drawn),
        prompt_tokens=drawn[0].prompt_tokens,
        has_nsfw_concepts=[image.flagged is True for image in drawn] if planned.checked else None,
    )


def _timings(call: Call) -> Timings:
    def runs_ms(name: str) -> float | None:
        stages = [stage for run in call.runs if (stage := run.stage(name)) is not None]
        return sum(stage.duration_ns for stage in stages) / 1e6 if stages else None

    return Timings(
        receive_ms=call.timeline.stage_ms("receive"),
        image_decode_ms=call.timeline.stage_ms("image_decode"),
        queue_ms=call.timeline.stage_ms("queue"),
        lora_swap_ms=runs_ms("lora_swap"),
        text_encode_ms=runs_ms("text_encode"),
        vae_encode_ms=runs_ms("vae_encode"),
        denoise_ms=runs_ms("denoise"),
        steps_ms=[step.duration_ns / 1e6 for run in call.runs for step in run.steps],
        vae_decode_ms=runs_ms("vae_decode"),
        safety_check_ms=runs_ms("safety_check"),
        image_encode_ms=call.timeline.stage_ms("image_encode"),
        upload_ms=call.timeline.stage_ms("upload"),
        inference=sum(run.duration_ns for run in call.runs) / 1e9,
        clock=call.runs[-1].clock,
    )
