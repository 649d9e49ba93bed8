"""The compiled service as a real process: ended while it compiles, and started from its cache."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import psutil
import pytest

from kernels_warmup.cache.key import SUFFIX, cache_key
from kernels_warmup.cache.working_directory import WORKING_PREFIX
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment
from tests.e2e.test_lifecycle import ENDING_SECONDS, wait_for_output
from tests.support.otlp_endpoint import OtlpEndpoint, otlp_endpoint
from tests.support.processes import ServerProcess, self_hosted

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def compiled(otlp: OtlpEndpoint, kept: Path, scratch: Path, **more: str) -> dict[str, str]:
    scratch.mkdir(exist_ok=True)
    return environment(
        otlp,
        SDXL_COMPILE="default",
        SDXL_SHAPES="128x128",
        SDXL_CACHE_DIR=str(kept),
        # The process keeps its working cache there; in a folder of its own the test can read it.
        TMPDIR=str(scratch),
        **more,
    )


def family(process: ServerProcess) -> list[psutil.Process]:
    parent = psutil.Process(process.process.pid)
    return [parent, *parent.children(recursive=True)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_while_it_compiles(tmp_path: Path) -> None:
    """No partial file is kept, no process keeps running, and the trace has the cause."""
    kept, scratch = tmp_path / "kept", tmp_path / "scratch"
    with otlp_endpoint() as otlp, self_hosted(compiled(otlp, kept, scratch)) as process:
        wait_for_output(process, "start-up: compile")
        deadline = time.monotonic() + START_SECONDS
        # inductor is at work as soon as its cache directory has a file.
        while not any(path.is_file() for path in scratch.glob(f"{WORKING_PREFIX}*/**/*")):
            assert time.monotonic() < deadline, process.output()
            time.sleep(0.05)
        everybody = family(process)
        seconds = process.terminate(60)
        assert seconds < ENDING_SECONDS
        assert process.process.returncode == 0, process.output()
        _, alive = psutil.wait_procs(everybody, timeout=20)
        assert not alive
        (warmup,) = otlp.wait_for(lambda spans: any(s.name == "warmup" for s in spans))[-1:]
        assert warmup.attributes["error.type"] == "draining"
    assert list(kept.glob("*")) == []


def start_seconds(process: ServerProcess) -> tuple[float, dict[str, object]]:
    """Seconds of its `compile` phases, and `compile` of `/ready`."""
    process.wait_until_ready(1800)
    deadline = time.monotonic() + 60
    while True:
        ready = httpx.get(process.url + "/ready", timeout=60).json()
        if "cache_store" in ready["compile"]:
            break
        assert time.monotonic() < deadline, process.output()
        time.sleep(0.1)
    phases = ready["warmup_ms"].items()
    return sum(ms for name, ms in phases if name.startswith("compile")) / 1e3, ready["compile"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_start_from_the_cache_takes_a_quarter_at_most(tmp_path: Path) -> None:
    kept, scratch = tmp_path / "kept", tmp_path / "scratch"
    seconds, compiles, images = [], [], []
    with otlp_endpoint() as otlp:
        for _ in range(2):
            with self_hosted(compiled(otlp, kept, scratch)) as process:
                took, how = start_seconds(process)
                seconds.append(took)
                compiles.append(how)
                answer = httpx.post(
                    process.url, json=body(format="png"), timeout=ANSWER_SECONDS
                ).json()
                images.append(len(answer["image"]["url"]))
                counted = httpx.get(process.url + "/metrics", timeout=60).text
                assert "\nsdxl_recompiles_total 0.0\n" in counted
                process.terminate(60)
        traces = otlp.wait_for(lambda spans: sum(s.name == "warmup" for s in spans) == 2)
    print(f"compile phases: cold {seconds[0]:.1f} s, from the cache {seconds[1]:.1f} s")
    assert [how["cache"] for how in compiles] == ["miss", "hit"]
    assert [how["cache_store"] for how in compiles] == ["stored", "unchanged"]
    assert compiles[1]["graphs_from_cache"] == compiles[1]["graphs"] == compiles[0]["graphs"]
    assert seconds[1] <= seconds[0] / 4
    phases = [span for span in traces if re.fullmatch(r"compile 128x128", span.name)]
    assert [span.attributes["cache_misses"] > 0 for span in phases] == [True, False]
    (archive,) = kept.glob(f"*{SUFFIX}")
    assert archive.stat().st_size > 100_000
    # Each process removed its working directory.
    assert list(scratch.glob(f"{WORKING_PREFIX}*")) == []
    assert images[0] == pytest.approx(images[1], rel=0.02)


@pytest.mark.slow  # tests/kernels_warmup/cache has the same damages in process
@pytest.mark.timeout(600)
@pytest.mark.parametrize("spoil", ["truncated", "foreign"])
def test_a_damaged_cache_breaks_no_start(tmp_path: Path, spoil: str) -> None:
    """The log has one line, and the start is like one without a cache.

    The test ends the process before it has compiled, which would take minutes; the cache is read
    before that.
    """
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o700)
    settings = {
        "model": "demo",
        "revision": "",
        "dtype": "torch.float32",
        "compile": "default",
        "attention": "auto",
        "quantize": "none",
    }
    path = kept / cache_key("cpu", settings).file_name
    if spoil == "truncated":
        path.write_bytes(b'{"format": 1')
    else:
        path.write_bytes(b"\x7fELF" + b"\0" * 5000)
    environment = (kept, tmp_path / "scratch")
    with otlp_endpoint() as otlp, self_hosted(compiled(otlp, *environment)) as process:
        wait_for_output(process, "start-up: compile")
        lines = process.output().splitlines()
        process.terminate(60)
    assert sum("compile cache ignored" in line for line in lines) == 1
