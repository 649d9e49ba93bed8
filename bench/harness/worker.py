"""One commit's scenarios, ready to be asked for requests: in this process, or in one of its own.

`LocalSide` drives the code that is imported here. `python -m bench.harness.worker` does the same in
a process of its own and answers over a pipe, one JSON object a line; `RemoteSide` is the caller's
end of that pipe. Both have the same methods, so a comparison of two commits and a run of one differ
in nothing else.
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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter

from bench.errors import BenchError
from bench.harness.result_file import Code, Flops, RequestSample, Side
from bench.harness.scenarios import Scenario, chosen

WARMUPS = 2
"""Requests of a scenario before its first round: caches fill, clocks rise."""


@dataclass(frozen=True)
class Ready:
    """A scenario that can be timed, and what getting it ready took."""

    dtype: str
    """The UNet's, or its quantisation."""
    prepare_seconds: float
    warmups: tuple[RequestSample, ...]
    error_vs_fp32: float | None
    flops: Flops
    peak_memory_bytes: int | None
    held_bytes: int
    """Of the device's memory, for as long as it stays."""


class Asked(Protocol):
    """What a side answers."""

    side: Side

    def code(self) -> Code:
        """What runs here."""

    def prepare(self, scenario: Scenario) -> Ready:
        """Get it ready and keep it. Raises CannotRun, or ScenarioFailed where it was tried."""

    def measure(self, name: str, round_number: int, seeds: list[int]) -> list[RequestSample]:
        """One timed request for each seed. Raises ScenarioFailed."""

    def release(self, names: list[str]) -> None:
        """Give these scenarios' memory back."""

    def free_bytes(self) -> int:
        """Of the device's memory."""

    def close(self) -> None:
        """End it."""


class LocalSide:
    """The code of this process."""

    def __init__(self, work: Any, side: Side = "head", commit: str | None = None) -> None:
        from bench.harness.drive import LibrarySettings, References

        self.side: Side = side
        self._work = work
        self._commit = commit
        self._runner = asyncio.Runner()
        self._references = References(work)
        self._defaults = LibrarySettings()
        self._driven: dict[str, tuple[Any, LibrarySettings]] = {}
        self._flops: dict[int, Flops] = {}

    def code(self) -> Code:
        from bench.harness.environment import describe_code

        return describe_code(self.side, commit=self._commit)

    def prepare(self, scenario: Scenario) -> Ready:
        from bench.harness import drive

        work = self._work
        self._defaults.apply()
        dtype = drive.dtype_name(scenario, work)
        self._check(scenario, dtype)
        drive.peak_memory(work.device)
        in_use, free = drive.device_memory(work.device)
        began = time.perf_counter()
        driven = drive.drive(scenario, work, self._runner)
        seconds = time.perf_counter() - began
        try:
            warmups = tuple(driven.request(seed, 0) for seed in range(WARMUPS))
            peak = drive.peak_memory(work.device) - in_use if work.on_cuda else None
            error = self._references.error(driven, dtype)
            if scenario.images not in self._flops:
                self._flops[scenario.images] = drive.count_flops(driven, work, scenario.images)
        except Exception as failure:
            driven.close()
            raise drive.ScenarioFailed(drive.told(failure)) from failure
        drive.release_memory()
        self._driven[scenario.name] = driven, drive.LibrarySettings()
        return Ready(
            dtype=dtype if scenario.quantize == "none" else scenario.quantize,
            prepare_seconds=seconds,
            warmups=warmups,
            error_vs_fp32=error,
            flops=self._flops[scenario.images],
            peak_memory_bytes=peak,
            held_bytes=max(0, self._held(in_use, free)),
        )

    def _check(self, scenario: Scenario, dtype: str) -> None:
        """Whether it can run here, and its reference, while no weights of its own are in memory."""
        from bench.harness.drive import ScenarioFailed, refuse_what_cannot_run, told
        from serve.errors import ModelError

        refuse_what_cannot_run(scenario, self._work)
        try:
            self._references.of(dtype)
        except ModelError as error:
            # No scenario can do without a model.
            raise BenchError(str(error)) from None
        except Exception as error:
            raise ScenarioFailed(f"its float32 reference failed with {told(error)}") from error

    def _held(self, in_use: int, free: int) -> int:
        """How much more is held than when that was in use and free."""
        from bench.harness.drive import device_memory

        in_use_now, free_now = device_memory(self._work.device)
        # A graph's pool and the driver's own are not in torch's count; a host's free memory is
        # not ours alone.
        return free - free_now if self._work.on_cuda else in_use_now - in_use

    def measure(self, name: str, round_number: int, seeds: list[int]) -> list[RequestSample]:
        from bench.harness.drive import ScenarioFailed, told

        driven, settings = self._driven[name]
        settings.apply()
        try:
            return [driven.request(seed, round_number) for seed in seeds]
        except Exception as error:
            raise ScenarioFailed(told(error)) from error

    def release(self, names: list[str]) -> None:
        for name in names:
            driven, _ = self._driven.pop(name)
            driven.close()
        from bench.harness.drive import release_memory

        release_memory()

    def free_bytes(self) -> int:
        from bench.harness.drive import device_memory

        return device_memory(self._work.device)[1]

    def close(self) -> None:
        self.release(list(self._driven))
        self._runner.close()


class RemoteSide:
    """A side in a process of its own, whose working directory holds its commit.

    Raises:
        BenchError: it ended, or said nothing that can be understood.
    """

    def __init__(
        self, root: Path, work: Mapping[str, Any], side: Side, commit: str | None = None
    ) -> None:
        self.side: Side = side
        ours, theirs = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        environment = os.environ | {"PYTHONPATH": _search_path(root)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.harness.worker", str(theirs)],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # A file: nobody reads along, and a full pipe would stop the process.
            stderr=self._errors,
            text=True,
            pass_fds=(theirs,),
            # Ctrl-C is the parent's to deal with.
            start_new_session=True,
        )
        os.close(theirs)
        self._lines = os.fdopen(ours)
        try:
            self._ask("open", work=dict(work), side=side, commit=commit)
        except BaseException:
            self.close()
            raise

    def code(self) -> Code:
        return TypeAdapter(Code).validate_python(self._ask("code"))

    def prepare(self, scenario: Scenario) -> Ready:
        return TypeAdapter(Ready).validate_python(self._ask("prepare", name=scenario.name))

    def measure(self, name: str, round_number: int, seeds: list[int]) -> list[RequestSample]:
        told = self._ask("measure", name=name, round_number=round_number, seeds=seeds)
        return TypeAdapter(list[RequestSample]).validate_python(told)

    def release(self, names: list[str]) -> None:
        self._ask("release", names=names)

    def free_bytes(self) -> int:
        free: int = self._ask("free_bytes")
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
        for stream in (process.stdin, self._errors, self._lines):
            with contextlib.suppress(OSError):
                stream.close()

    def _ask(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"ask": what, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._lines.readline()
        if not line:
            raise BenchError(self._last_words(what))
        answer = json.loads(line)
        if "cannot_run" in answer:
            from bench.harness.drive import CannotRun, ScenarioFailed

            raise (ScenarioFailed if answer["failed"] else CannotRun)(answer["cannot_run"])
        return answer["answer"]

    def _last_words(self, what: str) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        told = self._errors.read().strip().splitlines()
        reason = told[-1][:300] if told else f"it exited with status {status}"
        if what == "open":
            return (
                f"the {self.side} commit cannot be measured: its code does not import or lacks "
                f"what the bench drives ({reason})"
            )
        return f"the {self.side} side ended while asked to {what} ({reason})"


def _search_path(root: Path) -> str:
    """The commit's packages before any installed ones."""
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return os.pathsep.join([str(root), *others])


def main(arguments: list[str]) -> int:
    """Answer what is asked on standard input until it closes."""
    answers = os.fdopen(int(arguments[0]), "w")
    side: LocalSide | None = None

    def answer(**told: Any) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    for line in sys.stdin:
        question = json.loads(line)
        match question.pop("ask"):
            case "open":
                from bench.harness.drive import Work, check_entry_points
                from kernels_warmup.shapes import CompiledShape

                check_entry_points()
                work = question["work"]
                shape = CompiledShape.parse(work.pop("shape"))
                side = LocalSide(Work(shape=shape, **work), question["side"], question["commit"])
                answer(answer=None)
            case what:
                assert side is not None
                _answer(side, what, question, answer)
    if side is not None:
        side.close()
    return 0


def _answer(side: LocalSide, what: str, question: dict[str, Any], answer: Any) -> None:
    from bench.harness.drive import CannotRun, ScenarioFailed

    try:
        if what == "prepare":
            (scenario,) = chosen([question["name"]])
            answer(answer=asdict(side.prepare(scenario)))
        elif what == "measure":
            answer(answer=[asdict(sample) for sample in side.measure(**question)])
        elif what == "code":
            answer(answer=asdict(side.code()))
        else:
            answer(answer=getattr(side, what)(**question))
    except CannotRun as reason:
        answer(cannot_run=str(reason), failed=isinstance(reason, ScenarioFailed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
