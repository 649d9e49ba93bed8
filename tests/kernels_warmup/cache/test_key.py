from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from kernels_warmup.cache import key as key_module
from kernels_warmup.cache.key import SUFFIX, CacheKey, cache_key


def test_keys_differ_by_device_version_and_setting() -> None:
    settings = {"model": "demo", "shapes": "128x128 160x96"}
    key = cache_key("cpu", settings)
    assert key == cache_key("cpu", dict(reversed(settings.items())))
    parts = dict(key.parts)
    assert parts["torch"] == torch.__version__
    assert parts["setting model"] == "demo"
    assert parts["device"]
    assert set(parts) >= {"triton", "diffusers", "python", "instructions"}
    keys = [
        key,
        cache_key("cpu", settings | {"shapes": "128x128"}),
        cache_key("cpu", settings | {"quantize": "int8"}),
        *(CacheKey.of(parts | {name: "another"}) for name in parts),
    ]
    assert len({key.digest for key in keys}) == len({key.file_name for key in keys}) == len(keys)
    for key in keys:
        assert re.fullmatch(r"[a-z0-9.-]+", key.file_name)
        assert key.file_name.endswith(SUFFIX)


def test_a_gpus_key_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    first = cache_key("cuda", {})
    assert first.file_name.startswith("nvidia-h100-80gb-hbm3-torch-2.")
    assert dict(first.parts)["compute capability"] == "9.0"
    gpu.minor = 3
    assert cache_key("cuda", {}) != first


def test_a_key_makes_a_valid_file_name_of_any_device_name() -> None:
    key = CacheKey.of({"device": "../../etc/" + "x" * 500 + "\0\n", "torch": "2"})
    assert re.fullmatch(r"[a-z0-9.-]+", key.file_name)
    assert not key.file_name.startswith(".")
    assert len(key.file_name) < 128


def test_processors_with_other_instructions_have_other_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = "fpu sse sse2 avx2 avx512f fma"
    monkeypatch.setattr(key_module, "_cpu_info", lambda *names: flags)
    key = cache_key("cpu", {})
    flags += " md_clear ibrs"  # flags of the Linux kernel that no compiler uses
    parts = dict(cache_key("cpu", {}).parts)
    assert parts["instructions"] == dict(key.parts)["instructions"]
    flags += " amx_bf16"
    assert cache_key("cpu", {}) != key
