"""Requests to a runtime in the test's own process, and a gate that holds its GPU thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from serve.engine.call import Call
from serve.engine.runtime import Runtime
from serve.schema import TextToImageResponse
from tests.serve.conftest import request

NewCall = Callable[[], Call]


def generate(runtime: Runtime, call: Call, **changes: Any) -> TextToImageResponse:
    return asyncio.run(runtime.generate(request(**changes), call))


class Gate:
    """Holds the GPU thread until opened."""

    def __init__(self, runtime: Runtime) -> None:
        self._opened = threading.Event()
        self._entered = threading.Event()
        self._future = runtime._gpu.submit(self._hold)
        self._entered.wait(10)

    def _hold(self) -> None:
        self._entered.set()
        self._opened.wait(30)

    def open(self) -> None:
        self._opened.set()
        self._future.result(10)
