"""`python -m bench.peers.litserve_server PORT`: the checkpoint as a LitServe API.

As LitServe's documentation shows it: a `LitAPI` that loads a diffusers pipeline in `setup`, with
`max_batch_size` and `batch_timeout` (https://lightning.ai/docs/litserve/features/batching,
https://lightning.ai/docs/litserve/api-reference/litapi).
"""

# Without `from __future__ import annotations`: LitServe reads the type of a request from
# `decode_request`, and takes it as it stands.
import signal
import sys
from typing import Any

import litserve

from bench.peers.drawing import Drawing, PeerSettings, Pipeline, answer

BATCH_TIMEOUT = 0.05
"""Seconds a batch waits to fill: time for four clients that have just been answered to ask again,
and less than a tenth of the demo model's request."""


class TextToImage(litserve.LitAPI):  # type: ignore[misc]
    """Text to image, in batches."""

    def setup(self, device: str) -> None:
        settings = PeerSettings.from_environment()
        self.pipeline = Pipeline(settings, settings.dtype)

    def decode_request(self, request: Drawing) -> Drawing:
        return request

    def batch(self, inputs: list[Drawing]) -> list[Drawing]:
        return inputs

    def predict(self, batch: list[Drawing]) -> list[Any]:
        return self.pipeline.draw(batch)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return answer(output)


def main(port: int) -> None:
    # LitServe ends its processes on Ctrl-C, and leaves them behind on SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = PeerSettings.from_environment()
    api = TextToImage(max_batch_size=settings.max_batch, batch_timeout=BATCH_TIMEOUT)
    server = litserve.LitServer(
        api, workers_per_device=1, devices=1, timeout=settings.longest_wait_seconds
    )
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False)


if __name__ == "__main__":
    main(int(sys.argv[1]))
