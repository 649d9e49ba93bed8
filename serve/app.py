"""The image app on fal: the runtime and the endpoints of the self-hosted server, under fal.

This module connects fal's lifecycle to the runtime's. Host options (machine, requirements, scaling,
grace periods) are in `[tool.fal.apps.sdxl]` of pyproject.toml: with an entry point fal never reads
them from the class. docs/fal.md lists how fal differs from the self-hosted server.

Only fal and the schema are imported at the top, because `fal deploy` and `fal run` import this
module on the caller's machine.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import fal

from serve.schema import ImageToImageRequest, TextToImageRequest, TextToImageResponse

if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client import CollectorRegistry

    from serve.engine.images import Upload
    from serve.engine.runtime import Runtime
    from serve.schema import ImageFormat
    from serve.settings import ServeSettings

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 5.0
"""Time limit for an image's upload; after it the image goes inline. A megabyte takes a fraction of
a second. fal's own client would retry for minutes."""

UPLOADS_AT_ONCE = 8
"""How many uploads may run at once. Two are usual: one ends while the next begins."""

IMAGE_APP_ENDPOINTS = ("/", "/stream", "/image-to-image", "/image-to-image/stream")
"""What generates."""

KEPT = Path("/data/.cache")
"""The account's persistent disk, which `data_mounts` in pyproject.toml mounts. Compiled kernels are
kept there unless `SDXL_CACHE_DIR` is set."""


class SdxlApp(fal.App):  # type: ignore[misc] # fal's types are not followed
    """Text to image with SDXL."""

    _installed = False
    _runtime: Runtime | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _starting: asyncio.Task[None] | None = None

    async def setup(self) -> None:
        """Start the runtime. Returns when the model is warm, because fal then opens the port.

        The runtime loads the model on a thread of its own, so the metrics port, which shares this
        event loop, responds meanwhile.
        """
        from serve.settings import load_settings

        require_our_handlers(self._installed)
        settings = load_settings()
        refuse_api_keys(settings)

        from prometheus_client import CollectorRegistry

        from serve.engine.build import build_runtime
        from serve.engine.call import current_call
        from serve.telemetry.logs import configure_logging

        if settings.cache_dir is None and KEPT.is_dir():
            settings = settings.model_copy(update={"cache_dir": KEPT / "stepspan"})
        configure_logging(settings.log_format, current_call.get)
        registry = CollectorRegistry()
        runtime = build_runtime(settings, registry, build_upload(), own_process=True)
        show_on_metrics_port(registry)
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.create_task(
            runtime.start(on_progress=lambda phase: logger.info("start-up: %s", phase))
        )
        await asyncio.wait({self._starting})
        if self._starting.cancelled():
            return  # SIGTERM during the warm-up: fal handles it next, and calls teardown
        if self._starting.exception() is not None:
            # fal calls no teardown after a failed setup, and the start's trace must be exported.
            await self.teardown()
        self._starting.result()

    @fal.endpoint("/")  # type: ignore[untyped-decorator]
    async def generate(self, request: TextToImageRequest) -> TextToImageResponse:
        """Text to image."""
        from serve.http.endpoints import text_to_image

        # fal publishes the annotation as the schema. The response is already serialised.
        return await text_to_image(self._started(), request)  # type: ignore[return-value]

    @fal.endpoint("/stream")  # type: ignore[untyped-decorator]
    async def stream(self, request: TextToImageRequest) -> TextToImageResponse:
        """Text to image as server-sent events: `queued`, `step`, `image` or `error`."""
        from serve.http.server_sent_events import text_to_image_stream

        return await text_to_image_stream(self._started(), request)  # type: ignore[return-value]

    @fal.endpoint("/image-to-image")  # type: ignore[untyped-decorator]
    async def image_to_image(self, request: ImageToImageRequest) -> TextToImageResponse:
        """Image to image."""
        from serve.http.endpoints import text_to_image

        return await text_to_image(self._started(), request)  # type: ignore[return-value]

    @fal.endpoint("/image-to-image/stream")  # type: ignore[untyped-decorator]
    async def image_to_image_stream(self, request: ImageToImageRequest) -> TextToImageResponse:
        """Image to image as server-sent events: `queued`, `step`, `image` or `error`."""
        from serve.http.server_sent_events import text_to_image_stream

        return await text_to_image_stream(self._started(), request)  # type: ignore[return-value]

    def handle_exit(self) -> None:
        """Begin to drain on SIGTERM. fal calls this from the signal handler, between two steps of
        the event loop, so the loop does the work."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_exit)

    async def teardown(self) -> None:
        """Export the remaining spans after the last response, within `FLUSH_SECONDS`."""
        from serve.server import FLUSH_SECONDS

        if self._runtime is not None:
            await asyncio.to_thread(self._runtime.close, FLUSH_SECONDS)

    def _add_extra_routes(self, app: FastAPI) -> None:
        """Replace fal's handlers and routes by ours.

        fal calls this last while it builds the app. The hook is private, the only private one used
        here. fal's own version is not called: it only adds a `/health`, which would win over ours.
        """
        from serve.http.endpoints import install

        remove_fals_handlers(app)
        install(app, lambda: self._runtime, IMAGE_APP_ENDPOINTS)
        self._installed = True

    def _begin_exit(self) -> None:
        assert self._runtime is not None
        assert self._starting is not None
        self._runtime.begin_drain()
        self._starting.cancel()

    def _started(self) -> Runtime:
        assert self._runtime is not None  # fal opens the port after setup
        return self._runtime


def remove_fals_handlers(app: FastAPI) -> None:
    """Remove fal's middleware and exception handlers that ours replace."""
    from fastapi.middleware.cors import CORSMiddleware

    # fal allows every web page to read responses. That is a proxy's decision.
    cors: object = CORSMiddleware
    app.user_middleware[:] = [added for added in app.user_middleware if added.cls is not cors]
    # It would answer an unknown path, and echo it.
    app.exception_handlers.pop(404, None)


def require_our_handlers(installed: bool) -> None:
    """Check that fal has called the hook that installs our handlers.

    Raises:
        RuntimeError: it has not.
    """
    if not installed:
        raise RuntimeError(
            "this version of fal no longer calls _add_extra_routes, so requests would meet "
            "fal's error handlers instead of ours; see tests/serve/test_app.py"
        )


def refuse_api_keys(settings: ServeSettings) -> None:
    """Refuse keys of our own beside fal's: a request has one `Authorization` header, and fal's
    gateway reads it.

    Raises:
        ConfigurationError: there are keys.
    """
    from serve.errors import ConfigurationError

    if settings.api_keys:
        raise ConfigurationError(
            "SDXL_API_KEYS and SDXL_API_KEYS_FILE are for the self-hosted server: fal checks the "
            "callers of an app by itself, by `auth` in pyproject.toml."
        )


def build_upload() -> Upload:
    """Upload to fal's CDN if there is a key for it, as on every runner; else put images inline."""
    from fal.auth import key_credentials

    from serve.engine.images import bounded, data_uri

    if key_credentials() is None:
        logger.info("there is no FAL_KEY, so images are returned inline")
        return data_uri
    return bounded(upload_to_cdn, UPLOAD_SECONDS, UPLOADS_AT_ONCE)


def upload_to_cdn(data: bytes, image_format: ImageFormat) -> str:
    """Put an image on fal's CDN and return its URL. Raises fal's errors."""
    from fal.toolkit import Image

    # Without fal's fallback, which is inline too: the runtime has its own and counts it.
    image = Image.from_bytes(data, image_format, repository="fal_v3", fallback_repository=None)
    return str(image.url)


_on_metrics_port: CollectorRegistry | None = None


def show_on_metrics_port(registry: CollectorRegistry) -> None:
    """Serve `registry` on fal's metrics port, which renders the process-wide registry.

    It is registered there as a collector. A second app in one process replaces the first one's;
    registering its metrics one by one would fail on their names.
    """
    from prometheus_client import REGISTRY

    global _on_metrics_port
    if _on_metrics_port is not None:
        REGISTRY.unregister(_on_metrics_port)
    REGISTRY.register(registry)
    _on_metrics_port = registry
