"""The GPU as its driver sees it, through NVML: which one it is, its clock, and what throttles it.

Each call asks the driver and takes microseconds; it does not touch the work in progress. Without a
GPU, a driver or the binding (nvidia-ml-py) there is no `Gpu`, and nothing fails. `gpu_metrics.py`
exports the figures.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from metrics.records import GpuConditions

# NVML's bits, by number: the binding has renamed its constants once and will drop the old names.
# Left out are the bits that slow nothing down: idle (0x1), the display's clock (0x100), and the
# application clocks (0x2), which somebody asked for.
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
"""Everything a GPU can be held back by, as far as NVML tells: the values of a closed label."""


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """The reasons that NVML's (and nvidia-smi's) bits of active clock events name."""
    return tuple(name for bit, name in REASON_BITS.items() if bits & bit)


class Gpu:
    """One GPU of this machine. May be asked from any thread."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml = nvml
        self.handle = handle
        self.failures = 0
        """How many questions the driver did not answer."""
        self.identity: Mapping[str, str] = MappingProxyType(
            {
                "hw.type": "gpu",
                "hw.name": str(nvml.nvmlDeviceGetName(handle)),
                "hw.id": str(nvml.nvmlDeviceGetUUID(handle)),
            }
        )
        self._max_sm_clock_mhz = self.ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM)

    @classmethod
    def open(cls, device: str) -> Gpu | None:
        """The GPU that torch calls `device`; None for a CPU, or where NVML does not know it.

        Args:
            device: `auto`, `cpu`, `cuda` or `cuda:N`; N counts what `CUDA_VISIBLE_DEVICES` leaves.
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
        """What the GPU's clock does now and why. Never raises; failures are counted."""
        reasons = self.ask(self.nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        return GpuConditions(
            throttle=frozenset(throttle_reasons(reasons)),
            sm_clock_mhz=self.ask(self.nvml.nvmlDeviceGetClockInfo, self.nvml.NVML_CLOCK_SM),
            max_sm_clock_mhz=self._max_sm_clock_mhz,
        )

    def ask(self, question: Any, *arguments: Any) -> Any:
        """The driver's answer to one NVML function of this GPU, or None, counted as a failure."""
        try:
            return question(self.handle, *arguments)
        except self.nvml.NVMLError:
            self.failures += 1
            return None


class GpuWatch:
    """Looks at the GPU while a run goes on, without keeping the run's thread waiting.

    A driver usually answers in microseconds and at times, holding a lock of its own, in many
    milliseconds; one that has lost its device may never answer. So the questions are asked on a
    daemon thread, and what is not answered by the run's end is not waited for.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._asked: queue.SimpleQueue[list[GpuConditions]] = queue.SimpleQueue()
        self._seen: list[GpuConditions] = []
        if gpu is not None:
            threading.Thread(target=self._answer, name="gpu-watch", daemon=True).start()

    def begin(self) -> None:
        """A run begins: what was seen before is of another."""
        self._seen = []

    def look(self) -> None:
        """Ask for the conditions of this moment; returns at once."""
        if self._gpu is not None:
            self._asked.put(self._seen)

    def seen(self) -> tuple[GpuConditions, ...]:
        """What has been answered since the run began."""
        return tuple(self._seen)

    def _answer(self) -> None:
        assert self._gpu is not None
        while True:
            self._asked.get().append(self._gpu.conditions())


def _handle(nvml: Any, index: int) -> Any:
    """NVML counts all GPUs of the machine; CUDA only those that `CUDA_VISIBLE_DEVICES` names, by
    number or by UUID, which may be cut short."""
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
    # What is left names a slice of a GPU (MIG-...), or nothing: empty and -1 hide every GPU.
    return nvml.nvmlDeviceGetHandleByUUID(name) if name.startswith("MIG-") else None
