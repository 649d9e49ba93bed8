"""`python -m bench.service.reference_server MODEL`: fal's documented example as a local server.

The endpoint does the same as the example, in the same order: one diffusers call with a prompt and a
number of steps, then an image as PNG. It differs where it must: the model and the device are chosen
(the example uses SDXL base in fp16 on CUDA; `demo` runs in float32 on a CPU), images stay in memory
instead of going to fal's CDN, and FastAPI on loopback replaces fal's server. Requests do not
overlap on the model, as on fal, where a runner of the example takes one request at a time.
"""

from __future__ import annotations

import asyncio
import sys
import threading

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field


class Input(BaseModel):
    """The example's input, and the seed that the bench sends to every server."""

    prompt: str = Field(description="The prompt to generate an image from")
    num_inference_steps: int = Field(default=20)
    seed: int | None = None


def create_app(model: str) -> FastAPI:
    """The example as an app, warmed up."""
    import torch

    from bench.harness.drive import png_data_uri
    from bench.harness.work import choose_work
    from serve.model.sdxl import load_model

    work = choose_work(model, "auto", None, 2)
    dtype = "float16" if work.on_cuda else "float32"
    pipeline = load_model(work.model, None, work.device, dtype).pipeline
    if pipeline.vae.dtype != getattr(torch, dtype):
        pipeline.vae.to(getattr(torch, dtype))
    pipeline("warmup")
    app = FastAPI()
    one_at_a_time = threading.Lock()

    @app.post("/")
    def generate(request: Input) -> dict[str, object]:
        generator = None
        if request.seed is not None:
            generator = torch.Generator("cpu").manual_seed(request.seed)
        with one_at_a_time:
            result = pipeline(
                request.prompt, num_inference_steps=request.num_inference_steps, generator=generator
            )
            # Within the lock: the example's endpoint encodes before its runner's next request.
            image = result.images[0]
            url = png_data_uri(image)
        return {"image": {"url": url, "width": image.width, "height": image.height}}

    return app


def main(arguments: list[str]) -> None:
    from serve.server import bind

    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(arguments[0]), log_level="error"))
    print(f"ready at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    main(sys.argv[1:])
