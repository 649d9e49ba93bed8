"""The playground's JavaScript: types by its JSDoc comments, and lint."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.support.processes import ROOT

TOOLS = ROOT / "tests" / "javascript"


@pytest.mark.e2e
def test_types_and_lint() -> None:
    if shutil.which("npm") is None or not (TOOLS / "node_modules").exists():
        if os.environ.get("CI") == "true":
            raise RuntimeError("CI must have the packages of tests/javascript; see .ci/run")
        pytest.skip("the npm tools are not installed (npm ci --prefix tests/javascript)")
    checked = subprocess.run(
        ["npm", "run", "--silent", "check"], cwd=TOOLS, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
