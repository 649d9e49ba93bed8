"""Describe the machine, the code, the device's state, and the rates that the device reaches.

What cannot be read, without a driver, a git checkout or `/proc`, is None and never guessed. torch
is imported inside functions.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from bench.harness.result_file import Ceilings, Code, Conditions, Environment, Side
from metrics.gpu import throttle_reasons

ROOT = Path(__file__).resolve().parents[2]

MEASURED = ("serve", "kernels_warmup", "metrics")
"""The packages whose speed is measured. Both sides of a comparison run the same bench."""

DECIDING_PACKAGES = ("torch", "triton", "diffusers", "transformers", "xformers", "torchao")
"""Libraries whose version decides the speed."""

_GPU_FIELDS = (
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_event_reasons.active",
)


def describe_machine(device: str) -> Environment:
    """Describe this machine; `device` as torch names it."""
    import torch

    on_cuda = device.startswith("cuda")
    kind: Literal["cpu", "cuda"] = "cuda" if on_cuda else "cpu"
    driver = _query_driver(device, ("driver_version",)) if on_cuda else None
    return Environment(
        device=kind,
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),  # type: ignore[arg-type]
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        gpu=torch.cuda.get_device_name(device) if on_cuda else None,
        driver=driver[0] if driver else None,
        cuda=torch.version.cuda if on_cuda else None,
    )


def machine_slug(device: str) -> str:
    """A short name of the machine for file names: `h200`, `a100`, `cpu`."""
    if not device.startswith("cuda"):
        return "cpu"
    import torch

    name = torch.cuda.get_device_name(device).lower()
    model = re.search(r"\b(?:[a-z]{1,3}\d{2,4}[a-z]{0,2}|rtx \d+)\b", name)
    return re.sub(r"[^a-z0-9]+", "-", model[0] if model else name).strip("-")


def describe_code(side: Side, root: Path = ROOT, commit: str | None = None) -> Code:
    """The commit checked out at `root`, and the versions of its libraries.

    Args:
        commit: the measured commit, where there is no git checkout.
    """
    status = git(root, "status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
    return Code(
        side=side,
        commit=commit or git(root, "rev-parse", "HEAD"),
        dirty=bool(status),
        versions={
            name: found for name in DECIDING_PACKAGES if (found := _version(name)) is not None
        },
        source=source_digest(root, MEASURED),
    )


def source_digest(root: Path, packages: Sequence[str]) -> str:
    """A short digest of the names and contents of these packages' Python files."""
    digest = hashlib.sha256()
    for path in sorted(file for name in packages for file in (root / name).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def where(device: str) -> dict[str, Any]:
    """The machine, the code and the time, for results that are plain JSON."""
    code = describe_code("head")
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": asdict(describe_machine(device)),
        "commit": code.commit,
        "dirty": code.dirty,
        "versions": code.versions,
    }


def conditions(device: str) -> Conditions:
    """The present state of the machine."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    values = _query_driver(device, _GPU_FIELDS) if device.startswith("cuda") else None
    if values is None:
        return Conditions(at_ns=time.time_ns(), load_average=load)
    numbers = [_number(value) for value in values[:5]]
    reasons = _bits(values[5])
    return Conditions(
        at_ns=time.time_ns(),
        sm_clock_mhz=numbers[0],
        memory_clock_mhz=numbers[1],
        power_watts=numbers[2],
        power_limit_watts=numbers[3],
        temperature_celsius=numbers[4],
        throttle_reasons=throttle_reasons(reasons),
        load_average=load,
    )


def measure_ceilings(device: str) -> Ceilings:
    """Measure the sustained rates of large matrix products, by dtype, and of a large copy."""
    import torch

    on_cuda = device.startswith("cuda")
    side, repeats = (8192, 100) if on_cuda else (1024, 4)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if on_cuda:
        dtypes |= {"float16": torch.float16}
    rates: dict[str, float] = {}
    for name, dtype in dtypes.items():
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in "ab")

        def product(left: Any = left, right: Any = right) -> Any:
            return left @ right

        fewer = repeats // 5 if dtype == torch.float32 and on_cuda else repeats
        rates[name] = 2 * side**3 / _seconds(product, device, fewer) / 1e12
    if on_cuda and (fp8 := _fp8_product(device, side)) is not None:
        rates["fp8"] = 2 * side**3 / _seconds(fp8, device, repeats) / 1e12
    source = torch.empty(2**31 if on_cuda else 2**26, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device, repeats // 2)
    return Ceilings(
        matmul_tflops={name: float(f"{rate:.4g}") for name, rate in rates.items()},
        copy_gb_per_second=float(f"{2 * source.numel() / copy / 1e9:.4g}"),
    )


def _fp8_product(device: str, side: int) -> Callable[[], Any] | None:
    """A product of fp8 matrices with one scale each; None if the GPU has no fp8 units."""
    import torch

    if torch.cuda.get_device_capability(device) < (8, 9):
        return None
    left, right = (
        torch.randn(side, side, device=device).clamp(-1, 1).to(torch.float8_e4m3fn) for _ in "ab"
    )
    one = torch.ones((), device=device)

    def product() -> Any:
        return torch._scaled_mm(
            left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return product


def _seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds a call: the median of three series on a CPU, one sustained series on a GPU."""
    import torch

    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / repeats
    series = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        series.append((time.perf_counter() - began) / repeats)
    return statistics.median(series)


def _query_driver(device: str, fields: tuple[str, ...]) -> list[str] | None:
    """What nvidia-smi reports of the GPU that torch calls `device`; None without a driver."""
    index = int(device.split(":")[1]) if ":" in device else 0
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = visible[index] if index < len(visible) and visible[index] else str(index)
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", f"--id={name}", *query]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in ended.stdout.partition("\n")[0].split(",")]
    return values if len(values) == len(fields) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _bits(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        return 0


def cpu_name() -> str:
    """The name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match[1].strip() if match else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(root: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails."""
    try:
        ended = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return ended.stdout.strip()
