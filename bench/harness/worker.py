"""The worker protocol: load one commit's scenarios, time them, and release them.

`LocalWorker` runs the code imported in this process. `WorkerProcess` starts `python -m
bench.harness.worker` in another commit's directory and sends it the same calls, one JSON object a
line over a pipe. The bench uses both through `BenchWorker`, so a run of one commit and a comparison
of two run the same code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import TypeAdapter

from bench.errors import BenchError
from bench.harness.result_file import Code, Flops, RequestSample, Side
from bench.harness.scenarios import Scenario, chosen

if TYPE_CHECKING:
    from bench.harness.drive import LoadedScenario
    from bench.harness.torch_state import LibrarySettings
    from bench.harness.work import Work

WARMUPS = 2
"""Requests of a scenario before its first round, in which caches fill and clocks rise."""


@dataclass(frozen=True)
class Ready:
    """What preparing a scenario took, and what was measured of it before the rounds."""

    dtype: str
    """Of the UNet, or its quantization."""
    prepare_seconds: float
    warmups: tuple[RequestSample, ...]
    error_vs_fp32: float | None
    flops: Flops
    peak_memory_bytes: int | None
    held_bytes: int
    """Device memory that the scenario holds until it is released."""


class BenchWorker(Protocol):
    """Runs the scenarios of one side."""

    side: Side

    def code(self) -> Code:
        """The commit and the library versions that run here."""

    def prepare(self, scenario: Scenario) -> Ready:
        """Load and warm a scenario, and keep it. Raises CannotRun or ScenarioFailed."""

    def measure(self, name: str, round_number: int, seeds: list[int]) -> list[RequestSample]:
        """Time one request for each seed. Raises ScenarioFailed."""

    def release(self, names: list[str]) -> None:
        """Free the memory of these scenarios."""

    def free_bytes(self) -> int:
        """Free memory of the device."""

    def close(self) -> None:
        """Release everything and stop."""


# In this process ---------------------------------------------------------------------------------


class LocalWorker:
    """A worker in this process."""

    def __init__(self, work: Work, side: Side = "head", commit: str | None = None) -> None:
        from bench.harness.references import References
        from bench.harness.torch_state import LibrarySettings

        self.side: Side = side
        self._work = work
        self._commit = commit
        self._runner = asyncio.Runner()
        self._references = References(work)
        self._defaults = LibrarySettings()
        self._loaded: dict[str, tuple[LoadedScenario, LibrarySettings]] = {}
        self._flops: dict[int, Flops] = {}

    def code(self) -> Code:
        from bench.harness.environment import describe_code

        return describe_code(self.side, commit=self._commit)

    def prepare(self, scenario: Scenario) -> Ready:
        from bench.harness.drive import load_scenario
        from bench.harness.references import count_flops
        from bench.harness.torch_state import (
            LibrarySettings,
            device_memory,
            peak_memory,
            release_memory,
        )
        from bench.harness.work import ScenarioFailed, dtype_name, one_line

        work = self._work
        self._defaults.apply()
        dtype = dtype_name(scenario, work)
        self._check(scenario, dtype)
        peak_memory(work.device)
        in_use, free = device_memory(work.device)
        began = time.perf_counter()
        loaded = load_scenario(scenario, work, self._runner)
        seconds = time.perf_counter() - began
        try:
            warmups = tuple(loaded.request(seed, 0) for seed in range(WARMUPS))
            peak = peak_memory(work.device) - in_use if work.on_cuda else None
            error = self._references.error(loaded, dtype)
            if scenario.images not in self._flops:
                self._flops[scenario.images] = count_flops(loaded, work, scenario.images)
        except Exception as failure:
            loaded.close()
            raise ScenarioFailed(one_line(failure)) from failure
        release_memory()
        self._loaded[scenario.name] = loaded, LibrarySettings()
        return Ready(
            dtype=dtype if scenario.quantize == "none" else scenario.quantize,
            prepare_seconds=seconds,
            warmups=warmups,
            error_vs_fp32=error,
            flops=self._flops[scenario.images],
            peak_memory_bytes=peak,
            held_bytes=max(0, self._held_since(in_use, free)),
        )

    def _check(self, scenario: Scenario, dtype: str) -> None:
        """Check that the scenario can run, and compute its float32 reference.

        The reference comes first, while the scenario's own weights are not in memory yet.
        """
        from bench.harness.work import ScenarioFailed, check_can_run, one_line
        from serve.errors import ModelError

        check_can_run(scenario, self._work)
        try:
            self._references.of(dtype)
        except ModelError as error:
            # Without the model no scenario can run.
            raise BenchError(str(error)) from None
        except Exception as error:
            raise ScenarioFailed(f"its float32 reference failed with {one_line(error)}") from error

    def _held_since(self, in_use: int, free: int) -> int:
        """Device memory taken since these bytes were in use and free."""
        from bench.harness.torch_state import device_memory

        in_use_now, free_now = device_memory(self._work.device)
        # torch does not count the pool of a CUDA graph and the driver's own memory. On a CPU other
        # processes change the free memory.
        return free - free_now if self._work.on_cuda else in_use_now - in_use

    def measure(self, name: str, round_number: int, seeds: list[int]) -> list[RequestSample]:
        from bench.harness.work import ScenarioFailed, one_line

        loaded, settings = self._loaded[name]
        settings.apply()
        try:
            return [loaded.request(seed, round_number) for seed in seeds]
        except Exception as error:
            raise ScenarioFailed(one_line(error)) from error

    def release(self, names: list[str]) -> None:
        from bench.harness.torch_state import release_memory

        for name in names:
            loaded, _ = self._loaded.pop(name)
            loaded.close()
        release_memory()

    def free_bytes(self) -> int:
        from bench.harness.torch_state import device_memory

        return device_memory(self._work.device)[1]

    def close(self) -> None:
        self.release(list(self._loaded))
        self._runner.close()


# In a process of its own -------------------------------------------------------------------------


class WorkerProcess:
    """A worker in a process of its own, whose working directory holds its commit.

    Raises:
        BenchError: the commit cannot be measured, or the process ended.
    """

    def __init__(
        self, root: Path, work: Mapping[str, Any], side: Side, commit: str | None = None
    ) -> None:
        self.side: Side = side
        our_end, its_end = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        environment = os.environ | {"PYTHONPATH": _search_path(root)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.harness.worker", str(its_end)],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # A file, because a full pipe that is not read would block the process.
            stderr=self._errors,
            text=True,
            pass_fds=(its_end,),
            # The parent handles Ctrl-C.
            start_new_session=True,
        )
        os.close(its_end)
        self._replies = os.fdopen(our_end)
        try:
            self._call("open", work=dict(work), side=side, commit=commit)
        except BaseException:
            self.close()
            raise

    def code(self) -> Code:
        return TypeAdapter(Code).validate_python(self._call("code"))

    def prepare(self, scenario: Scenario) -> Ready:
        return TypeAdapter(Ready).validate_python(self._call("prepare", name=scenario.name))

    def measure(self, name: str, round_number: int, seeds: list[int]) -> list[RequestSample]:
        samples = self._call("measure", name=name, round_number=round_number, seeds=seeds)
        return TypeAdapter(list[RequestSample]).validate_python(samples)

    def release(self, names: list[str]) -> None:
        self._call("release", names=names)

    def free_bytes(self) -> int:
        free: int = self._call("free_bytes")
        return free

    def close(self) -> None:
        process = self._process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdin is not None
        for stream in (process.stdin, self._errors, self._replies):
            with contextlib.suppress(OSError):
                stream.close()

    def _call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the process's worker; returns its result as JSON has it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"method": method, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._replies.readline()
        if not line:
            raise BenchError(self._why_ended(method))
        reply = json.loads(line)
        if "error" in reply:
            raise BenchError(f"the {self.side} commit cannot be measured: {reply['error']}")
        if "cannot_run" in reply:
            from bench.harness.work import CannotRun, ScenarioFailed

            raise (ScenarioFailed if reply["failed"] else CannotRun)(reply["cannot_run"])
        return reply["result"]

    def _why_ended(self, method: str) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        reason = lines[-1][:300] if lines else f"it exited with status {status}"
        if method == "open":
            return (
                f"the {self.side} commit cannot be measured: its code cannot be imported ({reason})"
            )
        return f"the process of the {self.side} commit ended during `{method}` ({reason})"


def _search_path(root: Path) -> str:
    """PYTHONPATH with the commit's packages before any installed ones."""
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return os.pathsep.join([str(root), *others])


def main(arguments: list[str]) -> int:
    """Answer calls from standard input until it closes."""
    replies = os.fdopen(int(arguments[0]), "w")
    worker: LocalWorker | None = None

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    for line in sys.stdin:
        call = json.loads(line)
        method = call.pop("method")
        try:
            if method == "open":
                worker = _open(**call)
                reply(result=None)
            else:
                assert worker is not None
                _answer(worker, method, call, reply)
        except BenchError as error:
            reply(error=str(error))
    if worker is not None:
        worker.close()
    return 0


def _open(work: dict[str, Any], side: Side, commit: str | None) -> LocalWorker:
    from bench.harness.drive import check_entry_points
    from bench.harness.work import Work
    from kernels_warmup.shapes import CompiledShape

    check_entry_points()
    shape = CompiledShape.parse(work.pop("shape"))
    return LocalWorker(Work(shape=shape, **work), side, commit)


def _answer(
    worker: LocalWorker, method: str, arguments: dict[str, Any], reply: Callable[..., None]
) -> None:
    from bench.harness.work import CannotRun, ScenarioFailed

    try:
        if method == "prepare":
            (scenario,) = chosen([arguments["name"]])
            reply(result=asdict(worker.prepare(scenario)))
        elif method == "measure":
            reply(result=[asdict(sample) for sample in worker.measure(**arguments)])
        elif method == "code":
            reply(result=asdict(worker.code()))
        else:
            reply(result=getattr(worker, method)(**arguments))
    except CannotRun as reason:
        reply(cannot_run=str(reason), failed=isinstance(reason, ScenarioFailed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
