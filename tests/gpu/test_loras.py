"""LoRAs in a captured model on a GPU: its graphs read the weights as they are."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from kernels_warmup.shapes import CompiledShape  # noqa: E402
from serve.engine.build import build_runtime  # noqa: E402
from serve.model.loading import load_model  # noqa: E402
from serve.settings import ServeSettings  # noqa: E402
from serve.settings.fields import LoraSource  # noqa: E402
from tests.serve.engine.demo_runtime import counted, generate, new_call, pixels  # noqa: E402
from tests.support import loras  # noqa: E402


@pytest.mark.parametrize("compile", ["default", "max"])
def test_captured_graphs_read_the_changed_weights(tmp_path: Path, compile: Any) -> None:
    made = loras.make(load_model("demo", None, "cpu").pipeline)
    file = loras.save(loras.as_peft(made), tmp_path / "ink.safetensors")
    settings = ServeSettings(
        model="demo",
        device="cuda",
        compile=compile,
        shapes=(CompiledShape(128, 128),),
        loras=(LoraSource("ink", str(file)),),
    )
    runtime = build_runtime(settings, CollectorRegistry())
    asyncio.run(runtime.start())
    try:
        drawn = []
        for wanted in ([], [{"path": "ink"}], [{"path": "ink", "scale": 0.5}], []):
            call = new_call(runtime)
            drawn.append(pixels(generate(runtime, call, loras=wanted, format="png")))
            assert call.run is not None
            assert not call.run.eager_fallback
        assert np.array_equal(drawn[0], drawn[3])
        assert np.abs(drawn[1].astype(int) - drawn[0]).mean() > 1
        assert not np.array_equal(drawn[1], drawn[2])
        assert counted(runtime, "sdxl_recompiles_total") == 0
    finally:
        runtime.close(5)
