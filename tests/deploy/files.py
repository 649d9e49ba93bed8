"""The shipped deployments as data, and the tools that check them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.server import CUT_OFF_SECONDS, FLUSH_SECONDS, GRACE_SECONDS
from serve.settings import ServeSettings
from tests.support.processes import ROOT

DEPLOY = ROOT / "docs" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = ROOT / "compose.yaml"
TOOLS = ROOT / ".deploy-tools" / "bin"

END_SECONDS = (
    ServeSettings.model_fields["deadline_seconds"].default
    + GRACE_SECONDS
    + CUT_OFF_SECONDS
    + FLUSH_SECONDS
)
"""How long the server may take to end after SIGTERM, with the default deadline."""


def manifest(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with its arguments on one line."""
    text = (ROOT / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [
        (name.upper(), arguments)
        for name, _, arguments in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of `tests/deploy/tools.txt`; skips the test without it, except in CI."""
    if not (TOOLS / name).exists():
        if os.environ.get("CI") == "true":
            raise RuntimeError("CI must have the tools that check deployments: make deploy-tools")
        pytest.skip("the tools that check deployments are not installed (make deploy-tools)")
    return subprocess.run(
        [TOOLS / name, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
