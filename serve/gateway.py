"""`PromptGateway`: a second fal app, which calls the first. It needs no GPU and no model library.

This module connects fal's lifecycle to `serve.http.gateway.client.GatewayClient`, which serves the
requests. Host options are in `[tool.fal.apps.gateway]` of pyproject.toml.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import fal

from serve.app import (
    refuse_api_keys,
    remove_fals_handlers,
    require_our_handlers,
    show_on_metrics_port,
)
from serve.schema import PromptRequest, TextToImageResponse

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve.http.gateway.client import GatewayClient


class PromptGateway(fal.App):  # type: ignore[misc] # fal's types are not followed
    """Tidies prompts and calls the image app with them. Both apps' spans are one trace."""

    _installed = False
    _client: GatewayClient | None = None
    _loop: asyncio.AbstractEventLoop | None = None

    async def setup(self) -> None:
        """Read the settings. There is nothing to warm up."""
        from serve.settings import load_settings

        require_our_handlers(self._installed)
        settings = load_settings()
        refuse_api_keys(settings)

        from fal.auth import key_credentials
        from fal.flags import FAL_RUN_HOST
        from prometheus_client import CollectorRegistry

        from serve.engine.call import current_call
        from serve.http.gateway.client import GatewayClient, ImageAppAddress
        from serve.telemetry.logs import configure_logging

        configure_logging(settings.log_format, current_call.get)
        image_app = ImageAppAddress.named_by(
            settings.gateway_target, key_credentials(), FAL_RUN_HOST
        )
        registry = CollectorRegistry()
        self._client = GatewayClient(settings, image_app, registry)
        self._loop = asyncio.get_running_loop()
        show_on_metrics_port(registry)

    @fal.endpoint("/")  # type: ignore[untyped-decorator]
    async def generate(self, request: PromptRequest) -> TextToImageResponse:
        """Text to image; the prompt is tidied first."""
        assert self._client is not None  # fal opens the port after setup
        # fal publishes the annotation as the schema. The response is already serialised.
        return await self._client.generate(request)  # type: ignore[return-value]

    def handle_exit(self) -> None:
        """Begin to drain on SIGTERM. fal calls this from the signal handler, between two steps of
        the event loop, so the loop does the work."""
        if self._loop is not None and self._client is not None:
            self._loop.call_soon_threadsafe(self._client.begin_drain)

    async def teardown(self) -> None:
        """Export the remaining spans after the last response, within `FLUSH_SECONDS`."""
        from serve.server import FLUSH_SECONDS

        if self._client is not None:
            await self._client.close(FLUSH_SECONDS)

    def _add_extra_routes(self, app: FastAPI) -> None:
        """Replace fal's handlers and routes by ours, as `SdxlApp` does."""
        from serve.http.endpoints import install
        from serve.http.gateway.image_app_errors import ANSWERED_ERRORS
        from serve.http.request_body import MAX_GATEWAY_BODY_BYTES

        remove_fals_handlers(app)
        install(
            app,
            lambda: self._client,
            ("/",),
            ANSWERED_ERRORS,
            max_body_bytes=MAX_GATEWAY_BODY_BYTES,
        )
        self._installed = True
