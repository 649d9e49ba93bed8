"""Faults in a real server's process, switched on and off by a test while it runs.

`install` runs in the process before the service starts (tests.support.forked), and wraps one
function of the service for each place in `PLACES`. Each reads at every call which fault is on.
The test writes that with `Faults`. The product knows nothing of this.
"""

from __future__ import annotations

import asyncio
import builtins
import functools
import importlib
import inspect
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLACES = {
    "receive": "serve.http.middleware:read_body",
    "load_model": "serve.model.loading:load_model",
    "warm_up": "serve.engine.runtime:Runtime._warm_once",
    "image_decode": "serve.engine.pictures.reading:decode_picture",
    "text_encode": "serve.model.sdxl:SdxlModel.encode_prompts",
    "vae_encode": "serve.model.sdxl:SdxlModel.initial_latents",
    "denoise": "serve.model.sdxl:SdxlModel.denoise",
    "step": "serve.engine.gpu_thread:StepPacer.step_enqueued",
    "vae_decode": "serve.model.sdxl:SdxlModel.decode",
    "safety_check": "serve.model.sdxl:SdxlModel.find_flagged",
    "image_encode": "serve.engine.runtime:encode_image",
    "upload": "tests.support.faults:stored",
    "respond": "serve.http.middleware:_ResponseWatch.send",
    "device": "serve.engine.failures:_is_lost",
    "archive": "kernels_warmup.cache.archive:_digest",
    "working_directory": "kernels_warmup.cache.working_directory:WorkingDirectory.create",
}
"""Where a fault can be: each the function that is wrapped."""

SECRET = ("ze", "bra")
"""An exception's text, as if it quoted a prompt; in parts, for a traceback quotes the source."""

STEP = 2
"""The step whose callback has the fault `step`."""


@dataclass(frozen=True)
class Faults:
    """The faults of one server, as its test switches them.

    Args:
        folder: an empty one.
        silence_seconds: after which a run counts as hung, and after half of it for a cancelled
            request; None: as in the product.
        eager: `torch.compile` compiles nothing; a file stands for the code that it would make.
    """

    folder: Path
    silence_seconds: float | None = None
    eager: bool = False

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Faults:
        return cls(**{**fields, "folder": Path(fields["folder"])})

    def on(self, place: str, kind: str) -> None:
        """Args:
        kind: the name of an exception to raise; `hold`, until it is off; `nan`, for what is
            returned; `true`, to return True; for the place `clock` the seconds by which it steps.
        """
        assert place in PLACES or place == "clock"
        unfinished = self.folder / ".unfinished"
        unfinished.write_text(kind)
        unfinished.replace(self.folder / place)

    def off(self, place: str) -> None:
        (self.folder / place).unlink(missing_ok=True)
        (self.folder / f"{place}.held").unlink(missing_ok=True)

    def wait_until_held(self, place: str, seconds: float = 60) -> None:
        """Wait until a call is held at this place."""
        deadline = time.monotonic() + seconds
        while not (self.folder / f"{place}.held").exists():
            assert time.monotonic() < deadline, f"nothing came to {place} in {seconds} s"
            time.sleep(0.01)


def stored(data: bytes, image_format: Any) -> str:
    """An upload, to nowhere."""
    from serve.engine.images import data_uri

    return data_uri(data, image_format)


def install(faults: Faults) -> None:
    """Wrap every place. For the process that becomes the server."""
    import serve.engine.watchdog
    import serve.server

    for place, target in PLACES.items():
        module, _, name = target.partition(":")
        owner: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, _wrapped(place, getattr(owner, last), faults.folder))
    _step_the_clock(faults.folder)
    # The self-hosted server stores nothing by itself.
    build = serve.server.build_runtime
    serve.server.build_runtime = lambda settings, **options: build(
        settings, upload=lambda data, image_format: stored(data, image_format), **options
    )
    if faults.silence_seconds is not None:
        serve.engine.watchdog.SILENCE_LIMIT_SECONDS = faults.silence_seconds
        serve.engine.watchdog.GIVE_UP_SECONDS = faults.silence_seconds / 2
    if faults.eager:
        _compile_nothing()


def _compile_nothing() -> None:
    import torch

    def uncompiled(function: Any, **_: Any) -> Any:
        code = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "ab", "cab.so")
        code.parent.mkdir(exist_ok=True)
        if not code.exists():  # restored from the archive
            code.write_bytes(b"machine code")
        return function

    torch.compile = uncompiled


def _wrapped(place: str, real: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    file = folder / place

    def kind_now(args: tuple[Any, ...]) -> str:
        if place == "step" and args[0]._timeline.steps_enqueued != STEP:
            return ""
        try:
            return file.read_text()
        except FileNotFoundError:
            return ""

    @functools.wraps(real)
    async def on_the_loop(*args: Any, **kwargs: Any) -> Any:
        kind = kind_now(args)
        _raise(kind)
        if kind == "hold":
            (folder / f"{place}.held").touch()
            while kind_now(args) == "hold":
                await asyncio.sleep(0.01)
        return await real(*args, **kwargs)

    @functools.wraps(real)
    def on_a_thread(*args: Any, **kwargs: Any) -> Any:
        kind = kind_now(args)
        _raise(kind)
        if kind == "hold":
            (folder / f"{place}.held").touch()
            while kind_now(args) == "hold":
                time.sleep(0.01)
        result = True if kind == "true" else real(*args, **kwargs)
        return result * float("nan") if kind == "nan" else result

    return on_the_loop if inspect.iscoroutinefunction(real) else on_a_thread


def _raise(kind: str) -> None:
    if kind == "OutOfMemoryError":
        import torch

        raise torch.OutOfMemoryError("tried to allocate 900 GiB")
    if kind == "disk full":
        raise OSError(28, os.strerror(28))
    error = getattr(builtins, kind, None)
    if isinstance(error, type) and issubclass(error, Exception):
        raise error("".join(SECRET))


def _step_the_clock(folder: Path) -> None:
    """Shift the system clock, as this process reads it, by the seconds in the file `clock`."""
    from metrics.clock import WallAnchor

    def offset() -> float:
        try:
            return json.loads((folder / "clock").read_text())
        except FileNotFoundError:
            return 0.0

    real_seconds, real_ns = time.time, time.time_ns
    time.time = lambda: real_seconds() + offset()
    time.time_ns = lambda: real_ns() + int(offset() * 1e9)
    WallAnchor.now.__func__.__defaults__ = (lambda: time.time_ns(), time.perf_counter_ns)
