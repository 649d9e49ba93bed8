"""`python -m bench.service.paced_server STEP_MS UPLOAD_SECONDS`: the self-hosted server, as on a
device that is always as fast, and whose uploads take so many seconds.

Its model is drawn on the CPU, and then waits until the step has taken its time. So a step takes as
long on a busy machine as on an idle one, and leaves it time for the requests, as a GPU does. What
is measured is what the server makes of its device.

The self-hosted server uploads nothing: its answers hold the images. On fal images are uploaded to a
CDN. This server waits as such an upload does, and then answers with the images.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from bench.service.processes import serve_here

if TYPE_CHECKING:
    from serve.engine.images import Upload
    from serve.engine.runtime import Runtime
    from serve.engine.startup import Prepare
    from serve.schema import ImageFormat
    from serve.settings import ServeSettings


def slow_storage(seconds: float) -> Upload:
    """An upload that takes so many seconds."""
    from serve.engine.images import data_uri

    def store(data: bytes, image_format: ImageFormat) -> str:
        time.sleep(seconds)
        return data_uri(data, image_format)

    return store


def paced(step_seconds: float) -> Prepare:
    """Let every call of the UNet take so many seconds, or as long as it does where that is more."""

    def prepare(model: Any) -> None:
        began = 0.0

        def begin(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def end(*_: Any) -> None:
            time.sleep(max(began + step_seconds - time.perf_counter(), 0))

        model.pipeline.unet.register_forward_pre_hook(begin)
        model.pipeline.unet.register_forward_hook(end)

    return prepare


def main() -> int:
    from serve.engine.build import build_runtime

    step_ms, upload_seconds = map(float, sys.argv[1:])

    def build(settings: ServeSettings) -> Runtime:
        return build_runtime(
            settings,
            upload=slow_storage(upload_seconds),
            prepare=paced(step_ms / 1000),
            own_process=True,
        )

    return serve_here(build)


if __name__ == "__main__":
    sys.exit(main())
