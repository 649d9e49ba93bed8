"""The OpenAPI document, held against the real server by schemathesis.

schemathesis generates requests from the document, valid and invalid, and checks that every answer
is one that the document declares.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import START_SECONDS, STARTS
from tests.support.processes import ROOT, ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)


OPERATIONS = {"self-hosted": 15, "fal": 6}
"""On fal metrics are on a port of their own, and there are no profiles and no playground."""


@contextmanager
def started(kind: str, profiles: Path) -> Iterator[ServerProcess]:
    """A ready server of small pictures of one step, so that most of the time goes to the answers
    themselves."""
    settings = {
        "SDXL_DEVICE": "cpu",
        "SDXL_SHAPES": "64x64,96x64",
        "SDXL_STEPS": "1",
        "SDXL_PROFILE_DIR": str(profiles),
        "OMP_NUM_THREADS": "1",
    }
    with STARTS[kind](settings) as process:
        process.wait_until_ready(START_SECONDS)
        yield process


def check(server: ServerProcess, kind: str, work: Path, *options: str) -> None:
    """Run schemathesis; its output shows each failure and a command that repeats it."""
    config = work / "schemathesis.toml"
    config.write_text(
        '[checks.negative_data_rejection]\nexpected-statuses = ["400", "413", "415", "422"]\n'
    )
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [server.url + "/openapi.json", "--phases", "examples,coverage,fuzzing"]
    command += ["--checks", ",".join(CHECKS), "--no-color", *options]
    environment = {
        "PYTHONPATH": str(ROOT),
        "SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks",
    }
    result = subprocess.run(
        command, cwd=work, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Tested: {OPERATIONS[kind]}\n" in result.stdout


def test_every_answer_is_as_the_document_says(tmp_path: Path) -> None:
    with started("self-hosted", tmp_path) as server:
        check(server, "self-hosted", tmp_path, "--max-examples", "12", "--seed", "1")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", STARTS)
def test_every_answer_to_many_requests_is_as_the_document_says(kind: str, tmp_path: Path) -> None:
    with started(kind, tmp_path) as server:
        check(server, kind, tmp_path, "--max-examples", "1000")
