"""The Ray Serve application: the self-hosted server's app as a deployment, one replica a GPU.

`python -m serve ray` runs it on this machine. On a cluster, `serve run serve.ray_app:app` or a
configuration file does. Ray starts, checks, scales and ends the replicas, and passes each request
to one of them; there it meets the same app as in the self-hosted server. docs/ray.md says which of
Ray's options follow from which of our settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import ray
from opentelemetry import trace
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve as ray_serve
from starlette.types import ASGIApp, Receive, Scope, Send

from kernels_warmup.cache.working_directory import remove_process_directory
from kernels_warmup.cpu_threads import cores_given
from serve.engine.build import build_runtime
from serve.engine.call import current_call
from serve.engine.runtime import Runtime
from serve.errors import ConfigurationError, GenerationFailed, ModelError
from serve.server import (
    CUT_OFF_SECONDS,
    FLUSH_SECONDS,
    GRACE_SECONDS,
    bind,
    create_app,
    refuse_without_model_libraries,
    warn_if_open,
)
from serve.settings import ServeSettings, load_settings
from serve.telemetry.logs import configure_logging
from serve.telemetry.scrape_target import ScrapeTarget

logger = logging.getLogger(__name__)

APPLICATION = "stepspan"
DEPLOYMENT = "Sdxl"

BESIDE_WAITING = 16
"""How many requests a replica takes beside those that may wait and those of two runs: reads of its
figures, what is being encoded, and what is refused. So the queue that fills up is ours, with its
429 and its estimates, and not Ray's."""

DRAIN_CHECK_SECONDS = 0.5
"""How often a replica that Ray is ending looks whether its requests have ended."""

HEALTH_CHECK_SECONDS = 5.0

LOCAL_OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Of the cluster on this machine. Requests and answers do not go through it."""


class RayOptions(BaseModel):
    """What is decided for the deployment as a whole. `serve run` takes them as `NAME=VALUE`, and a
    configuration file as `args`. All else is in the settings, which each replica reads itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(default=1, ge=1)
    """How many there are, or at least are."""
    max_replicas: int | None = Field(default=None, ge=1)
    """How many there may be; None: as many as `replicas`."""
    run_seconds: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How long a run of `SDXL_MAX_BATCH` images takes, as measured."""
    wait_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How long requests may wait on average before a replica is added; None: for one run."""
    upscale_seconds: float = Field(default=10.0, gt=0)
    """How long there must be too many requests before a replica is added, which takes minutes to
    start."""
    downscale_seconds: float = Field(default=300.0, gt=0)
    """How long there must be too few before one is removed. Five idle minutes cost about what a
    start does."""
    cpus: float = Field(default=1.0, gt=0)
    """What a replica takes of its node's CPUs."""
    metrics_host: str | None = None
    """Where each replica serves its metrics; None: on its node's address in the cluster."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """0: a free one for each replica."""
    metrics_targets: Path | None = None
    """A folder that each replica writes its metrics' address to, for Prometheus to find it."""


def read_options(arguments: dict[str, Any]) -> RayOptions:
    """The options in what a command or a file gives.

    Raises:
        ConfigurationError: names the first one that is wrong.
    """
    try:
        options = RayOptions.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = problem["loc"][0]
        allowed = ", ".join(RayOptions.model_fields)
        raise ConfigurationError(
            f"{name} of the Ray application is not allowed as it is: {problem['msg']}. "
            f"Its options are {allowed}."
        ) from None
    if options.max_replicas is not None and options.max_replicas < options.replicas:
        raise ConfigurationError(
            f"max_replicas={options.max_replicas} is not allowed. Allowed: a number from "
            f"{options.replicas} (replicas)."
        )
    return options


def target_ongoing_requests(batch: int, run_seconds: float, wait_seconds: float) -> float:
    """How many requests a replica has while its callers wait `wait_seconds` on average.

    For random arrivals and runs of equal length the wait says how busy the replica is (Pollaczek
    and Khinchine). Its requests are then the rate at which it serves them, times how long each is
    there (Little). With several images a run this holds for runs, which is on the safe side.
    """
    runs_waited = wait_seconds / run_seconds
    utilisation = 2 * runs_waited / (1 + 2 * runs_waited)
    return batch * utilisation * (1 + runs_waited)


def app(arguments: dict[str, Any]) -> ray_serve.Application:
    """The application. Ray calls it, on the cluster, with the arguments of the command or file.

    Raises:
        ConfigurationError: a setting or an argument is wrong.
    """
    settings, options = load_settings(), read_options(arguments)
    most = options.max_replicas or options.replicas
    batch = settings.max_batch or 1
    wait = options.run_seconds if options.wait_seconds is None else options.wait_seconds
    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if most > options.replicas:
        target = target_ongoing_requests(batch, options.run_seconds, wait)
        scaling = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": most,
                "target_ongoing_requests": target,
                "look_back_period_s": options.upscale_seconds,
                "upscale_delay_s": options.upscale_seconds,
                "downscale_delay_s": options.downscale_seconds,
            }
        }
    deployment = ray_serve.deployment(
        ray_serve.ingress(_build_app)(Sdxl),
        name=DEPLOYMENT,
        ray_actor_options={"num_gpus": _gpus_each(settings), "num_cpus": options.cpus},
        max_ongoing_requests=settings.max_waiting + 2 * batch + BESIDE_WAITING,
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_wait_loop_s=DRAIN_CHECK_SECONDS,
        # Whatever a replica has taken ends by its deadline; then the last spans are exported.
        graceful_shutdown_timeout_s=settings.deadline_seconds + GRACE_SECONDS + FLUSH_SECONDS + 2,
        # A wrong setting or a missing model fails the same way each time.
        max_constructor_retry_count=1,
        # The app logs one line a request itself, with its ids.
        logging_config={"encoding": "JSON", "enable_access_log": False},
        **scaling,
    )
    return deployment.bind(options)


def _gpus_each(settings: ServeSettings) -> int:
    """1 where the cluster has GPUs, unless the settings name the CPU."""
    if settings.device.startswith("cuda"):
        return 1
    return int(settings.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)


class Sdxl:
    """A replica, as far as Ray calls it beside its app."""

    app: ReplicaApp  # from the class that Ray derives
    _target: ScrapeTarget | None = None

    def __init__(self, options: RayOptions) -> None:
        host = options.metrics_host or ray.util.get_node_ip_address()
        self._target = ScrapeTarget(
            host, options.metrics_port, options.metrics_targets, _replica_id()
        )

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that fails this."""
        if not self.app.runtime.healthy:
            raise RuntimeError("the device is lost, or a run hangs")

    async def drain(self) -> None:
        """Refuse what has not started, and wait until what runs has ended."""
        await self.app.drain()

    def __del__(self) -> None:
        # Ray ends the process without its exit handlers.
        if self._target is not None:
            self._target.close()
        remove_process_directory()


class ReplicaApp:
    """The self-hosted server's app in a replica.

    Its start-up ends when the model is warm, because Ray sends requests from then on. It knows how
    many requests are running, and lets no exception out whose text could quote one.
    """

    def __init__(self, runtime: Runtime, app: ASGIApp) -> None:
        self.runtime = runtime
        self._app = app
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        await self._note_loras()
        self._requests += 1
        try:
            await self._app(_below_rays_span(scope), receive, send)
        except Exception as error:  # Ray would log its text
            logger.exception("a response was cut off")
            raise GenerationFailed(type(error).__name__) from None
        finally:
            self._requests -= 1

    async def _note_loras(self) -> None:
        """Let Ray know which LoRAs this replica uses, if the caller names them for the routing."""
        names = ray_serve.get_multiplexed_model_id()
        known = {each.name for each in self.runtime.settings.loras}
        # What is not known is a caller's text, which Ray would make a label of.
        if names and known.issuperset(names.split(",")):
            await _loras_in_use(names)

    async def drain(self) -> None:
        runtime = self.runtime
        runtime.begin_drain()
        if not await self._ended(runtime.settings.deadline_seconds + GRACE_SECONDS):
            runtime.cut_off()
            await self._ended(CUT_OFF_SECONDS)

    async def _ended(self, seconds: float) -> bool:
        """Wait until no request runs, for at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._requests:
                    await asyncio.sleep(0.02)
        return not self._requests


def _below_rays_span(scope: Scope) -> Scope:
    """With Ray's own tracing on, its span is the parent of ours, and the caller's is that one's."""
    context = trace.get_current_span().get_span_context()
    if not context.trace_flags.sampled:
        return scope  # off, or not one that Ray exports
    ids = f"{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}"
    headers = [header for header in scope["headers"] if header[0] != b"traceparent"]
    return {**scope, "headers": [*headers, (b"traceparent", f"00-{ids}-01".encode())]}


async def _same(names: str) -> str:
    return names


_loras_in_use = ray_serve.multiplexed(max_num_models_per_replica=1)(_same)
"""Ray remembers the last value this was called with, and sends requests of that value here."""


def _build_app() -> ReplicaApp:
    """Build the app of this process, a replica. Called by Ray, after `Sdxl.__init__`."""
    settings = load_settings()
    _configure_logging(settings)
    # The id of its traces and pushed metrics is the label `replica` of the scraped ones.
    attributes = {**settings.resource_attributes, "service.instance.id": _replica_id()}
    settings = settings.model_copy(update={"resource_attributes": attributes})
    runtime = build_runtime(settings, own_process=True)
    return ReplicaApp(runtime, create_app(runtime, _give_up, ready_first=True))


def _replica_id() -> str:
    return str(ray_serve.get_replica_context().replica_id.unique_id)


def _give_up() -> NoReturn:
    raise ModelError("the model could not be started; the log says why")


def _configure_logging(settings: ServeSettings) -> None:
    """As in every process of ours, and what Ray writes to standard error in the same form."""
    configure_logging(settings.log_format, current_call.get)
    (ours,) = logging.getLogger().handlers
    for name in ("ray", "ray.serve"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setFormatter(ours.formatter)


# On this machine


class _Stopped(Exception):
    """A signal asks the process to end."""


def run(settings: ServeSettings, host: str, port: int, arguments: dict[str, Any]) -> int:
    """Serve with a Ray cluster of this machine until SIGTERM or SIGINT. Returns the exit status: 0,
    or 1 if the model failed.

    Raises:
        ConfigurationError: an option is wrong, a library is missing, or the address cannot be used.
    """
    refuse_without_model_libraries()
    options = read_options(arguments)
    most = options.max_replicas or options.replicas
    with bind(host, port) as free:  # Ray opens it again, but would not say what is wrong with it
        address, port = free.getsockname()[:2]
    warn_if_open(settings, address, port)
    if options.metrics_targets is not None:
        targets = options.metrics_targets.absolute()  # replicas work elsewhere
        options = options.model_copy(update={"metrics_targets": targets})
    cpus = max(1, cores_given() // most)
    with _cluster(cpus * most):
        _configure_logging(settings)  # Ray has changed it
        if _gpus_each(settings) * most > (gpus := ray.cluster_resources().get("GPU", 0)):
            raise ConfigurationError(
                f"--replicas or --max-replicas is not allowed as it is: {most} replicas need a GPU "
                f"each, and this machine has {gpus:.0f}."
            )
        keep_alive = math.ceil(settings.keep_alive_seconds)
        ray_serve.start(
            http_options={"host": host, "port": port, "keep_alive_timeout_s": keep_alive},
            logging_config={"enable_access_log": False},
        )
        replicas = None
        try:
            with _signals_raise():
                served = app(options.model_dump() | {"cpus": cpus})
                replicas = ray_serve.run(served, name=APPLICATION)
                _announce(host, port, options)
                while True:
                    signal.pause()
        except RuntimeError:  # of `ray_serve.run`
            logger.error("the application could not be started; a replica's log says why")
            return 1
        except _Stopped:
            if replicas is not None:
                _drain(replicas, settings.deadline_seconds + GRACE_SECONDS + 2 * CUT_OFF_SECONDS)
            ray_serve.shutdown()
    return 0


def _drain(replicas: Any, seconds: float) -> None:
    """Drain all replicas, for at most `seconds`."""
    try:
        replicas.broadcast("drain").results(timeout_s=seconds)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one, all have to end
        logger.warning("not every replica has drained: %s", type(error).__name__)


def _announce(host: str, port: int, options: RayOptions) -> None:
    shown = f"[{host}]" if ":" in host else host
    lines = [
        f"\nstepspan is ready at http://{shown}:{port}, {options.replicas} replicas on Ray Serve"
    ]
    if options.metrics_targets is not None:
        lines.append(f"  Prometheus finds their metrics by {options.metrics_targets}/*.json")
    sys.stdout.write("\n".join(lines) + "\n\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _cluster(cpus: int) -> Iterator[None]:
    """A Ray cluster that listens on loopback only, until the block ends."""
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Within the block, a signal to end raises `_Stopped`. A second one ends the process."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        raise _Stopped

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup
            signal.signal(number, stop)
    yield
