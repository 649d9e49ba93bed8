"""`python -m bench.peers.documented_server`: fal's documented example as a local server.

The endpoint does the same as the example, in the same order: one diffusers call with a prompt and a
number of steps, then an image as PNG. It differs where it must: the model and the device are chosen
(the example uses SDXL base in fp16 on CUDA; `demo` runs in float32 on a CPU), images stay in memory
instead of going to fal's CDN, and FastAPI on loopback replaces fal's server. Requests do not
overlap on the model, as on fal, where a runner of the example takes one request at a time.
"""

from __future__ import annotations

import asyncio
import threading

import uvicorn
from fastapi import FastAPI

from bench.peers.drawing import Drawing, PeerSettings, Pipeline, answer


def create_app(settings: PeerSettings) -> FastAPI:
    """The example as an app, warmed up."""
    from serve.model.loading import choose_device

    dtype = settings.dtype
    if dtype == "auto" and choose_device("auto").type == "cuda":
        dtype = "float16"  # as documented
    pipeline = Pipeline(settings, dtype)
    pipeline.draw([Drawing(prompt="warmup")])
    app = FastAPI()
    one_at_a_time = threading.Lock()

    @app.post("/")
    def generate(request: Drawing) -> dict[str, object]:
        with one_at_a_time:
            (image,) = pipeline.draw([request])
            # Within the lock: the example's endpoint encodes before its runner's next request.
            return answer(image)

    return app


def main() -> None:
    from serve.server import bind

    listener = bind("127.0.0.1", 0)
    listener.listen()  # from now on connections wait, whether or not uvicorn serves yet
    app = create_app(PeerSettings.from_environment())
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    print(f"ready at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    main()
