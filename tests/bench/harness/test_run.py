"""`python -m bench run` on the demo model: its samples, its lock, and two commits in one run."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import run
from bench.__main__ import COMMANDS, main
from bench.errors import BenchError
from bench.harness import environment
from bench.harness.device_lock import only_bench_on
from bench.harness.environment import ROOT
from bench.harness.result_file import BenchResult
from bench.harness.worktree import worktree
from tests.support import forked

SMALL = ["--model", "demo", "--device", "cpu", "--steps", "2"]


def test_every_sample_of_a_run_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    names = ["documented", "served", "graph", "int8", "batch-2"]
    arguments = ["run", "--scenario", *names, *SMALL, "--requests", "4", "--rounds", "2"]
    assert main([*arguments, "--price-per-hour", "3.6", "--out", str(out)]) == 0
    result = BenchResult.read(out)
    assert not result.partial
    assert result.workload.shape == "128x128"
    measured = result.of_side("head")
    assert list(measured) == ["documented", "served", "int8", "batch-2"]
    for scenario in measured.values():
        assert [request.round for request in scenario.requests] == [0, 0, 1, 1]
        assert len(scenario.warmups) == 2
        assert scenario.flops is not None
        for request in scenario.requests:
            assert request.first_step_ms + sum(request.steps_ms) <= request.total_ms
            assert request.stages_ms["denoise"] <= request.total_ms
            assert request.cpu_ms is not None
    assert measured["documented"].calibration
    assert not measured["served"].calibration
    # On a CPU these compute the very same float32.
    assert measured["documented"].error_vs_fp32 == measured["served"].error_vs_fp32 == 0
    assert 1e-3 < (measured["int8"].error_vs_fp32 or 0) < 0.1
    assert measured["int8"].lossy
    assert measured["batch-2"].images == 2
    one, two = measured["served"].flops, measured["batch-2"].flops
    assert one is not None
    assert two is not None
    assert two.step == 2 * one.step
    (not_run,) = result.not_run
    assert not_run.name == "graph"
    assert "CUDA" in not_run.reason
    assert result.environment.cpu
    assert result.sessions[0].end is not None
    printed = capsys.readouterr().out
    assert re.search(r"^served +\d+\.\d+ +[+-]\d", printed, re.MULTILINE)
    assert "graph: it needs a CUDA device" in printed

    # The same file, continued: what it has is not measured again.
    more = ["run", "--scenario", "documented", "channels-last", *SMALL, "--requests", "4"]
    assert main([*more, "--rounds", "2", "--resume", "--out", str(out)]) == 0
    longer = BenchResult.read(out)
    assert [(s.first_round, s.rounds) for s in longer.sessions] == [(0, 2), (2, 2)]
    assert len(longer.of_side("head")) == 5
    added = longer.of_side("head")["channels-last"]
    assert {request.round for request in added.requests} == {2, 3}
    assert 0 <= (added.error_vs_fp32 or 0) < 1e-5
    # The baseline is timed again, so that the sessions can be compared.
    assert {r.round for r in longer.of_side("head")["documented"].requests} == {0, 1, 2, 3}
    assert len(longer.of_side("head")["served"].requests) == 4

    # A file of another workload is not continued.
    other = ["run", "--scenario", "diffusers", *SMALL[:-1], "3", "--resume", "--out", str(out)]
    assert main(other) == 2
    assert "steps was 2 and is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--scenario", "no-such"],
            "there is no scenario 'no-such'; use one of documented, diffusers",
        ),
        (["--steps", "1"], "1 steps are not enough"),
        (["--shape", "100"], "'100' is not an image size"),
        (["--model", "no-such-model", "--shape", "64x64"], "neither a directory here nor a hub"),
        (["--requests", "0"], "--requests and --rounds"),
        (["--requests", "2", "--rounds", "3"], "no more rounds than requests"),
        (["--price-per-hour", "0"], "--price-per-hour must be above 0"),
        (["--resume"], "--resume needs --out"),
        (["--base", "no-such-commit", "--model", "demo"], "there is no commit 'no-such-commit'"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_file_that_exists_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    out.write_text("precious")
    assert main(["run", *SMALL, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert out.read_text() == "precious"


def test_nothing_measured_is_an_error_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["run", "--scenario", "graph", *SMALL, "--out", str(out)]) == 2
    assert "graph: it needs a CUDA device" in capsys.readouterr().err
    assert not out.exists()


# Locks and processes -----------------------------------------------------------------------------


def test_two_benches_on_one_device_are_refused() -> None:
    with only_bench_on("cuda:0"):
        with pytest.raises(
            BenchError, match=f"another bench runs on cuda:0 .process {os.getpid()}"
        ):
            only_bench_on("cuda:0").__enter__()
        with only_bench_on("cpu"):
            pass
    with only_bench_on("cuda:0"):
        pass


@pytest.mark.parametrize(("held", "wanted"), [("cuda", "cuda:0"), ("cuda:0", "cuda")])
def test_a_device_has_one_lock_by_any_name(held: str, wanted: str) -> None:
    with only_bench_on(held):
        with pytest.raises(BenchError), only_bench_on(wanted):
            pass
        with only_bench_on("cuda:1"):
            pass


UNLOCKED = {"session", "launches", "compare", "show", "load", "capacity"}
"""Commands that compute nothing on a device themselves, or do not know on which."""
NEEDED = {
    "run": ["--model", "demo"],
    "precompile": ["--scenario", "served", "--model", "demo"],
    "numerics": ["--scenario", "served", "--model", "demo"],
    "kernels": ["--scenario", "served", "--model", "demo"],
    "operators": ["--model", "demo"],
    "bare": ["--model", "demo"],
}


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - UNLOCKED))
def test_each_command_that_computes_on_a_device_holds_its_lock(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with only_bench_on("cpu"):
        assert main([name, *NEEDED.get(name, [])]) == 2
    assert f"process {os.getpid()}" in capsys.readouterr().err


def test_the_lock_of_a_dead_process_is_released() -> None:
    code = (
        "import os; from bench.harness.device_lock import only_bench_on\n"
        "held = only_bench_on('cpu'); held.__enter__(); os._exit(1)"
    )
    held = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert held.returncode == 1
    with only_bench_on("cpu"):
        pass


@pytest.mark.e2e
def test_sigterm_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["run", "--scenario", "served", *SMALL, "--requests", "2000", "--out", str(out)]
    own_locks = {"XDG_RUNTIME_DIR": os.environ["XDG_RUNTIME_DIR"]}
    with forked.program("bench", *command, environment=own_locks) as bench:
        # At first it is created and removed, to see whether it can be written.
        while not out.exists() or out.stat().st_size == 0:
            assert bench.process.poll() is None, bench.output()
            time.sleep(0.05)
        bench.terminate(20)
        assert bench.process.returncode == 143
    result = BenchResult.read(out)
    assert result.partial
    assert result.scenarios[0].requests


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own with this code in it, and commits that cannot be measured."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    place = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for package in (*environment.MEASURED, "bench"):
        shutil.copytree(ROOT / package, place / package, ignore=ignored)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
        subprocess.run(["git", *identity, *arguments], cwd=place, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-qm", "whole")
    git("tag", "whole")
    runtime = place / "serve" / "engine" / "build.py"
    text = runtime.read_text()
    runtime.write_text("raise ImportError('half a change')\n")
    git("commit", "-qam", "broken")
    git("tag", "broken")
    git("rm", "-rqf", "kernels_warmup")
    git("commit", "-qam", "empty")
    git("tag", "empty")
    git("checkout", "-q", "whole")
    runtime.write_text(text + "\n\ndef build_runtime() -> None:\n    return None\n")
    git("commit", "-qam", "other entry points")
    git("tag", "other-entry-points")
    git("checkout", "-q", "whole")
    git("mv", "serve/engine/build.py", "serve/build.py")
    git("rm", "-rqf", "serve/engine")
    git("commit", "-qam", "without serve/engine")
    git("tag", "without-engine")
    git("checkout", "-q", "whole")
    assert runtime.read_text() == text
    return place


def worktrees(place: Path) -> int:
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=place, capture_output=True, text=True, check=True
    )
    return len(listed.stdout.splitlines())


@pytest.mark.e2e
@pytest.mark.slow
def test_two_commits_are_timed_in_the_same_rounds(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", clone)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out.json"
    command = ["run", "--scenario", "served", *SMALL, "--requests", "2", "--base", "whole"]
    assert main([*command, "--out", str(out)]) == 0
    result = BenchResult.read(out)
    assert result.sides == ("base", "head")
    base, head = (result.of_side(side)["served"] for side in result.sides)
    assert [r.round for r in base.requests] == [r.round for r in head.requests] == [0, 1]
    codes = {code.side: code for code in result.code}
    assert codes["base"].commit == codes["head"].commit
    assert not codes["base"].dirty
    assert worktrees(clone) == 1


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("broken", "base commit cannot be measured.*half a change"),
        ("other-entry-points", "base commit cannot be measured.*build_runtime.*prepare"),
        ("empty", "base commit [0-9a-f]{12} cannot be measured.*kernels_warmup/"),
        ("without-engine", "base commit [0-9a-f]{12} cannot be measured.*serve/engine/"),
    ],
)
def test_a_base_that_cannot_be_measured_is_one_sentence(
    clone: Path, revision: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", clone)
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    options = parser.parse_args(["--scenario", "served", *SMALL, "--base", revision])
    with pytest.raises(BenchError, match=said) as refused:
        run.run(options)
    assert "\n" not in str(refused.value)
    assert worktrees(clone) == 1


def test_a_worktree_is_removed_whatever_happens_in_it(clone: Path) -> None:
    def interrupted() -> None:
        nonlocal place
        with worktree("whole", clone) as (place, _):
            assert (place / "bench" / "run.py").exists()
            assert worktrees(clone) == 2
            raise KeyboardInterrupt

    place = clone
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not place.exists()
    assert worktrees(clone) == 1


def test_a_base_needs_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="needs a git checkout"):
        worktree("main", tmp_path).__enter__()


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys, bench.__main__ as b\n"
        "for name in ('run', 'overhead', 'coldstart', 'micro', 'peers', 'bare'):\n"
        "    try: b.main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode == 0
