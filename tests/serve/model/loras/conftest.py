"""The demo model, loaded once for each way of computing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kernels_warmup.compile import compile_model
from kernels_warmup.recipes import Mode, Recipe
from serve.model.loading import load_model
from serve.model.sdxl import SdxlModel

Load = Callable[..., SdxlModel]


@pytest.fixture(scope="session")
def load() -> Load:
    def load_fresh(
        mode: Mode = "off", recipe: Recipe | None = None, before: Any = None
    ) -> SdxlModel:
        """`before`: called with the pipeline as it was loaded."""
        model = load_model("demo", None, "cpu", "float32")
        if before is not None:
            before(model.pipeline)
        compiled = compile_model(model.pipeline, mode, recipe=recipe)
        model.text = compiled.text
        return model

    return load_fresh


@pytest.fixture(scope="module")
def plain(load: Load) -> SdxlModel:
    """The demo model as it was loaded; tests do not change it."""
    return load()
