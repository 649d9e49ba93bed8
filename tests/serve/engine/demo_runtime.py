"""A runtime on the demo model and the CPU, and requests to it without HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry

from serve.engine.build import build_runtime
from serve.engine.call import Call
from serve.engine.runtime import Runtime
from serve.schema import TextToImageResponse
from serve.settings import ServeSettings
from tests.serve.conftest import request


def settings(**changes: Any) -> ServeSettings:
    return ServeSettings(**({"model": "demo", "device": "cpu", "compile": "off"} | changes))


def build(**changes: Any) -> Runtime:
    return build_runtime(settings(**changes), CollectorRegistry())


def new_call(runtime: Runtime) -> Call:
    return Call("/", "POST", runtime.tracing.identify())


def generate(runtime: Runtime, call: Call | None = None, **fields: Any) -> TextToImageResponse:
    return asyncio.run(runtime.generate(request(**fields), call or new_call(runtime)))


def counted(runtime: Runtime, name: str, **labels: str) -> float:
    value = runtime.metrics.registry.get_sample_value(name, labels)
    return 0.0 if value is None else value


def pixels(response: TextToImageResponse) -> np.ndarray:
    data = base64.b64decode(response.image.url.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)))
