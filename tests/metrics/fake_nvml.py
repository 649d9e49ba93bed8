"""A fake of pynvml: some GPUs whose conditions a test sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


@dataclass
class FakeGpu:
    uuid: str = "GPU-aaaaaaaa-0000"
    name: str = "NVIDIA H100"
    reasons: int = 0
    sm_clock_mhz: int = 1980
    max_sm_clock_mhz: int = 1980
    memory_used: int = 20 * 2**30
    memory_total: int = 80 * 2**30
    utilization_percent: int = 97
    power_milliwatts: int = 650_000
    temperature: int = 55
    tensor_percent: float = 60.0
    sm_percent: float = 90.0
    has_gpm: bool = True
    silent: set[str] = field(default_factory=set)
    """Functions that this GPU's driver does not answer."""


class FakeNvml:
    """The part of `pynvml` that the service uses."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_GPM_METRIC_SM_UTIL = 2
    NVML_GPM_METRIC_ANY_TENSOR_UTIL = 5
    NVML_GPM_METRICS_GET_VERSION = 1

    def __init__(self, *gpus: FakeGpu, loads: bool = True) -> None:
        self.gpus = gpus
        self.loads = loads
        self.samples_held = 0

    def nvmlInit(self) -> None:
        if not self.loads:
            raise NVMLError("the driver is not loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if index >= len(self.gpus):
            raise NVMLError("invalid argument")
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return gpu
        raise NVMLError("not found")

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetClockInfo(self, gpu: FakeGpu, kind: int) -> int:
        return self._answer(gpu, "nvmlDeviceGetClockInfo", gpu.sm_clock_mhz)

    def nvmlDeviceGetMaxClockInfo(self, gpu: FakeGpu, kind: int) -> int:
        return self._answer(gpu, "nvmlDeviceGetMaxClockInfo", gpu.max_sm_clock_mhz)

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: FakeGpu) -> int:
        return self._answer(gpu, "nvmlDeviceGetCurrentClocksEventReasons", gpu.reasons)

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> SimpleNamespace:
        memory = SimpleNamespace(used=gpu.memory_used, total=gpu.memory_total)
        return self._answer(gpu, "nvmlDeviceGetMemoryInfo", memory)

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> SimpleNamespace:
        rates = SimpleNamespace(gpu=gpu.utilization_percent)
        return self._answer(gpu, "nvmlDeviceGetUtilizationRates", rates)

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:
        return self._answer(gpu, "nvmlDeviceGetPowerUsage", gpu.power_milliwatts)

    def nvmlDeviceGetTemperatureV(self, gpu: FakeGpu, sensor: int) -> int:
        return self._answer(gpu, "nvmlDeviceGetTemperatureV", gpu.temperature)

    # GPM: samples are allocated and freed by hand, and two of them give the activity in between.

    def nvmlGpmQueryDeviceSupport(self, gpu: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(isSupportedDevice=int(gpu.has_gpm))

    def nvmlGpmSampleAlloc(self) -> SimpleNamespace:
        self.samples_held += 1
        return SimpleNamespace(gpu=None)

    def nvmlGpmSampleGet(self, gpu: FakeGpu, sample: SimpleNamespace) -> None:
        self._answer(gpu, "nvmlGpmSampleGet", None)
        sample.gpu = gpu

    def nvmlGpmSampleFree(self, sample: SimpleNamespace) -> None:
        self.samples_held -= 1

    def c_nvmlGpmMetricsGet_t(self) -> SimpleNamespace:
        return SimpleNamespace(metrics=[SimpleNamespace() for _ in range(333)])

    def nvmlGpmMetricsGet(self, request: SimpleNamespace) -> None:
        gpu = request.sample2.gpu
        self._answer(gpu, "nvmlGpmMetricsGet", None)
        percent = {
            self.NVML_GPM_METRIC_SM_UTIL: gpu.sm_percent,
            self.NVML_GPM_METRIC_ANY_TENSOR_UTIL: gpu.tensor_percent,
        }
        for slot in request.metrics[: request.numMetrics]:
            slot.value, slot.nvmlReturn = percent[slot.metricId], 0

    def _answer(self, gpu: FakeGpu, function: str, value: Any) -> Any:
        if function in gpu.silent:
            raise NVMLError("not supported")
        return value
