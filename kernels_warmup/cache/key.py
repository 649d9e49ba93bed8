"""The key of compiled artifacts: everything that decides whether they can be used again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".stepspan-cache"
"""Of an archive's file name."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Everything that compiled artifacts depend on, by name. Each key has an archive of its own."""

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, parts: Mapping[str, str]) -> CacheKey:
        return cls(tuple(sorted(parts.items())))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        """The archive's name: device and torch's version, readable, then a digest of all parts."""
        parts = dict(self.parts)
        named = "-".join(filter(None, (parts.get("device"), "torch", parts.get("torch"))))
        readable = re.sub(r"[^a-z0-9.]+", "-", named.lower()).strip("-.")[:80]
        return f"{readable}-{self.digest}{SUFFIX}"


def cache_key(device: str, settings: Mapping[str, str]) -> CacheKey:
    """The key of artifacts compiled on this machine for `device` under `settings`.

    Inductor has its own, finer key for every artifact. This one decides which archive to restore,
    and keeps machine code away from processors that it was not compiled for.

    Args:
        device: torch's name: `cuda`, `cuda:0`, `cpu`.
        settings: everything else that decides what is compiled, by name. The archive contains it
            as plain text, so it must hold no secrets.
    """
    import torch

    target = torch.device(device)
    parts = {
        "torch": torch.__version__,
        "triton": _version("triton", "pytorch-triton"),
        "diffusers": _version("diffusers"),
        # Some artifacts are extension modules for this interpreter's binary interface, and all are
        # linked with this C library or an older one.
        "python": f"{sys.implementation.cache_tag} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        # For a GPU as well: inductor compiles the host code for exactly this processor.
        "instructions": f"{torch.backends.cpu.get_cpu_capability()} {_instruction_digest()}",
    }
    if target.type == "cuda":
        gpu = torch.cuda.get_device_properties(target)
        parts["device"] = gpu.name
        parts["compute capability"] = f"{gpu.major}.{gpu.minor}"
        parts["cuda"] = torch.version.cuda or torch.version.hip or "none"
    else:
        parts["device"] = _cpu_model() if target.type == "cpu" else target.type
    parts |= {f"setting {name}": value for name, value in settings.items()}
    return CacheKey.of(parts)


def _version(*names: str) -> str:
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


def _cpu_info(*names: str) -> str:
    """The first processor's value of a line with one of these names in /proc/cpuinfo, or ""."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _instruction_digest() -> str:
    """A digest that differs between processors for which a compiler chooses other instructions.

    It covers only flags of instructions that compilers choose by themselves; other flags come and
    go with the kernel's version.
    """
    flags = re.findall(
        r"\b(?:s?sse|avx|fma|f16c|bmi|abm|movbe|popcnt|vaes|gfni|amx|asimd|sve|sme|i8mm|bf16)\w*",
        _cpu_info("flags", "Features"),
    )
    return hashlib.sha256(" ".join(sorted(set(flags))).encode()).hexdigest()[:8]
