"""Whether Triton is here, as the tests of its kernels need it."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def require_triton() -> None:
    """Skip the module without it, except where CI is true."""
    if find_spec("triton") is not None:
        return
    if os.environ.get("CI") == "true":
        raise RuntimeError("CI must have triton; .ci/run installs it")
    pytest.skip(
        "triton is not installed, and a CPU build of PyTorch brings none "
        "(.venv/bin/pip install triton, in the version that .ci/run names)",
        allow_module_level=True,
    )
