"""The GPU's metrics, against a driver that answers, lacks a figure, fails later or hangs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from metrics.catalogue import GenerationMetrics, render
from metrics.gpu import Gpu
from metrics.gpu_metrics import GpuMetrics, MemoryUse
from tests.metrics.fake_nvml import FakeGpu, FakeNvml
from tests.metrics.test_catalogue import OPENMETRICS, declared

MEMORY = MemoryUse(allocated=10 * 2**30, reserved=12 * 2**30, peak=11 * 2**30)


class Shown:
    """A service's metrics with a GPU's."""

    def __init__(self, gpu: FakeGpu, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.now = 0.0
        self.gpu = gpu
        self.nvml = nvml
        self.metrics: GenerationMetrics = declared(CollectorRegistry())
        self.collector = GpuMetrics(
            Gpu.open("cuda"),
            lambda: MEMORY,
            lambda: self.metrics.fault("nvml"),
            monotonic=lambda: self.now,
        )
        self.metrics.show(self.collector)

    def value(self, metric: str, /, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"sdxl_gpu_{metric}", labels)

    def names(self) -> set[str]:
        return {
            family.name.removeprefix("sdxl_gpu_")
            for family in self.metrics.registry.collect()
            if family.name.startswith("sdxl_gpu_")
        }

    @property
    def faults(self) -> float | None:
        return self.metrics.registry.get_sample_value(
            "sdxl_telemetry_faults_total", {"fault": "nvml"}
        )


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    gpu = FakeGpu(reasons=0x24)  # the power cap, and heat
    return Shown(gpu, FakeNvml(gpu), monkeypatch)


def test_every_figure_of_a_gpu(shown: Shown) -> None:
    shown.collector.read()
    shown.collector.read()
    assert shown.value("info", name="NVIDIA H100", uuid=shown.gpu.uuid) == 1
    assert shown.value("memory_allocated_bytes") == MEMORY.allocated
    assert shown.value("memory_reserved_bytes") == MEMORY.reserved
    assert shown.value("memory_peak_bytes") == MEMORY.peak
    assert shown.value("memory_used_bytes") == 20 * 2**30
    assert shown.value("memory_total_bytes") == 80 * 2**30
    assert shown.value("utilization_ratio") == pytest.approx(0.97)
    assert shown.value("tensor_activity_ratio") == pytest.approx(0.6)
    assert shown.value("sm_activity_ratio") == pytest.approx(0.9)
    assert shown.value("power_watts") == 650
    assert shown.value("temperature_celsius") == 55
    assert shown.value("clock_hertz", domain="sm") == 1980e6
    assert shown.value("max_clock_hertz", domain="sm") == 1980e6
    assert shown.value("throttled", reason="thermal") == 1
    assert shown.value("throttled", reason="power_cap") == 1
    assert shown.value("throttled", reason="power_brake") == 0
    assert shown.faults == 0


def test_without_a_gpu_everything_is_absent_and_not_zero() -> None:
    metrics = declared(CollectorRegistry())
    collector = GpuMetrics(None, lambda: None, lambda: metrics.fault("nvml"))
    metrics.show(collector)
    collector.start()
    collector.stop()
    body, _ = render(metrics.registry, OPENMETRICS)
    assert b"sdxl_gpu" not in body


def test_without_the_binding_torchs_memory_is_shown() -> None:
    metrics = declared(CollectorRegistry())
    metrics.show(GpuMetrics(None, lambda: MEMORY, lambda: metrics.fault("nvml")))
    names = {family.name for family in metrics.registry.collect()}
    shown = {name for name in names if name.startswith("sdxl_gpu")}
    kinds = ("allocated", "reserved", "peak")
    assert shown == {f"sdxl_gpu_memory_{kind}_bytes" for kind in kinds}


def test_what_a_gpu_does_not_have_is_absent_and_no_fault(shown: Shown) -> None:
    shown.gpu.has_gpm = False
    shown.gpu.silent.add("nvmlDeviceGetUtilizationRates")
    shown.collector.read()
    shown.collector.read()
    missing = {"tensor_activity_ratio", "sm_activity_ratio", "utilization_ratio"}
    assert missing.isdisjoint(shown.names())
    assert "power_watts" in shown.names()
    assert shown.faults == 0


def test_a_driver_that_fails_midway_is_counted_and_leaves_the_rest(shown: Shown) -> None:
    shown.collector.read()
    shown.gpu.silent |= {"nvmlDeviceGetPowerUsage", "nvmlGpmMetricsGet"}
    shown.collector.read()
    assert shown.faults == 2
    assert "power_watts" not in shown.names()
    assert "tensor_activity_ratio" not in shown.names()
    assert shown.value("temperature_celsius") == 55
    body, _ = render(shown.metrics.registry, OPENMETRICS)
    assert list(text_string_to_metric_families(body.decode()))
    shown.gpu.silent.clear()
    shown.collector.read()
    assert shown.value("power_watts") == 650
    assert shown.value("tensor_activity_ratio") == pytest.approx(0.6)
    assert shown.nvml.samples_held == 1


def test_activity_is_that_between_two_readings(shown: Shown) -> None:
    """NVML has no figures for two samples that are less than 100 ms apart, as in one reading."""
    shown.gpu.silent.add("nvmlGpmMetricsGet")
    shown.collector.read()
    assert {"tensor_activity_ratio", "sm_activity_ratio"}.isdisjoint(shown.names())
    shown.gpu.silent.clear()
    shown.collector.read()
    assert shown.value("tensor_activity_ratio") == pytest.approx(0.6)
    assert shown.value("sm_activity_ratio") == pytest.approx(0.9)
    assert shown.faults == 0


def test_samples_of_activity_are_freed(shown: Shown) -> None:
    for _ in range(5):
        shown.collector.read()
    assert shown.nvml.samples_held == 1
    shown.gpu.silent.add("nvmlGpmSampleGet")
    shown.collector.read()
    assert shown.nvml.samples_held == 1


def test_a_binding_that_raises_anything_breaks_nothing(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown.collector.read()

    def broken(*_: Any) -> Any:
        raise OSError("the library went away")

    monkeypatch.setattr(shown.nvml, "nvmlDeviceGetTemperatureV", broken, raising=False)
    shown.collector.read()
    assert "temperature_celsius" not in shown.names()
    assert shown.faults == 1


def test_a_stale_reading_is_not_shown(shown: Shown) -> None:
    shown.collector.read()
    shown.now += 60
    assert shown.value("power_watts") is None
    assert shown.value("memory_allocated_bytes") == MEMORY.allocated
    assert shown.faults is not None
    assert shown.faults > 0


@pytest.fixture
def watching(shown: Shown) -> Iterator[Shown]:
    yield shown
    shown.collector.stop()
    assert shown.collector._thread is not None
    shown.collector._thread.join(10)
    assert not shown.collector._thread.is_alive()


def test_a_driver_that_hangs_does_not_delay_a_scrape(
    watching: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, released = threading.Event(), threading.Event()

    def hang(*_: Any) -> Any:
        hanging.set()
        released.wait(30)
        return 1

    monkeypatch.setattr(watching.nvml, "nvmlDeviceGetPowerUsage", hang, raising=False)
    watching.collector.start()
    assert hanging.wait(10)
    body, _ = render(watching.metrics.registry, OPENMETRICS)
    assert b"sdxl_gpu_info" in body
    assert b"sdxl_gpu_power_watts" not in body
    watching.now += 60
    assert watching.value("info", name="NVIDIA H100", uuid=watching.gpu.uuid) == 1
    assert watching.faults
    released.set()


def test_the_thread_reads_at_once_and_frees_its_samples(watching: Shown) -> None:
    watching.collector.start()
    watching.collector.start()
    for _ in range(1000):
        if watching.value("power_watts") == 650:
            break
        threading.Event().wait(0.01)
    assert watching.value("power_watts") == 650
    watching.collector.stop()
    assert watching.collector._thread is not None
    watching.collector._thread.join(10)
    assert watching.nvml.samples_held == 0
