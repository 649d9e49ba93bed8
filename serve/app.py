"""The service as a fal app: the self-hosted server's runtime, handlers and error table, under fal.

Nothing is decided here; this module says where fal's lifecycle meets the runtime's. Host options
(machine, requirements, scaling, grace) are in `[tool.fal.apps.sdxl]` of pyproject.toml: with an
entry point fal never reads them from the class. What fal's runtime does differently is listed, and
asserted, in docs/fal.md.

Only fal and the schema are imported at the top: `fal deploy` and `fal run` import this module on
the caller's machine, before anything else happens.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import fal

from serve.schema import TextToImageRequest, TextToImageResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI
    from prometheus_client import CollectorRegistry

    from serve.engine.images import Upload
    from serve.engine.runtime import Runtime
    from serve.http.service import Service
    from serve.schema import ImageFormat

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 5.0
"""How long an image's upload may take before it is answered inline. A megabyte takes a fraction of
a second; fal's own client would try for minutes."""

UPLOADS_AT_ONCE = 8
"""How many uploads may be under way. Two are ordinary: one ends while the next begins."""

KEPT = Path("/data/.cache")
"""The account's own disk, which outlives a runner: mounted by `data_mounts` in pyproject.toml. What
was compiled is kept there unless `SDXL_CACHE_DIR` says elsewhere."""


class SdxlApp(fal.App):  # type: ignore[misc] # fal's types are not followed
    """Text to image with SDXL."""

    _installed = False
    _runtime: Runtime | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _starting: asyncio.Task[None] | None = None

    async def setup(self) -> None:
        """Start the runtime; fal opens the port when this returns, so it returns when warm.

        The work is done on the runtime's own thread: the metrics port, which shares this event
        loop, answers all the while.
        """
        from prometheus_client import CollectorRegistry

        from serve.engine.call import current_call
        from serve.engine.runtime import build_runtime
        from serve.settings import load_settings
        from serve.telemetry.logs import configure_logging

        require_our_handlers(self._installed)
        settings = load_settings()
        if settings.cache_dir is None and KEPT.is_dir():
            settings = settings.model_copy(update={"cache_dir": KEPT / "stepspan"})
        configure_logging(settings.log_format, current_call.get)
        registry = CollectorRegistry()
        runtime = build_runtime(settings, registry, build_upload())
        show_on_metrics_port(registry)
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.create_task(
            runtime.start(on_progress=lambda phase: logger.info("start-up: %s", phase))
        )
        await asyncio.wait({self._starting})
        if self._starting.cancelled():
            return  # told to go while warming: fal sees that next, and calls teardown
        if self._starting.exception() is not None:
            # fal calls no teardown after a failed setup; the start's trace must still leave.
            await self.teardown()
        self._starting.result()

    @fal.endpoint("/")  # type: ignore[untyped-decorator]
    async def generate(self, request: TextToImageRequest) -> TextToImageResponse:
        """Text to image."""
        from serve.http.endpoints import text_to_image

        # The annotation is the schema that fal publishes; the body is serialised already.
        return await text_to_image(self._started(), request)  # type: ignore[return-value]

    @fal.endpoint("/stream")  # type: ignore[untyped-decorator]
    async def stream(self, request: TextToImageRequest) -> TextToImageResponse:
        """The same as server-sent events: `queued`, `step`, `image` or `error`."""
        from serve.http.server_sent_events import text_to_image_stream

        return await text_to_image_stream(self._started(), request)  # type: ignore[return-value]

    def handle_exit(self) -> None:
        """SIGTERM. Called from the signal's handler, between any two steps of the event loop."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_exit)

    async def teardown(self) -> None:
        """The last request has been answered: export what is left, within its budget."""
        from serve.server import FLUSH_SECONDS

        if self._runtime is not None:
            await asyncio.to_thread(self._runtime.close, FLUSH_SECONDS)

    def _add_extra_routes(self, app: FastAPI) -> None:
        """fal's last word on an app's handlers and routes, so that ours replace its own.

        This hook is private and the only thing here that is. fal's version is not called: all it
        adds is a `/health`, which would come before ours.
        """
        replace_fals_handlers(app, lambda: self._runtime)
        self._installed = True

    def _begin_exit(self) -> None:
        assert self._runtime is not None
        assert self._starting is not None
        self._runtime.begin_drain()
        self._starting.cancel()

    def _started(self) -> Runtime:
        assert self._runtime is not None  # fal opens the port after setup
        return self._runtime


def replace_fals_handlers(app: FastAPI, service: Callable[[], Service | None]) -> None:
    """Put our middleware, error table and GET endpoints in place of fal's."""
    from fastapi.middleware.cors import CORSMiddleware

    from serve.http.endpoints import install

    # fal would let any web page read answers; whoever wants that puts it in front.
    cors: object = CORSMiddleware
    app.user_middleware[:] = [added for added in app.user_middleware if added.cls is not cors]
    install(app, service)


def require_our_handlers(installed: bool) -> None:
    """Raises `RuntimeError` where fal did not call the hook that installs them."""
    if not installed:
        raise RuntimeError(
            "this version of fal no longer calls _add_extra_routes, so requests would meet "
            "fal's error handlers instead of ours; see tests/serve/test_app.py"
        )


def build_upload() -> Upload:
    """fal's CDN where there is a key for it, as on every runner; else the image goes inline."""
    from fal.auth import key_credentials

    from serve.engine.images import bounded, data_uri

    if key_credentials() is None:
        logger.info("no FAL_KEY: images are answered inline")
        return data_uri
    return bounded(upload_to_cdn, UPLOAD_SECONDS, UPLOADS_AT_ONCE)


def upload_to_cdn(data: bytes, image_format: ImageFormat) -> str:
    """Put an image on fal's CDN and return its address; raises when that fails."""
    from fal.toolkit import Image

    # No fallback of fal's: the runtime answers inline, as fal's `in_memory` would, and counts it.
    image = Image.from_bytes(data, image_format, repository="fal_v3", fallback_repository=None)
    return str(image.url)


_on_metrics_port: CollectorRegistry | None = None


def show_on_metrics_port(registry: CollectorRegistry) -> None:
    """Serve `registry` on fal's metrics port, which renders the process-wide one.

    A registry in a registry, so that a second app in one process replaces the first's metrics
    instead of failing on their names.
    """
    from prometheus_client import REGISTRY

    global _on_metrics_port
    if _on_metrics_port is not None:
        REGISTRY.unregister(_on_metrics_port)
    REGISTRY.register(registry)
    _on_metrics_port = registry
