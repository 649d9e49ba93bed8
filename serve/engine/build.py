"""Building a process's runtime from its settings."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

from prometheus_client import REGISTRY, CollectorRegistry

from kernels_warmup.cache.trust import UntrustedFolder
from kernels_warmup.cache.working_directory import use_trusted_folders
from kernels_warmup.cpu_contention import ComputingThreads
from kernels_warmup.cpu_threads import choose_cpu_threads
from kernels_warmup.warmup import RunKind
from metrics.catalogue import GenerationMetrics
from metrics.gpu import Gpu, GpuWatch
from metrics.recorder import Recorder
from serve import __version__
from serve.engine.gpu_thread import GpuThread
from serve.engine.images import Upload, data_uri
from serve.engine.readiness import Readiness
from serve.engine.runtime import ENDPOINTS, Runtime
from serve.engine.startup import Prepare, Startup
from serve.errors import (
    ERROR_TYPES,
    OUTCOMES,
    REJECTIONS,
    ConfigurationError,
)
from serve.settings import ServeSettings
from serve.telemetry.profiling import Profiling
from serve.telemetry.setup import (
    bucket_families,
    build_gpu_metrics,
    build_push,
    build_resource,
    build_tracing,
)


def build_runtime(
    settings: ServeSettings,
    registry: CollectorRegistry = REGISTRY,
    upload: Upload = data_uri,
    prepare: Prepare | None = None,
    kinds: Sequence[RunKind] | None = None,
    own_process: bool = False,
) -> Runtime:
    """Build everything but the model, and wire it together.

    Args:
        registry: where the metrics are declared.
        upload: stores an image and returns its URL; the default answers inline.
        prepare: makes the loaded model fast in another way than the settings say. The bench uses
            it to compare ways.
        kinds: the kinds of run to warm, if not all that can be served will be requested.
        own_process: the process serves this one model until it ends. Then the garbage collector
            leaves out what exists when the model is ready.

    Raises:
        ConfigurationError: a folder of profiles or of compiled code cannot be used.
    """
    try:
        use_trusted_folders()
    except UntrustedFolder as error:
        raise ConfigurationError(str(error)) from None
    # OpenMP reads its environment when torch is loaded, which comes later.
    cpu_threads = ComputingThreads(choose_cpu_threads())
    gpu = Gpu.open(settings.device)
    resource = build_resource(settings, gpu)
    metrics = _build_metrics(settings, registry)
    tracing = build_tracing(settings, metrics, resource)
    recorder = Recorder(tracing, metrics, settings.trace_steps)
    profiling = Profiling(settings.profile_dir, settings.nvtx)
    readiness = Readiness(cpu_threads=cpu_threads.describe)
    gpu_thread = GpuThread()
    startup = Startup(
        settings, readiness, metrics, recorder, gpu_thread, prepare, kinds, own_process
    )
    return Runtime(
        settings,
        tracing,
        metrics,
        recorder,
        profiling,
        upload,
        readiness,
        startup,
        gpu_thread,
        gpu_watch=GpuWatch(gpu),
        gpu_metrics=build_gpu_metrics(settings, metrics, gpu),
        push=build_push(settings, metrics, resource),
        cpu_threads=cpu_threads,
    )


def _build_metrics(settings: ServeSettings, registry: CollectorRegistry) -> GenerationMetrics:
    return GenerationMetrics(
        registry,
        endpoints=ENDPOINTS,
        outcomes=OUTCOMES,
        error_types=ERROR_TYPES,
        rejections=REJECTIONS,
        loras=[each.name for each in settings.loras],
        api_keys=[each.name for each in settings.api_keys],
        bucket_families=bucket_families(settings),
        build={
            "version": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "diffusers": version("diffusers"),
        },
    )
