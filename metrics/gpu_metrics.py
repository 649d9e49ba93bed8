"""The GPU's figures as metrics. A thread of its own reads the driver every few seconds."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from metrics.gpu import REASON_BITS, Gpu

logger = logging.getLogger(__name__)

SAMPLE_SECONDS = 5.0
"""Time between two readings, and the interval over which activity is averaged."""

# An older reading is stale: the driver hangs, or the thread has ended.
_STALE_SECONDS = 3 * SAMPLE_SECONDS


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that the process's allocator holds on the GPU; the peak is since the process began."""

    allocated: int
    reserved: int
    peak: int


class GpuMetrics:
    """A collector of the GPU's figures, which a thread of its own reads.

    A scrape returns the last reading and never calls the driver, so a driver that hangs does not
    delay it. A figure that the GPU does not have (tensor activity before Hopper, utilisation of a
    slice) fails in the first reading and is absent from then on. A figure that fails later is
    absent too, and counted.

    Args:
        gpu: None if NVML knows no GPU: then only the allocator's memory is shown.
        memory: returns the allocator's use of the GPU, or None before its first use.
        failed: called for each query that the driver did not answer, and once a scrape while the
            driver hangs.
    """

    def __init__(
        self,
        gpu: Gpu | None,
        memory: Callable[[], MemoryUse | None],
        failed: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gpu = gpu
        self._memory = memory
        self._failed = failed
        self._monotonic = monotonic
        self._queries: dict[str, Callable[[], Mapping[str, float]]] = {}
        self._activity: _Activity | None = None
        self._read_at: float | None = None
        self._reading: Mapping[str, Mapping[str, float]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def memory_use(self) -> MemoryUse | None:
        """The allocator's use of the GPU, or None before its first use."""
        return self._memory()

    def start(self) -> None:
        """Read the GPU now, and then every `SAMPLE_SECONDS` until `stop`."""
        if self._gpu is None or self._thread is not None:
            return
        self._read_at = self._monotonic()
        self._thread = threading.Thread(
            target=self._read_until_stopped, name="gpu-metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop reading; does not wait for a reading that hangs."""
        self._stop.set()

    def read(self) -> None:
        """Read all figures from the driver once. Never raises."""
        assert self._gpu is not None
        first = not self._queries
        if first:
            self._activity = _Activity.open(self._gpu)
            self._queries = _figure_queries(self._gpu, self._activity)
        reading = {}
        for name, query in list(self._queries.items()):
            try:
                reading[name] = query()
            except Exception as error:  # noqa: BLE001 - a binding may raise anything
                if first:
                    del self._queries[name]
                    logger.info("this GPU does not report %s (%s)", name, type(error).__name__)
                else:
                    self._failed()
        self._reading = reading
        self._read_at = self._monotonic()

    def describe(self) -> Iterable[Metric]:
        """Every metric that a GPU may have; the names are declared even if this GPU lacks the
        figure."""
        return [_family(name) for name in ("info", *_MEMORY, *_DRIVER)]

    def collect(self) -> Iterator[Metric]:
        memory = self._memory()
        if memory is not None:
            for name, value in zip(
                _MEMORY, (memory.allocated, memory.reserved, memory.peak), strict=True
            ):
                yield _filled(name, {"": value})
        if self._gpu is None or self._read_at is None:
            return
        info = _family("info")
        info.add_metric([self._gpu.identity["hw.name"], self._gpu.identity["hw.id"]], 1)
        yield info
        if self._monotonic() - self._read_at > _STALE_SECONDS:
            self._failed()
            return
        for name, values in self._reading.items():
            if values:
                yield _filled(name, values)

    def _read_until_stopped(self) -> None:
        while not self._stop.is_set():
            self.read()
            self._stop.wait(SAMPLE_SECONDS)
        if self._activity is not None:
            self._activity.close()


# Name without prefix: help, label. The order is that of a scrape.
_MEMORY: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "memory_allocated_bytes": ("Memory in tensors of this process.", ""),
        "memory_reserved_bytes": ("Memory that this process's allocator holds.", ""),
        "memory_peak_bytes": ("Most memory in tensors since the process began.", ""),
    }
)
_DRIVER: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "memory_used_bytes": ("Memory in use on the GPU by all processes.", ""),
        "memory_total_bytes": ("Memory of the GPU.", ""),
        "utilization_ratio": ("Share of the last moments in which any kernel ran.", ""),
        "tensor_activity_ratio": ("Share of time in which the tensor cores worked.", ""),
        "sm_activity_ratio": ("Share of the multiprocessors that were busy.", ""),
        "power_watts": ("Power drawn.", ""),
        "temperature_celsius": ("Temperature of the GPU.", ""),
        "clock_hertz": ("Clock of a part of the GPU.", "domain"),
        "max_clock_hertz": ("Highest clock of a part of the GPU.", "domain"),
        "throttled": ("1 while this reason lowers the GPU's clock, else 0.", "reason"),
    }
)


def _family(name: str) -> GaugeMetricFamily:
    if name == "info":
        text = "Always 1; the labels name the GPU."
        return GaugeMetricFamily("sdxl_gpu_info", text, labels=["name", "uuid"])
    text, label = _MEMORY.get(name) or _DRIVER[name]
    return GaugeMetricFamily(f"sdxl_gpu_{name}", text, labels=[label] if label else [])


def _filled(name: str, values: Mapping[str, float]) -> Metric:
    family = _family(name)
    for label, value in values.items():
        family.add_metric([label] if label else [], value)
    return family


def _figure_queries(
    gpu: Gpu, activity: _Activity | None
) -> dict[str, Callable[[], Mapping[str, float]]]:
    """One query for each figure, returning values by label value. A query raises what the binding
    raises."""
    nvml, handle = gpu.nvml, gpu.handle
    domains = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}

    def clocks(function: Any) -> Mapping[str, float]:
        return {name: function(handle, domain) * 1e6 for name, domain in domains.items()}

    def throttled() -> Mapping[str, float]:
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        return {name: float(bool(reasons & bit)) for bit, name in REASON_BITS.items()}

    queries: dict[str, Callable[[], Mapping[str, float]]] = {
        "memory_used_bytes": lambda: {"": nvml.nvmlDeviceGetMemoryInfo(handle).used},
        "memory_total_bytes": lambda: {"": nvml.nvmlDeviceGetMemoryInfo(handle).total},
        "utilization_ratio": lambda: {"": nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100},
        "power_watts": lambda: {"": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3},
        "temperature_celsius": lambda: {"": nvml.nvmlDeviceGetTemperatureV(handle, 0)},
        "clock_hertz": lambda: clocks(nvml.nvmlDeviceGetClockInfo),
        "max_clock_hertz": lambda: clocks(nvml.nvmlDeviceGetMaxClockInfo),
        "throttled": throttled,
    }
    if activity is not None:
        # One reading of the interval gives both figures.
        queries["tensor_activity_ratio"] = activity.tensor
        queries["sm_activity_ratio"] = activity.sm
    return queries


class _Activity:
    """Activity of tensor cores and multiprocessors between two readings, by NVML's GPM (Hopper and
    later).

    The first reading has none. NVML's counters are refreshed about every 100 ms, and it asks for
    more than that between two samples.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._nvml = gpu.nvml
        self._handle = gpu.handle
        self._before: Any = None
        self._sm: float | None = None

    @classmethod
    def open(cls, gpu: Gpu) -> _Activity | None:
        """None if this GPU has no GPM."""
        try:
            if not gpu.nvml.nvmlGpmQueryDeviceSupport(gpu.handle).isSupportedDevice:
                return None
            return cls(gpu)
        except Exception:  # noqa: BLE001 - an old driver has no such function
            return None

    def tensor(self) -> Mapping[str, float]:
        """The tensor cores' activity since the last call; empty at the first."""
        nvml = self._nvml
        now = self._sample()
        if self._before is None:
            self._before = now
            return {}
        wanted = (nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL, nvml.NVML_GPM_METRIC_SM_UTIL)
        request = nvml.c_nvmlGpmMetricsGet_t()
        request.version = nvml.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(wanted)
        request.sample1, request.sample2 = self._before, now
        for slot, metric in enumerate(wanted):
            request.metrics[slot].metricId = metric
        try:
            nvml.nvmlGpmMetricsGet(request)
        finally:
            nvml.nvmlGpmSampleFree(self._before)
            self._before = now
        tensor, self._sm = (_share(request.metrics[slot]) for slot in range(len(wanted)))
        return {} if tensor is None else {"": tensor}

    def sm(self) -> Mapping[str, float]:
        """The multiprocessors' activity in the interval that `tensor` read last."""
        return {} if self._sm is None else {"": self._sm}

    def close(self) -> None:
        if self._before is None:
            return
        try:
            self._nvml.nvmlGpmSampleFree(self._before)
        except Exception:  # noqa: BLE001 - the process ends
            logger.debug("a GPM sample was not freed")

    def _sample(self) -> Any:
        sample = self._nvml.nvmlGpmSampleAlloc()
        try:
            self._nvml.nvmlGpmSampleGet(self._handle, sample)
        except Exception:
            self._nvml.nvmlGpmSampleFree(sample)
            raise
        return sample


def _share(metric: Any) -> float | None:
    """A GPM metric as a ratio; None if NVML has no value for this interval."""
    value = float(metric.value) / 100
    return value if metric.nvmlReturn == 0 and math.isfinite(value) else None
