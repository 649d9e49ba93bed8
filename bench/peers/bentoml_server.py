"""The checkpoint as a BentoML service: `bentoml serve bench.peers.bentoml_server:TextToImage`.

As BentoML's documentation shows it: a service with one worker that loads a diffusers pipeline
(https://docs.bentoml.com/en/latest/examples/sdxl-turbo.html). Its endpoint takes a list, is batched
by adaptive batching, and has a pydantic model for what one request consists of
(https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html). The second page puts a
wrapper service before it, for clients that do not send a list. It is left out, because it is one
more process that every request passes through: the bench's client sends a list of one.

`max_latency_ms` is not a waiting time in BentoML 1.4: its dispatcher waits as long as its own
estimate says, and answers 503 to a request that cannot be done within this time.
"""

from __future__ import annotations

from typing import Any

import bentoml

from bench.peers.drawing import Drawing, PeerSettings, Pipeline, answer

SETTINGS = PeerSettings.from_environment()


@bentoml.service(workers=1, traffic={"timeout": SETTINGS.longest_wait_seconds})
class TextToImage:
    """Text to image, in batches."""

    def __init__(self) -> None:
        self.pipeline = Pipeline(SETTINGS, SETTINGS.dtype)

    @bentoml.api(  # type: ignore[untyped-decorator]
        batchable=True,
        max_batch_size=SETTINGS.max_batch,
        max_latency_ms=1000 * SETTINGS.longest_wait_seconds,
    )
    def generate(self, requests: list[Drawing]) -> list[dict[str, Any]]:
        return [answer(image) for image in self.pipeline.draw(requests)]
