"""A driver to put in pynvml's place: some GPUs whose conditions a test sets."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    silent: set[str] = field(default_factory=set)
    """Functions that this GPU's driver does not answer."""


class FakeNvml:
    """The part of `pynvml` that is used."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1

    def __init__(self, *gpus: FakeGpu, loads: bool = True) -> None:
        self.gpus = gpus
        self.loads = loads

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

    def _answer(self, gpu: FakeGpu, function: str, value: Any) -> Any:
        if function in gpu.silent:
            raise NVMLError("not supported")
        return value
