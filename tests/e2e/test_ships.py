"""The sdist that fal builds, installed with nothing but the dependencies, as on a runner."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from fal.api import _sdist

from tests.support.processes import ROOT, clean_environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

OURS = ("metrics", "kernels_warmup", "serve", "bench")

ON_THE_RUNNER = """
import importlib, sys
from importlib.resources import files
from pathlib import Path

site = Path(sys.argv[1])
for name in sys.argv[2:]:
    assert Path(importlib.import_module(name).__file__).is_relative_to(site), name

# As isolate does it: the entry point by name, then the metadata that a deploy publishes.
app = importlib.import_module("serve.app").SdxlApp
paths = app.build_metadata()["openapi"]["paths"]
assert {"/", "/stream"} <= set(paths), paths
gateway = importlib.import_module("serve.gateway").PromptGateway
assert "/" in gateway.build_metadata()["openapi"]["paths"]
assert not {"torch", "diffusers"} & set(sys.modules)

from serve.model.loading import load_model
model = load_model("demo", None, "cpu", "float32")
print("loaded", model.name, "from", site)
"""


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without the files of past builds and runs."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, root)
    for name in OURS:
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    return root


def test_the_sdist_that_fal_builds_runs_in_an_empty_environment(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fal's own build command, but with the setuptools at hand instead of a download.
    real_run = subprocess.run

    def build_offline(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        assert command[1:4] == ["-m", "build", "--sdist"]
        return real_run([*command, "--no-isolation"], **options)

    with monkeypatch.context() as patched:
        patched.setattr(_sdist.subprocess, "run", build_offline)
        sdist = _sdist._build_sdist(checkout)
    try:
        runner = tmp_path / "runner"
        venv.create(runner, with_pip=False)
        python = runner / "bin" / "python"
        site = Path(
            run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )
        # pip's own process is this environment's, so the build finds setuptools here.
        run(
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
            "--no-index", "--target", site, sdist,
        )  # fmt: skip
    finally:
        shutil.rmtree(sdist.parent)
    # The dependencies, without this checkout: a path file of a path file is not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shown = run(python, "-c", ON_THE_RUNNER, site, *OURS, cwd=tmp_path)
    assert f"loaded demo from {site}" in shown
