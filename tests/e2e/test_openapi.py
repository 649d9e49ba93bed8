"""The OpenAPI document, held against the real server by schemathesis.

schemathesis generates requests from the document, valid and invalid, and checks that every answer
is one that the document declares.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import forked
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Small pictures of one step, so that most of the time goes to the answers themselves."""
    settings = {
        "SDXL_DEVICE": "cpu",
        "SDXL_SHAPES": "64x64,96x64",
        "SDXL_STEPS": "1",
        "SDXL_PROFILE_DIR": str(tmp_path_factory.mktemp("profiles")),
        "OMP_NUM_THREADS": "1",
    }
    with forked.self_hosted(settings) as process:
        process.wait_until_ready(240)
        yield process


def check(server: ServerProcess, work: Path, *options: str) -> None:
    """Run schemathesis; its output shows each failure and a command that repeats it."""
    config = work / "schemathesis.toml"
    config.write_text(
        '[checks.negative_data_rejection]\nexpected-statuses = ["400", "413", "415", "422"]\n'
    )
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [server.url + "/openapi.json", "--checks", ",".join(CHECKS), "--no-color", *options]
    environment = {
        "PYTHONPATH": str(ROOT),
        "SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks",
    }
    result = subprocess.run(
        command, cwd=work, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 selected / 6 total" in result.stdout


def test_every_answer_is_as_the_document_says(server: ServerProcess, tmp_path: Path) -> None:
    check(server, tmp_path, "--phases=examples,coverage,fuzzing", "--max-examples=60", "--seed=1")


@pytest.mark.slow
def test_every_answer_to_many_requests_is_as_the_document_says(
    server: ServerProcess, tmp_path: Path
) -> None:
    check(server, tmp_path, "--phases=examples,coverage,fuzzing", "--max-examples=2000")
