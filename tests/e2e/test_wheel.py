"""Built as a wheel and installed in an empty environment, it serves from another directory."""

from __future__ import annotations

import getpass
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import httpx
import pytest

from kernels_warmup.cache.working_directory import WORKING_PREFIX
from tests.support.processes import ROOT, clean_environment, free_port, running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

REQUEST = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel, and sees the dependencies only."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout, dist, environment = folder / "checkout", folder / "dist", folder / "environment"
    # A copy, because setuptools writes into the tree that it builds.
    shutil.copytree(
        ROOT, checkout, ignore=shutil.ignore_patterns(".*", "tests", "build", "*.egg-info")
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist), str(checkout)]
    subprocess.run([*pip, *build], check=True)
    [wheel] = dist.glob("stepspan-*.whl")
    venv.create(environment, with_pip=False)
    site = next((environment / "lib").glob("python*")) / "site-packages"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True
    )
    # Torch is too large to install twice; a path file reached through a path file is not
    # followed, so the editable install of this checkout stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin" / "python"


def test_it_serves_from_another_directory_and_leaves_no_compiled_code_behind(
    python: Path, tmp_path: Path
) -> None:
    """No code with the temporary files, nor where another user could have put some."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(python), "-m", "serve", "--port", str(port)]
    elsewhere, temporary = tmp_path / "elsewhere", tmp_path / "temporary"
    guessed = temporary / f"torchinductor_{getpass.getuser()}"
    elsewhere.mkdir()
    guessed.mkdir(mode=0o777, parents=True)
    settings = {"SDXL_MODEL": "demo", "SDXL_SHAPES": "64x64", "SDXL_COMPILE": "off"}
    settings |= {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    with running(command, url, settings, cwd=elsewhere) as server:
        server.wait_until_ready(240)
        (private,) = set(temporary.iterdir()) - {guessed}
        assert private.name.startswith(WORKING_PREFIX)
        assert private.stat().st_mode & 0o777 == 0o700
        answer = httpx.post(url, json=REQUEST, timeout=120)
        assert answer.status_code == 200
        assert answer.json()["image"]["url"].startswith("data:image/jpeg;base64,")
        assert httpx.get(url + "/metrics", timeout=30).status_code == 200
        page = httpx.get(url, timeout=30)
        assert page.headers["content-type"].startswith("text/html")
        assert httpx.get(url + "/playground/main.js", timeout=30).status_code == 200
        assert server.terminate() < 10
        assert server.process.returncode == 0
        assert "ready at" in server.output()
    assert list(temporary.iterdir()) == [guessed]
    assert list(guessed.iterdir()) == []


def test_the_code_that_runs_is_the_wheels(python: Path, tmp_path: Path) -> None:
    shown = subprocess.run(
        [python, "-c", "import serve, metrics; print(serve.__file__, metrics.__file__)"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.count(str(python.parent.parent)) == 2


def files_in(folder: str, python: Path, elsewhere: Path) -> list[str]:
    """The names of an installed folder's files; `folder` is an expression of it."""
    imports = "from importlib.resources import files; from serve.demo_model import loras_path"
    return subprocess.run(
        [python, "-c", f"{imports}; print(*sorted(f.name for f in {folder}.iterdir()))"],
        cwd=elsewhere,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()


def test_it_contains_the_monitoring_files(python: Path, tmp_path: Path) -> None:
    assert files_in("(files('metrics') / 'monitoring')", python, tmp_path) == [
        "dashboard.json",
        "fal.yml",
        "prometheus.yml",
        "rules.yml",
        "rules_test.yml",
    ]


def test_it_contains_the_demo_lora(python: Path, tmp_path: Path) -> None:
    assert files_in("loras_path()", python, tmp_path) == ["night.safetensors"]
