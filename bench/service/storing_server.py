"""`python -m bench.service.storing_server SECONDS`: the self-hosted server, whose uploads take so
many seconds.

The self-hosted server uploads nothing: its answers hold the images. On fal images are uploaded to a
CDN. This server waits as such an upload does, and then answers with the images.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from bench.service.processes import serve_here

if TYPE_CHECKING:
    from serve.engine.images import Upload
    from serve.engine.runtime import Runtime
    from serve.schema import ImageFormat
    from serve.settings import ServeSettings


def slow_storage(seconds: float) -> Upload:
    """An upload that takes so many seconds."""
    from serve.engine.images import data_uri

    def store(data: bytes, image_format: ImageFormat) -> str:
        time.sleep(seconds)
        return data_uri(data, image_format)

    return store


def main() -> int:
    from serve.engine.build import build_runtime

    upload = slow_storage(float(sys.argv[1]))

    def build_storing(settings: ServeSettings, own_process: bool) -> Runtime:
        return build_runtime(settings, upload=upload, own_process=own_process)

    return serve_here(build_storing)


if __name__ == "__main__":
    sys.exit(main())
