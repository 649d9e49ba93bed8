"""Profiles of single runs, operator by operator, and NVTX ranges for an attached profiler.

Profiling is off unless `SDXL_PROFILE_DIR` names a folder. An operator arms it for the next
requests. torch.profiler records each of their runs, and a compressed Chrome trace, which Perfetto
opens, is written into that folder. Recording slows a run down, so its timing is marked as profiled
and left out of the latency metrics. `SDXL_NVTX` marks stages and steps for a profiler that is
attached from outside.

A profile has operators, kernels, stages and steps. It has no shapes, stacks or arguments, so no
prompt can be in it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from metrics.records import RunTiming
from serve.errors import ConfigurationError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_PROFILES = 20
"""How many profiles the folder keeps, and how many requests may be armed at once."""

MAX_PROFILE_BYTES = 512 * 1024 * 1024
"""The largest total size of the profiles; a disk with a model on it has that much to spare."""

_PROFILE_NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{8}\.json\.gz")


class ProfiledCall(Protocol):
    """A call of a run that may be profiled."""

    runs: list[RunTiming]


class Profiling:
    """Profiles the runs of armed requests. Used by the thread that owns the model.

    Args:
        folder: the profiles' folder, created if it does not exist; None turns profiling off.
        nvtx: mark stages and steps as NVTX ranges; has no effect without a CUDA device.
        max_profiles, max_bytes: the limits of the folder; the oldest profiles are removed first.

    Raises:
        ConfigurationError: the folder cannot be created or written.
    """

    def __init__(
        self,
        folder: Path | None,
        nvtx: bool = False,
        max_profiles: int = MAX_PROFILES,
        max_bytes: int = MAX_PROFILE_BYTES,
    ) -> None:
        self._folder = None if folder is None else _writable(folder)
        if self._folder is not None:
            for path in self._folder.iterdir():
                if path.name[0] == "." and _PROFILE_NAME.fullmatch(path.name[1:]):
                    path.unlink(missing_ok=True)  # left unfinished by an earlier process
        self._nvtx = nvtx
        self.max_profiles = max_profiles
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._armed = 0
        self.recording: str | None = None
        """The name of the profile of the run in progress; None: it is not profiled."""
        # Writing a profile takes seconds. A daemon thread does it, so that neither the next run nor
        # the process's end waits for it.
        self._writer: threading.Thread | None = None
        self._writing = threading.Lock()

    @property
    def enabled(self) -> bool:
        return self._folder is not None

    @property
    def armed(self) -> int:
        """How many of the next runs will be profiled."""
        return self._armed

    def arm(self, count: int) -> None:
        """Profile the next `count` runs. Replaces what was armed before; 0 cancels."""
        assert self.enabled
        assert 0 <= count <= self.max_profiles
        with self._lock:
            self._armed = count

    def profiles(self) -> list[str]:
        """The names of the profiles in the folder, oldest first."""
        assert self._folder is not None
        return [path.name for path in _profiles_in(self._folder)]

    def run(self, run: Callable[[], T], run_id: str, calls: Sequence[ProfiledCall]) -> T:
        """Run `run`, profiled if one is armed. `recording` is the profile's name meanwhile.

        If the profiler cannot start, that is logged and the run continues. A run that was cancelled
        before it began has put no timing into the calls, and leaves no profile.
        """
        with self._lock:
            profiled = self._armed > 0
            self._armed -= profiled
        profiler = _started_profiler() if profiled else None
        if profiler is None:
            return run()
        at = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")[:-3]
        name = f"{at}Z-{run_id[:8]}.json.gz"
        self.recording = name
        try:
            return run()
        finally:
            self.recording = None
            stopped = _stopped(profiler)
            begun = any(call.runs and call.runs[-1].run_id == run_id for call in calls)
            if begun and stopped:
                self._writer = threading.Thread(
                    target=self._write, args=(profiler, name), name="profile", daemon=True
                )
                self._writer.start()

    def ranges(self, steps: int) -> Ranges | None:
        """The ranges that mark the stages and steps of the next run; None if no profiler is on."""
        annotations: list[Callable[[str], AbstractContextManager[Any]]] = []
        if self.recording is not None:
            from torch.profiler import record_function

            annotations.append(record_function)
        if self._nvtx:
            from torch import cuda

            if cuda.is_available():
                annotations.append(cuda.nvtx.range)
        return Ranges(annotations, steps) if annotations else None

    def close(self, timeout_seconds: float) -> bool:
        """Wait for the newest profile to be written. Returns whether it was, within the time."""
        if self._writer is None:
            return True
        self._writer.join(timeout_seconds)
        return not self._writer.is_alive()

    def _write(self, profiler: Any, name: str) -> None:
        assert self._folder is not None
        # A hidden name until the file is complete.
        unfinished = self._folder / f".{name}"
        try:
            with self._writing:
                profiler.export_chrome_trace(str(unfinished))
                unfinished.replace(self._folder / name)
                self._remove_oldest()
            logger.info("profile written: %s", name)
        except Exception as error:  # noqa: BLE001 - on a thread of its own: only the log reports it
            logger.error("the profile %s could not be written: %s", name, type(error).__name__)
            unfinished.unlink(missing_ok=True)

    def _remove_oldest(self) -> None:
        """Keep the folder within its limits. A profile larger than the limit is removed too."""
        assert self._folder is not None
        kept = _profiles_in(self._folder)
        sizes = {path: path.stat().st_size for path in kept}
        while kept and (
            len(kept) > self.max_profiles or sum(sizes[path] for path in kept) > self._max_bytes
        ):
            oldest = kept.pop(0)
            oldest.unlink(missing_ok=True)
            logger.info("profile removed: %s", oldest.name)


class Ranges:
    """Marks the stages and steps of one run as nested ranges of a profiler.

    Args:
        annotations: context managers of a named range, one for each profiler.
        steps: how many steps the loop has.
    """

    def __init__(
        self, annotations: list[Callable[[str], AbstractContextManager[Any]]], steps: int
    ) -> None:
        self._annotations = annotations
        self._steps = steps
        self._step = contextlib.ExitStack()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with self._opened(name):
            try:
                yield
            finally:
                self._step.close()  # of a loop that ended midway

    def step_begins(self, index: int) -> None:
        """End the range of the step before, and begin that of step `index` if there is one."""
        self._step.close()
        if index < self._steps:
            self._step = self._opened(f"denoise_step {index}")

    def _opened(self, name: str) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for annotation in self._annotations:
            stack.enter_context(annotation(name))
        return stack


def _writable(folder: Path) -> Path:
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        allowed = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        allowed = False
    if not allowed:
        raise ConfigurationError(
            f"SDXL_PROFILE_DIR={str(folder)!r} is not allowed. Allowed: a folder that can be "
            "written."
        )
    return folder


def _profiles_in(folder: Path) -> list[Path]:
    """The profiles in the folder, oldest first: their names begin with the time."""
    return sorted(path for path in folder.iterdir() if _PROFILE_NAME.fullmatch(path.name))


def _started_profiler() -> Any:
    from torch.profiler import ProfilerActivity, profile, supported_activities

    wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    profiler = profile(
        activities=wanted & supported_activities(),  # type: ignore[no-untyped-call]
        # These are the defaults. Each would record parts of a request.
        record_shapes=False,
        with_stack=False,
        profile_memory=False,
        acc_events=True,
    )
    try:
        profiler.start()
    except RuntimeError as error:  # another profiler of this process or device is running
        logger.error("a run could not be profiled: %s", type(error).__name__)
        return None
    return profiler


def _stopped(profiler: Any) -> bool:
    try:
        profiler.stop()
    except RuntimeError as error:  # the device is lost
        logger.error("a profile was lost: %s", type(error).__name__)
        return False
    return True
