"""The allocator's arenas: what a process keeps of memory that its threads have freed."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from serve.engine.build import MOST_ARENAS
from tests.support.processes import ROOT, clean_environment

ARENAS = """
import ctypes, re, sys, threading
if sys.argv[1] == "limited":
    from serve.engine.build import limit_arenas
    limit_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
all_have = threading.Barrier(13)
def work():
    libc.malloc(1000)
    all_have.wait()
threads = [threading.Thread(target=work) for _ in range(12)]
for thread in threads: thread.start()
all_have.wait()
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
print(len(re.findall("<heap nr", open(sys.argv[2]).read())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_threads_share_few_arenas(tmp_path: object) -> None:
    counts = {}
    for how in ("limited", "as it is"):
        command = [sys.executable, "-c", ARENAS, how, f"{tmp_path}/info.xml"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, env=clean_environment()
        )
        counts[how] = int(done.stdout)
    assert counts["limited"] <= MOST_ARENAS < counts["as it is"]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.engine import build

    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    build.limit_arenas()
