"""The self-hosted server: an ASGI app around a runtime, and the process that runs it."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from ipaddress import ip_address
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from serve.engine.runtime import Runtime, build_runtime
from serve.errors import ConfigurationError, ModelError
from serve.http.endpoints import install, metrics_endpoint, text_to_image
from serve.http.server_sent_events import text_to_image_stream
from serve.schema import TextToImageRequest, TextToImageResponse
from serve.settings import ServeSettings
from serve.telemetry.profiling import MAX_PROFILES

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""How much longer than the deadline a running request may take after SIGTERM before it is cut off:
a deadline that passes midway still has to be answered."""

FLUSH_SECONDS = 3.0
"""How long the last spans may take to leave. The process is to be gone 4.5 s after SIGTERM at rest,
half a second before a platform that gives it 5 would kill it; noticing the signal, closing and the
interpreter's own end take the rest, and take longest on a busy machine."""


def create_app(runtime: Runtime, on_failed_start: Callable[[], None] = lambda: None) -> FastAPI:
    """The self-hosted endpoints. The runtime is started and closed by the app's lifespan.

    Args:
        on_failed_start: called when the model could not be started and nothing can be served.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        # In the background, so that /health and /ready answer while the model loads.
        starting = asyncio.create_task(_start(runtime, on_failed_start))
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.to_thread(runtime.close, FLUSH_SECONDS)

    app = FastAPI(title="stepspan", lifespan=lifespan, docs_url=None, redoc_url=None)
    install(app, lambda: runtime)

    @app.post("/", response_model=TextToImageResponse)
    async def generate(request: TextToImageRequest) -> Response:
        """Text to image."""
        return await text_to_image(runtime, request)

    @app.post("/stream")
    async def stream(request: TextToImageRequest) -> Response:
        """The same as server-sent events: `queued`, `step`, `image` or `error`."""
        return await text_to_image_stream(runtime, request)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Prometheus text, or OpenMetrics with exemplars when asked for."""
        return await metrics_endpoint(request, runtime)

    if runtime.profiling.enabled:
        # Where no profile can be asked for there is no such path, and nothing to find out.
        @app.post("/debug/profile")
        async def profile(request: Request) -> Response:
            """Arm the next requests; 0 calls it off."""
            return await arm_profiling(runtime, request)

    return app


MAX_ORDER_BYTES = 1024


class ProfileOrder(BaseModel):
    """How many of the next requests to profile."""

    model_config = ConfigDict(extra="forbid", strict=True)

    requests: int = Field(ge=0, le=MAX_PROFILES)


async def arm_profiling(runtime: Runtime, request: Request) -> Response:
    """The body of `POST /debug/profile`: for this machine, or whoever holds the admin token.

    Nothing of a request is read before it is clear who asks, and then no more than an order is.
    """
    if not is_operator(request, runtime.settings.admin_token):
        return JSONResponse(
            {"detail": "Profiling is for this machine itself, or with SDXL_ADMIN_TOKEN as bearer."},
            status_code=403,
        )
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_ORDER_BYTES:
            return JSONResponse({"detail": "The body is larger than an order is."}, status_code=413)
    try:
        order = ProfileOrder.model_validate_json(body)
    except ValidationError:
        return JSONResponse(
            {"detail": f'{{"requests": N}} is asked for, a number from 0 to {MAX_PROFILES}.'},
            status_code=422,
        )
    runtime.profiling.arm(order.requests)
    logger.info("the next %d requests will be profiled", order.requests)
    return JSONResponse(
        {"armed": runtime.profiling.armed, "profiles": runtime.profiling.profiles()}
    )


def is_operator(request: Request, token: SecretStr | None) -> bool:
    """Whether a request comes from this machine itself or bears the admin token.

    A proxy on this machine and a page in a browser on it do not count: the one says for whom it
    asks, the other where it is from.
    """
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if token is not None and scheme.lower() == "bearer":
        expected = token.get_secret_value().encode()
        return hmac.compare_digest(given.strip().encode(), expected)
    if any(name in request.headers for name in _ON_BEHALF):
        return False
    try:
        return request.client is not None and ip_address(request.client.host).is_loopback
    except ValueError:
        return False


_ON_BEHALF = ("forwarded", "x-forwarded-for", "x-real-ip", "via", "origin", "sec-fetch-site")


async def _start(runtime: Runtime, on_failure: Callable[[], None]) -> None:
    try:
        await runtime.start(on_progress=lambda phase: logger.info("start-up: %s", phase))
    except ModelError as error:
        logger.error("%s", error)
        on_failure()
    except Exception:
        # A compiler, a driver, a full disk: whatever it is, the log must have it.
        logger.exception("the model could not be started")
        on_failure()


class _Server(uvicorn.Server):
    """uvicorn, told to drain before it waits for what is running."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the inherited one: that raises the signal again once everything is closed, and a
        # clean end would look like a crash to whatever runs this process.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._runtime.begin_drain)
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    def stop(self) -> None:
        """End as after a signal."""
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigurationError` when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: asyncio turns Nagle's algorithm off only where it is, and with it on
    # an answer on a kept connection waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {error}. Choose another with --host or --port; "
            "port 0 takes a free one."
        ) from None
    return listener


def run(settings: ServeSettings, host: str, port: int) -> int:
    """Serve until SIGTERM or SIGINT. Returns the process's exit status."""
    missing = [name for name in ("torch", "diffusers", "transformers") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"{', '.join(missing)} not installed: `pip install 'stepspan[model]'` installs what "
            "draws images."
        )
    listener = bind(host, port)
    runtime = build_runtime(settings)
    app = create_app(runtime, on_failed_start=lambda: server.stop())
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.deadline_seconds + GRACE_SECONDS),
        # Server and version in every answer help nobody but a scanner.
        server_header=False,
    )
    server = _Server(config, runtime)
    address, bound_port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address

    async def serve() -> None:
        announcing = asyncio.create_task(_announce(runtime, f"http://{shown}:{bound_port}"))
        try:
            await server.serve(sockets=[listener])
        finally:
            announcing.cancel()

    asyncio.run(serve())
    status = 1 if runtime.failed else 0
    if runtime.work_left_behind:
        # To finalise the interpreter under a thread in native code would abort the process.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    return status


async def _announce(runtime: Runtime, address: str) -> None:
    await runtime.ready.wait()
    readiness = runtime.readiness
    shapes = ", ".join(str(shape) for shape in readiness.shapes)
    _say(
        f"\nstepspan is ready at {address}\n"
        f"  model {readiness.model} on {readiness.device}, shapes {shapes}\n\n"
        "Try it:\n"
        f"  curl -s {address} -H 'content-type: application/json' \\\n"
        """    -d '{"prompt": "a red circle on a white background", "seed": 1}'\n"""
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
