"""Skips the tests of the Triton kernels where Triton is not installed."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def require_triton() -> None:
    """Skip the calling module without Triton; raise instead if CI is true."""
    if find_spec("triton") is not None:
        return
    if os.environ.get("CI") == "true":
        raise RuntimeError("CI must have triton; .ci/run installs it")
    pytest.skip(
        "triton is not installed, and a CPU build of PyTorch brings none "
        "(.venv/bin/pip install triton, in the version that .ci/run names)",
        allow_module_level=True,
    )
