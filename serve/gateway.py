"""`PromptGateway`: a second fal app, before the first. It needs no GPU and no model library.

Nothing is decided here; `relay.py` holds what it does with a request. Host options are in
`[tool.fal.apps.gateway]` of pyproject.toml.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import fal

from serve.app import replace_fals_handlers, require_our_handlers, show_on_metrics_port
from serve.schema import PromptRequest, TextToImageResponse

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve.http.gateway_client import Relay


class PromptGateway(fal.App):  # type: ignore[misc] # fal's types are not followed
    """Tidies prompts and has them drawn by the image app, as one trace."""

    _installed = False
    _relay: Relay | None = None
    _loop: asyncio.AbstractEventLoop | None = None

    async def setup(self) -> None:
        """Read the settings; there is nothing to warm."""
        from fal.auth import key_credentials
        from fal.flags import FAL_RUN_HOST
        from prometheus_client import CollectorRegistry

        from serve.http.gateway_client import Relay, Target
        from serve.settings import load_settings
        from serve.telemetry.logs import configure_logging

        require_our_handlers(self._installed)
        settings = load_settings()
        configure_logging(settings.log_format)
        target = Target.named_by(settings.gateway_target, key_credentials(), FAL_RUN_HOST)
        registry = CollectorRegistry()
        self._relay = Relay(settings, target, registry)
        self._loop = asyncio.get_running_loop()
        show_on_metrics_port(registry)

    @fal.endpoint("/")  # type: ignore[untyped-decorator]
    async def generate(self, request: PromptRequest) -> TextToImageResponse:
        """Text to image, the text made tidy first."""
        assert self._relay is not None  # fal opens the port after setup
        # The annotation is the schema that fal publishes; the body is serialised already.
        return await self._relay.relay(request)  # type: ignore[return-value]

    def handle_exit(self) -> None:
        """SIGTERM. Called from the signal's handler, between any two steps of the event loop."""
        if self._loop is not None and self._relay is not None:
            self._loop.call_soon_threadsafe(self._relay.begin_drain)

    async def teardown(self) -> None:
        """The last request has been answered: export what is left, within its budget."""
        from serve.server import FLUSH_SECONDS

        if self._relay is not None:
            await self._relay.close(FLUSH_SECONDS)

    def _add_extra_routes(self, app: FastAPI) -> None:
        """fal's last word on an app's handlers and routes, as in `SdxlApp`."""
        replace_fals_handlers(app, lambda: self._relay)
        self._installed = True
