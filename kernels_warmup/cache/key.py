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
    """What compiled artifacts depend on, by name; archives of other keys are left alone."""

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, parts: Mapping[str, str]) -> CacheKey:
        return cls(tuple(sorted(parts.items())))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        """The device and torch's version for whoever lists the folder, the digest for the rest."""
        parts = dict(self.parts)
        named = "-".join(filter(None, (parts.get("device"), "torch", parts.get("torch"))))
        readable = re.sub(r"[^a-z0-9.]+", "-", named.lower()).strip("-.")[:80]
        return f"{readable}-{self.digest}{SUFFIX}"


def cache_key(device: str, settings: Mapping[str, str]) -> CacheKey:
    """The key of artifacts compiled here for `device` under `settings`.

    Inductor has keys of its own for every artifact, which know all of this and more; this one says
    which archive is worth restoring, and keeps machine code from a processor it was not made for.

    Args:
        device: as torch names it: `cuda`, `cuda:0`, `cpu`.
        settings: whatever else decides what is compiled, by name; kept readable in the archive, so
            no secrets.
    """
    import torch

    place = torch.device(device)
    parts = {
        "torch": torch.__version__,
        "triton": _version("triton", "pytorch-triton"),
        "diffusers": _version("diffusers"),
        # Some of what is compiled are modules of this interpreter's binary interface, and all of
        # it is linked with this C library or an older one.
        "python": f"{sys.implementation.cache_tag} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        # On a GPU too: inductor compiles the host's part for exactly this processor.
        "instructions": f"{torch.backends.cpu.get_cpu_capability()} {_instruction_digest()}",
    }
    if place.type == "cuda":
        gpu = torch.cuda.get_device_properties(place)
        parts["device"] = gpu.name
        parts["compute capability"] = f"{gpu.major}.{gpu.minor}"
        parts["cuda"] = torch.version.cuda or torch.version.hip or "none"
    else:
        parts["device"] = _cpu_model() if place.type == "cpu" else place.type
    parts |= {f"setting {name}": value for name, value in settings.items()}
    return CacheKey.of(parts)


def _version(*names: str) -> str:
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


def _cpu_info(*names: str) -> str:
    """The first processor's line of one of these names in Linux's own description, or nothing."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _instruction_digest() -> str:
    """Tells apart processors for which a compiler would choose other instructions.

    Only what compilers choose by themselves: the other flags come and go with the kernel's version.
    """
    flags = re.findall(
        r"\b(?:s?sse|avx|fma|f16c|bmi|abm|movbe|popcnt|vaes|gfni|amx|asimd|sve|sme|i8mm|bf16)\w*",
        _cpu_info("flags", "Features"),
    )
    return hashlib.sha256(" ".join(sorted(set(flags))).encode()).hexdigest()[:8]
