"""A start that cannot succeed ends with one sentence that names what was wrong, not a traceback."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from serve.demo_model import checkpoint_path
from tests.support import forked, processes
from tests.support.otlp_endpoint import otlp_endpoint
from tests.support.processes import ServerProcess, refusing_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SECONDS = 120.0
SMALL = {"SDXL_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "SDXL_SHAPES": "64x64"}
PASSWORD = "hunter2hunter2"
UNET = Path("unet", "diffusion_pytorch_model.safetensors")


def with_value(value: float, name: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        tensors = load_file(model / UNET)
        tensors[name].view(-1)[5] = value
        save_file(tensors, model / UNET)

    return spoil


def truncate(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes()[:-100])


def widen(model: Path) -> None:
    """A configuration of another model than the weights are of."""
    path = model / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["block_out_channels"] = [2 * width for width in config["block_out_channels"]]
    path.write_text(json.dumps(config))


def overflow(model: Path) -> None:
    """Finite weights whose pictures are not."""
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    for name in ("decoder.conv_norm_out.weight", "decoder.conv_out.weight"):
        tensors[name].fill_(1e30)
    save_file(tensors, path)


def sentence(server: ServerProcess, status: int) -> str:
    """The one error that a start which failed has logged."""
    server.process.wait(SECONDS)
    output = server.output()
    assert server.process.returncode == status, output
    assert "Traceback" not in output, output
    logged = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    (error,) = [line["event"] for line in logged if line["level"] == "error"]
    assert isinstance(error, str)
    return error


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (with_value(float("nan"), "mid_block.resnets.0.conv1.weight"),
         "unet.mid_block.resnets.0.conv1.weight"),
        (truncate, "could not be loaded"),
        (widen, "could not be loaded"),
        (overflow, "not finite"),
    ],
    ids=["nan", "truncated", "another configuration", "pixels"],
)  # fmt: skip
def test_a_model_that_cannot_draw(
    spoil: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint_path(), model)
    spoil(model)
    with forked.self_hosted(SMALL | {"SDXL_MODEL": str(model)}) as server:
        said = sentence(server, status=1)
    assert named in said
    assert model.name in said


@pytest.mark.slow  # tests/serve/model/test_model_hub.py has each reason in process
@pytest.mark.parametrize("why", ["refuses", "its name does not resolve", "its certificate"])
def test_a_hub_that_cannot_be_reached(why: str, tmp_path: Path) -> None:
    with otlp_endpoint(tls=True) as untrusted, refusing_port() as port:
        addresses = {
            "refuses": f"http://user:{PASSWORD}@127.0.0.1:{port}",
            "its name does not resolve": f"http://user:{PASSWORD}@hub.invalid",
            "its certificate": untrusted.url,
        }
        hub = {
            "SDXL_MODEL": "someone/tiny-sdxl",
            "HF_ENDPOINT": addresses[why],
            "HF_TOKEN": f"hf_{PASSWORD}",
            "HF_HOME": str(tmp_path),
        }
        start = time.monotonic()
        with processes.self_hosted(SMALL | hub) as server:
            said = sentence(server, status=1)
            assert PASSWORD not in server.output()
        print(f"a hub, {why}: ended after {time.monotonic() - start:.1f} s")
    assert "someone/tiny-sdxl" in said
    assert "hub cannot be reached" in said


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_folder_of_compiled_code_that_others_can_write_to(variable: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with forked.self_hosted(SMALL | {"SDXL_MODEL": "demo", variable: str(shared)}) as server:
        server.process.wait(SECONDS)
        (said,) = server.output().strip().splitlines()
    assert server.process.returncode == 2
    assert said.startswith(f"stepspan: {shared} ")
