"""The cache with processes that run at once, are killed, or start from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from kernels_warmup.cache.compile_cache import CompileCache
from kernels_warmup.cache.key import CacheKey
from kernels_warmup.cache.working_directory import (
    LEFTOVER_SECONDS,
    WorkingDirectory,
)
from tests.kernels_warmup.cache.starts import (
    command,
    compiled,
    environment,
    names,
    run,
    working,
)
from tests.support.processes import ROOT

BUSY = """
import os, sys
from pathlib import Path
from kernels_warmup.cache.compile_cache import CompileCache
from kernels_warmup.cache.key import CacheKey
key = CacheKey.of({"device": "cpu"})
writer = sys.argv[2].encode()
for turn in range(6):
    cache = CompileCache(Path(sys.argv[1]), key)
    restored = cache.restore()
    work = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    found = {path.read_bytes()[:2] for path in work.glob("*.so")}
    # A complete archive: all files of one turn of one writer, or no archive yet.
    assert restored.result == ("hit" if found else "miss"), restored
    assert len(found) <= 1 and restored.files in (0, 8), (restored, found)
    for number in range(8):
        (work / f"{number}.so").write_bytes(writer + bytes([turn]) + os.urandom(20_000))
    stored = cache.store()
    assert stored.result == "stored", stored
    cache.close()
"""


@pytest.mark.e2e
def test_ten_processes_at_once_leave_one_whole_archive(folder: Path) -> None:
    busy = [
        subprocess.Popen(
            command(BUSY, folder, number), cwd=ROOT, env=environment(), stderr=subprocess.PIPE
        )
        for number in range(10)
    ]
    for process in busy:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors.decode()
    key = CacheKey.of({"device": "cpu"})
    assert names(folder) == [key.file_name]
    cache = CompileCache(folder, key)
    assert cache.restore().files == 8
    assert len({path.read_bytes()[:2] for path in working().glob("*.so")}) == 1
    cache.close()
    assert not list(Path(tempfile.gettempdir()).iterdir())


KILLED = """
import os, sys
from pathlib import Path
from kernels_warmup.cache.compile_cache import CompileCache
from kernels_warmup.cache.key import CacheKey
cache = CompileCache(Path(sys.argv[1]), CacheKey.of({"device": "cpu"}))
cache.restore()
work = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
for number in range(40):
    (work / f"new{number}.so").write_bytes(os.urandom(1_000_000))
print(cache.store())
"""


@pytest.mark.e2e
def test_a_store_that_is_killed_leaves_the_old_archive(folder: Path) -> None:
    key = CacheKey.of({"device": "cpu"})
    cache = CompileCache(folder, key)
    cache.restore()
    compiled()
    cache.store()
    cache.close()

    process = subprocess.Popen(
        command(KILLED, folder), cwd=ROOT, env=environment(), stdout=subprocess.PIPE
    )
    while not any(path.stat().st_size > 1_000_000 for path in folder.glob(".*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == b""
    (leftover,) = folder.glob(".*.tmp")
    (abandoned,) = Path(tempfile.gettempdir()).iterdir()

    # The next start removes the dead process's directory, but no living one's.
    cache = CompileCache(folder, key)
    assert cache.restore().files == 1
    assert (working() / "ab/cab.so").read_bytes() == b"machine code"
    assert not abandoned.exists()
    beside = WorkingDirectory.create()
    assert working().exists()

    # A temporary file in the folder may still be in use until it is old enough.
    compiled(b"more", "more.so")
    assert cache.store().result == "stored"
    assert leftover.exists()
    long_ago = time.time() - LEFTOVER_SECONDS - 1
    os.utime(leftover, (long_ago, long_ago))
    compiled(b"even more", "more.so")
    assert cache.store().result == "stored"
    assert names(folder) == [cache.path.name]
    beside.remove()
    cache.close()


# The effect: no compilation.

COMPILING = """
import json, sys, time
from pathlib import Path
import torch, torch._dynamo  # sets TORCHINDUCTOR_CACHE_DIR to torch's default
from torch._dynamo.utils import counters
from kernels_warmup.cache.compile_cache import CompileCache
from kernels_warmup.cache.key import cache_key
cache = CompileCache(Path(sys.argv[1]), cache_key("cpu", {"model": "one function"}))
restored = cache.restore()
compiled = torch.compile(lambda x: torch.nn.functional.silu(x) * 2 + 1, fullgraph=True)
start = time.perf_counter()
with torch.no_grad():
    total = compiled(torch.arange(64.0)).sum().item()
seconds = time.perf_counter() - start
print(json.dumps({
    "restored": restored.result, "stored": cache.store().result, "seconds": seconds,
    "total": total, "counters": counters["inductor"],
}))
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_a_start_from_the_cache_compiles_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the probes and the header that inductor would compile first.
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    # Without the pool of compiling processes, which import torch for one function.
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    cold, kept = (json.loads(run(COMPILING, folder).stdout) for _ in range(2))
    assert (cold["restored"], cold["stored"]) == ("miss", "stored")
    assert cold["counters"]["fxgraph_cache_miss"] == 1
    # In another directory than the artifacts were made in, nothing is compiled or added.
    assert (kept["restored"], kept["stored"]) == ("hit", "unchanged")
    assert kept["counters"]["fxgraph_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in kept["counters"]
    assert kept["total"] == cold["total"]
    assert kept["seconds"] < cold["seconds"]
