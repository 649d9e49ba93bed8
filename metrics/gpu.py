"""Reads the GPU's driver through NVML: which GPU it is, its clock, and what throttles it.

A call usually takes microseconds and does not touch the work in progress. Without a GPU, a driver
or the binding (nvidia-ml-py) there is no `Gpu`, and nothing fails. `gpu_metrics.py` exports the
figures.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from metrics.records import GpuConditions

# NVML's bits by number, because the binding has renamed its constants once. Left out are the bits
# that are no fault: idle (0x1), the display's clock (0x100), and application clocks (0x2), which an
# operator has set.
REASON_BITS: Mapping[int, str] = MappingProxyType(
    {
        0x04: "power_cap",
        0x08: "hardware_slowdown",
        0x10: "sync_boost",
        0x20: "thermal",
        0x40: "hardware_thermal",
        0x80: "power_brake",
    }
)

THROTTLE_REASONS = tuple(REASON_BITS.values())
"""Every reason that NVML knows for a lower clock: the closed set of label values."""


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """The reasons in NVML's (and nvidia-smi's) bit mask of active clock events."""
    return tuple(name for bit, name in REASON_BITS.items() if bits & bit)


class Gpu:
    """One GPU of this machine. Safe for any thread."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml = nvml
        self.handle = handle
        self.failures = 0
        """How many queries the driver did not answer."""
        self.identity: Mapping[str, str] = MappingProxyType(
            {
                "hw.type": "gpu",
                "hw.name": str(nvml.nvmlDeviceGetName(handle)),
                "hw.id": str(nvml.nvmlDeviceGetUUID(handle)),
            }
        )
        self._max_sm_clock_mhz = self.query(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM)

    @classmethod
    def open(cls, device: str) -> Gpu | None:
        """The GPU that torch calls `device`; None for a CPU, or if NVML does not know the GPU.

        Args:
            device: `auto`, `cpu`, `cuda` or `cuda:N`; N counts the GPUs that
                `CUDA_VISIBLE_DEVICES` shows.
        """
        if device == "cpu":
            return None
        try:
            import pynvml
        except ImportError:
            return None
        index = int(device.split(":")[1]) if ":" in device else 0
        try:
            pynvml.nvmlInit()
            handle = _handle(pynvml, index)
            return None if handle is None else cls(pynvml, handle)
        except pynvml.NVMLError:
            return None

    def conditions(self) -> GpuConditions:
        """The GPU's clock now, and what throttles it. Never raises; failures are counted."""
        reasons = self.query(self.nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        return GpuConditions(
            throttle=frozenset(throttle_reasons(reasons)),
            sm_clock_mhz=self.query(self.nvml.nvmlDeviceGetClockInfo, self.nvml.NVML_CLOCK_SM),
            max_sm_clock_mhz=self._max_sm_clock_mhz,
        )

    def query(self, function: Any, *arguments: Any) -> Any:
        """The result of one NVML function for this GPU; None, counted as a failure, if it
        raises."""
        try:
            return function(self.handle, *arguments)
        except self.nvml.NVMLError:
            self.failures += 1
            return None


class GpuWatch:
    """Reads the GPU's conditions during a run, without blocking the run's thread.

    A driver call usually takes microseconds, sometimes many milliseconds, and may never return once
    the device is lost. So a daemon thread reads, and the run's end does not wait for a reading.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._requested: queue.SimpleQueue[list[GpuConditions]] = queue.SimpleQueue()
        self._readings: list[GpuConditions] = []
        if gpu is not None:
            threading.Thread(target=self._read, name="gpu-watch", daemon=True).start()

    def begin(self) -> None:
        """A run begins: forget the readings of the run before."""
        self._readings = []

    def request_reading(self) -> None:
        """Request one reading now; returns at once."""
        if self._gpu is not None:
            self._requested.put(self._readings)

    def readings(self) -> tuple[GpuConditions, ...]:
        """The readings that have arrived since the run began."""
        return tuple(self._readings)

    def _read(self) -> None:
        assert self._gpu is not None
        while True:
            self._requested.get().append(self._gpu.conditions())


def _handle(nvml: Any, index: int) -> Any:
    """The NVML handle of CUDA's device `index`.

    NVML counts all GPUs of the machine, CUDA only those in `CUDA_VISIBLE_DEVICES`: numbers, or
    UUIDs and prefixes of them.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(index)
    names = [name.strip() for name in visible.split(",")]
    if index >= len(names):
        return None
    name = names[index]
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    if name.startswith("GPU-"):
        for number in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            if str(nvml.nvmlDeviceGetUUID(handle)).startswith(name):
                return handle
    # A slice of a GPU (MIG-...), or no GPU: empty and -1 hide all of them.
    return nvml.nvmlDeviceGetHandleByUUID(name) if name.startswith("MIG-") else None
