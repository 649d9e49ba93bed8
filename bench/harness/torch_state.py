"""State that torch keeps for the whole process: compiler and library settings, and memory.

torch is imported inside functions.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path


def compiler_settings() -> dict[str, object]:
    """Every setting of dynamo and inductor by name, as the calling thread sees them."""
    import torch._dynamo.config
    import torch._inductor.config

    found: dict[str, object] = {}
    for module in (torch._dynamo.config, torch._inductor.config):
        copied = module.get_config_copy()
        found |= {f"{module.__name__}.{name}": value for name, value in copied.items()}
    return found


def check_settings_unchanged(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    """Raise RuntimeError if a setting changed.

    A changed setting would change how the next scenario compiles, and the two could not be
    compared.
    """
    changed = sorted(name for name in after if before.get(name) != after[name])
    if changed:
        raise RuntimeError(f"it changed the compiler's settings: {', '.join(changed)}")


class LibrarySettings:
    """torch's settings for the whole process, as they were when this object was made.

    Preparing a compiled model changes some of them. The baselines run with torch's defaults.
    """

    def __init__(self) -> None:
        import torch

        self._compiler = compiler_settings()
        self._benchmark = torch.backends.cudnn.benchmark
        self._tf32 = torch.backends.cudnn.allow_tf32
        self._matmul_tf32 = torch.backends.cuda.matmul.allow_tf32

    def apply(self) -> None:
        """Set them again."""
        import torch

        for name, value in compiler_settings().items():
            if value != self._compiler[name]:
                module, _, setting = name.partition(".config.")
                setattr(sys.modules[f"{module}.config"], setting, self._compiler[name])
        torch.backends.cudnn.benchmark = self._benchmark
        torch.backends.cudnn.allow_tf32 = self._tf32
        torch.backends.cuda.matmul.allow_tf32 = self._matmul_tf32


def device_memory(device: str) -> tuple[int, int]:
    """Bytes in use (by torch on a GPU, by the process on a CPU) and bytes free on the device."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo").read_text()
    available = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    return resident, int(available.split()[1]) * 1024


def peak_memory(device: str) -> int:
    """The most bytes in use since the previous call; 0 on a CPU."""
    import torch

    if not device.startswith("cuda"):
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def release_memory() -> None:
    """Free the memory that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
