from __future__ import annotations

import sys

import pytest

from metrics.gpu import THROTTLE_REASONS, Gpu
from metrics.records import GpuConditions
from tests.metrics.fake_nvml import FakeGpu, FakeNvml

FIRST = FakeGpu(uuid="GPU-aaaaaaaa-0000")
SECOND = FakeGpu(uuid="GPU-bbbbbbbb-1111")
SLICE = FakeGpu(uuid="MIG-cccccccc-2222")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = FakeNvml(FIRST, SECOND, SLICE)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


@pytest.mark.parametrize(
    ("visible", "device", "uuid"),
    [
        (None, "auto", FIRST.uuid),
        (None, "cuda", FIRST.uuid),
        (None, "cuda:1", SECOND.uuid),
        (None, "cuda:7", None),
        (None, "cpu", None),
        ("1", "cuda", SECOND.uuid),
        ("1,0", "cuda:1", FIRST.uuid),
        ("1", "cuda:1", None),
        ("7", "cuda", None),
        (SECOND.uuid, "cuda", SECOND.uuid),
        ("GPU-bbbb", "cuda", SECOND.uuid),
        ("GPU-dddd", "cuda", None),
        (SLICE.uuid, "cuda", SLICE.uuid),
        ("", "auto", None),
        ("-1", "auto", None),
    ],
)
def test_the_gpu_is_the_one_that_cuda_means(
    nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    device: str,
    uuid: str | None,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = Gpu.open(device)
    assert (gpu and gpu.identity["hw.id"]) == uuid
    if gpu is not None:
        assert gpu.identity["hw.type"] == "gpu"
        assert gpu.identity["hw.name"] == "NVIDIA H100"


def test_without_binding_or_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpu.open("cuda") is None
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FIRST, loads=False))
    assert Gpu.open("cuda") is None


@pytest.mark.parametrize(
    ("reasons", "names"),
    [
        (0x0, set()),
        (0x1 | 0x2 | 0x100, set()),  # idle, clocks set by an application, a display
        (0x4, {"power_cap"}),
        (0x20 | 0x40, {"thermal", "hardware_thermal"}),
        (0xFFF, set(THROTTLE_REASONS)),
    ],
)
def test_conditions_name_what_throttles_the_gpu(
    monkeypatch: pytest.MonkeyPatch, reasons: int, names: set[str]
) -> None:
    fake = FakeGpu(reasons=reasons, sm_clock_mhz=1200)
    gpu = Gpu(FakeNvml(fake), fake)
    assert gpu.conditions() == GpuConditions(frozenset(names), 1200, 1980)
    assert gpu.failures == 0


def test_a_driver_that_does_not_answer_is_counted_and_raises_nowhere() -> None:
    silent = {"nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetClockInfo"}
    fake = FakeGpu(silent=silent | {"nvmlDeviceGetMaxClockInfo"})
    gpu = Gpu(FakeNvml(fake), fake)
    assert gpu.failures == 1
    assert gpu.conditions() == GpuConditions()
    assert gpu.failures == 3


def test_the_reason_bits_match_the_binding() -> None:
    pynvml = pytest.importorskip("pynvml")
    bits = {
        "power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
        "hardware_slowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
        "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
        "thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hardware_thermal": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "power_brake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    for name, bit in bits.items():
        fake = FakeGpu(reasons=bit)
        assert Gpu(FakeNvml(fake), fake).conditions().throttle == {name}
