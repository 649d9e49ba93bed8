"""The self-hosted server: an ASGI app around a runtime, and the process that runs it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request, Response

from kernels_warmup.cache.working_directory import remove_process_directory
from serve.engine.build import build_runtime
from serve.engine.runtime import IMAGE_TO_IMAGE, IMAGE_TO_IMAGE_STREAM, Runtime
from serve.errors import ConfigurationError, ModelError
from serve.http.authentication import numeric_address
from serve.http.endpoints import install, metrics_endpoint, text_to_image
from serve.http.openai.images import install_openai
from serve.http.openapi import CONNECTION_ERRORS
from serve.http.playground.routes import install_playground
from serve.http.profiling_endpoint import arm_profiling
from serve.http.routes import add_get_route
from serve.http.server_sent_events import text_to_image_stream
from serve.http.sockets.connections import Connection, ConnectionLimits, Connections
from serve.http.sockets.early_answers import OVER_THE_LIMIT
from serve.http.sockets.listener import Listener, connection_limit
from serve.schema import ImageToImageRequest, TextToImageRequest, TextToImageResponse
from serve.settings import ServeSettings

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""How long past its deadline a running request may take after SIGTERM, so that the response about
a deadline that has passed is still sent."""

CUT_OFF_SECONDS = 1.0
"""How long a request that is cut off may take to answer so: two steps, usually."""

THREADS = "worker"
"""How the names of the threads of `asyncio.to_thread` begin."""

THREADS_SECONDS = 0.2
"""How long they may take to end, after all requests have."""

FLUSH_SECONDS = 3.0
"""Time limit for exporting the last spans. A process without running requests ends within 4.5 s of
SIGTERM, half a second before a platform that allows 5 would kill it. The rest of that time goes to
the signal, closing, and the interpreter's own end, which take longer on a busy machine."""


def create_app(
    runtime: Runtime,
    on_failed_start: Callable[[], None] = lambda: None,
    ready_first: bool = False,
) -> FastAPI:
    """The app of the self-hosted server. Its lifespan starts and closes the runtime.

    Args:
        on_failed_start: called when the model could not be started, so nothing can be served.
        ready_first: the lifespan's start-up ends when the model is ready, and not at once.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        # In the background, so that /health and /ready respond while the model loads.
        starting = asyncio.create_task(_start(runtime, on_failed_start))
        try:
            if ready_first:
                await starting
            yield
        finally:
            starting.cancel()
            await asyncio.to_thread(runtime.close, FLUSH_SECONDS)

    app = FastAPI(title="stepspan", lifespan=lifespan, docs_url=None, redoc_url=None)
    install(app, lambda: runtime, connection_errors=CONNECTION_ERRORS)

    @app.post("/", response_model=TextToImageResponse)
    async def generate(request: TextToImageRequest) -> Response:
        """Text to image."""
        return await text_to_image(runtime, request)

    @app.post("/stream")
    async def stream(request: TextToImageRequest) -> Response:
        """Text to image as server-sent events: `queued`, `step`, `image` or `error`."""
        return await text_to_image_stream(runtime, request)

    @app.post(IMAGE_TO_IMAGE, response_model=TextToImageResponse)
    async def image_to_image(request: ImageToImageRequest) -> Response:
        """Image to image."""
        return await text_to_image(runtime, request)

    @app.post(IMAGE_TO_IMAGE_STREAM)
    async def image_to_image_stream(request: ImageToImageRequest) -> Response:
        """Image to image as server-sent events: `queued`, `step`, `image` or `error`."""
        return await text_to_image_stream(runtime, request)

    install_openai(app, runtime)

    rendering = asyncio.Lock()

    async def metrics(request: Request) -> Response:
        """Prometheus text, or OpenMetrics with exemplars if the Accept header names it."""
        return await metrics_endpoint(request, runtime, rendering)

    add_get_route(app, "/metrics", metrics)

    install_playground(app, runtime)

    if runtime.profiling.enabled:
        # Without a folder for profiles the path does not exist.
        @app.post("/debug/profile")
        async def profile(request: Request) -> Response:
            """Profile the next requests; 0 cancels."""
            return await arm_profiling(runtime, request)

    return app


async def _start(runtime: Runtime, on_failure: Callable[[], None]) -> None:
    try:
        await runtime.start(on_progress=lambda phase: logger.info("start-up: %s", phase))
    except ModelError as error:
        logger.error("%s", error)
        on_failure()
    except Exception:
        # A compiler, a driver or a full disk can raise anything; the log must have it.
        logger.exception("the model could not be started")
        on_failure()


class _Server(uvicorn.Server):
    """uvicorn with our own listener, and with an end that no client can delay.

    A signal first drains the runtime. Then running requests are waited for, up to the grace period
    or to a second SIGINT. What still runs is cut off: it fails as `draining`.
    """

    def __init__(
        self, config: uvicorn.Config, runtime: Runtime, listening: socket.socket, limit: int
    ) -> None:
        super().__init__(config)
        settings = runtime.settings
        self._runtime = runtime
        self._listening = listening
        self._limit = limit
        self._grace_seconds = settings.deadline_seconds + GRACE_SECONDS
        self._connections = Connections(
            ConnectionLimits(
                settings.header_seconds, settings.keep_alive_seconds, settings.send_seconds
            ),
            runtime,
        )
        self._listener: Listener | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # The inherited method raises the signal again after everything is closed, and a clean end
        # would look like a crash to the process's supervisor.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._runtime.begin_drain)
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    def stop(self) -> None:
        """Shut down as after a signal."""
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            before = signal.getsignal(signal.SIGHUP)
            if before is signal.SIG_IGN:  # started by nohup, to outlive its terminal
                yield
                return
            signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])

        def new_connection(over_the_limit: bool) -> Connection:
            state = dict(self.lifespan.state)
            if over_the_limit:
                state[OVER_THE_LIMIT] = True
            return Connection(self.config, self.server_state, state, self._connections)

        self._listener = Listener(self._listening, self._connections, self._limit, new_connection)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        assert self._listener is not None  # called after `startup`
        self._listener.close()
        self._runtime.begin_drain()
        self._connections.shut_down()
        await self._all_ended(self._grace_seconds, or_forced=True)
        if self.server_state.tasks:
            self._runtime.cut_off()
            await self._all_ended(CUT_OFF_SECONDS)
        if self.server_state.tasks:
            for task in self.server_state.tasks:
                task.cancel()
            await asyncio.wait(self.server_state.tasks, timeout=0.2)
        for connection in list(self._connections.open):
            connection.abort()
        await self.lifespan.shutdown()

    async def _all_ended(self, seconds: float, or_forced: bool = False) -> None:
        """Wait until every request is answered and every answer taken, for at most `seconds`."""
        end = time.monotonic() + seconds
        while self.server_state.tasks or self._connections.open:
            if time.monotonic() > end or (or_forced and self.force_exit):
                return
            await asyncio.sleep(0.02)


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        ConfigurationError: the address is in use, or is not this machine's.
    """
    if not host.strip():
        # The system would take it for every interface.
        raise ConfigurationError(
            "--host is empty: name the address to listen on, as 127.0.0.1, or 0.0.0.0 for every "
            "interface."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's algorithm off only then. With it on, a
    # response on a kept connection waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError, ValueError) as error:  # ValueError: no host has such a name
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {error}. Choose another with --host or --port; "
            "port 0 takes a free one."
        ) from None
    return listener


def reachable_by(address: str) -> str | None:
    """Who may reach a bound address besides this machine, as a part of a sentence; None: nobody.

    Args:
        address: a numeric IPv4 or IPv6 address, as a socket names its own.
    """
    parsed = numeric_address(address)
    if parsed.is_loopback:
        return None
    where = "on every interface, so" if parsed.is_unspecified else "not on loopback alone, so"
    return f"{where} other machines may reach it"


def warn_if_open(settings: ServeSettings, address: str, port: int) -> None:
    """Log a warning if other machines may draw images without a key."""
    if settings.api_keys or (reach := reachable_by(address)) is None:
        return
    logger.warning(
        "listening on %s port %d: %s, and everyone there may draw images, because SDXL_API_KEYS is "
        "not set. Set it, or let only a proxy that checks its callers reach this port.",
        address,
        port,
        reach,
    )


def refuse_without_model_libraries() -> None:
    """Raises `ConfigurationError` if a library that draws images is missing."""
    missing = [name for name in ("torch", "diffusers", "transformers") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"{', '.join(missing)} not installed: `pip install 'stepspan[model]'` installs what "
            "draws images."
        )


def run(
    settings: ServeSettings,
    host: str,
    port: int,
    build: Callable[[ServeSettings], Runtime] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status: 0, or 1 if the model failed.

    Args:
        build: makes the runtime; the default is the service's own. The bench's servers change it.

    Raises:
        ConfigurationError: a library is missing, or the address cannot be used.
    """
    refuse_without_model_libraries()
    limit = connection_limit(settings.max_connections)
    listener = bind(host, port)
    runtime = build(settings) if build else build_runtime(settings, own_process=True)
    app = create_app(runtime, on_failed_start=lambda: server.stop())
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        workers=1,  # uvicorn would read WEB_CONCURRENCY; one process owns the GPU
        # Server and version in every response would only help a scanner.
        server_header=False,
    )
    server = _Server(config, runtime, listener, limit)
    address, bound_port = listener.getsockname()[:2]
    warn_if_open(settings, address, bound_port)
    shown = f"[{address}]" if ":" in address else address

    async def serve() -> int:
        threads = ThreadPoolExecutor(thread_name_prefix=THREADS)
        asyncio.get_running_loop().set_default_executor(threads)
        announcing = asyncio.create_task(_announce(runtime, f"http://{shown}:{bound_port}"))
        try:
            await server.serve()
        finally:
            announcing.cancel()
        status = 1 if runtime.failed else 0
        threads.shutdown(wait=False, cancel_futures=True)
        if runtime.work_left_behind or not _threads_end():
            # Finalising the interpreter while a thread is in native code would abort the process,
            # and asyncio would wait without a limit for a thread that encodes or stores an image.
            logging.shutdown()
            with suppress(OSError):  # a full disk
                sys.stdout.flush()
            remove_process_directory()
            os._exit(status)
        return status

    return asyncio.run(serve())


def _threads_end() -> bool:
    """Whether the threads of `asyncio.to_thread` end within a moment."""
    end = time.monotonic() + THREADS_SECONDS
    threads = [each for each in threading.enumerate() if each.name.startswith(THREADS)]
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


async def _announce(runtime: Runtime, address: str) -> None:
    """When the model is ready, print the address and a request to try."""
    await runtime.ready.wait()
    readiness = runtime.readiness
    shapes = ", ".join(str(shape) for shape in readiness.shapes)
    key = ' -H "Authorization: Bearer $SDXL_API_KEY"' if runtime.settings.api_keys else ""
    _print_now(
        f"\nstepspan is ready at {address}\n"
        f"  model {readiness.model} on {readiness.device}, shapes {shapes}\n\n"
        "Try it:\n"
        f"  curl -s {address} -H 'content-type: application/json'{key} \\\n"
        """    -d '{"prompt": "a red circle on a white background", "seed": 1}'\n"""
    )


def _print_now(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
