"""One warmed runtime on the demo checkpoint for all in-process tests of this package."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from metrics.records import RequestTiming
from serve.engine.build import build_runtime
from serve.engine.call import Call
from serve.engine.runtime import Runtime
from serve.schema import TextToImageRequest
from serve.server import create_app
from serve.settings import ServeSettings


@pytest.fixture
def logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo `configure_logging` after the test."""
    root, factory = logging.getLogger(), logging.getLogRecordFactory()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.setLogRecordFactory(factory)


@pytest.fixture(scope="session")
def runtime() -> Iterator[Runtime]:
    runtime = build_runtime(ServeSettings(model="demo", device="cpu"), CollectorRegistry())
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


@pytest.fixture
def new_call(runtime: Runtime) -> Callable[[], Call]:
    def make() -> Call:
        call = Call("/", "POST", runtime.tracing.identify())
        call.timeline.begin_at_arrival("receive")
        return call

    return make


def request(**changes: object) -> TextToImageRequest:
    """A small valid request, changed."""
    fields: dict[str, object] = {
        "prompt": "a red circle on a white background",
        "num_inference_steps": 2,
        "seed": 1,
    }
    return TextToImageRequest.model_validate(fields | changes)


@pytest.fixture(scope="session")
def app(runtime: Runtime) -> FastAPI:
    """The app around the shared runtime; its lifespan, which would start another, is not run."""
    return create_app(runtime)


@pytest.fixture
def recorded(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[RequestTiming]:
    """What was handed to the recorder."""
    timings: list[RequestTiming] = []
    monkeypatch.setattr(runtime.recorder, "record", lambda timing, _: timings.append(timing))
    return timings
