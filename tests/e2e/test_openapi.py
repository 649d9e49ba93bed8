"""The OpenAPI document, held against the real server by schemathesis.

schemathesis generates requests from the document, valid and invalid, and checks that every answer
is one that the document declares.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

from serve.schema import EXAMPLE_PICTURE
from tests.e2e.conftest import START_SECONDS, STARTS, Server
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
    "every_header_is_declared",
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


def check(
    server: ServerProcess, work: Path, *options: str, phases: str = "examples,coverage,fuzzing"
) -> tuple[str, float]:
    """Run schemathesis; its output shows each failure and a command that repeats it. Returns the
    output, and the most memory that it took, in MiB."""
    config = work / "schemathesis.toml"
    config.write_text(
        '[checks.negative_data_rejection]\nexpected-statuses = ["400", "413", "415", "422"]\n'
    )
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [server.url + "/openapi.json", "--phases", phases]
    command += ["--checks", ",".join(CHECKS), "--no-color", *options]
    environment = {
        "PYTHONPATH": str(ROOT),
        "SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks",
    }
    output = work / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=work, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output.read_text()
    return output.read_text(), used.ru_maxrss / 1024


def test_every_answer_is_as_the_document_says(tmp_path: Path) -> None:
    with started("self-hosted", tmp_path) as server:
        output, _ = check(server, tmp_path, "--max-examples", "12", "--seed", "1")
    assert f"Tested: {OPERATIONS['self-hosted']}\n" in output


FEW = {"prompt": "a red circle", "num_inference_steps": 4}
OPENAIS = "image_generation."


@pytest.mark.parametrize(
    ("path", "fields", "names"),
    [
        ("/stream", {"preview": True}, {"queued", "step", "image"}),
        ("/image-to-image/stream", {"image_url": EXAMPLE_PICTURE}, {"queued", "step", "image"}),
        ("/v1/images/generations", {"stream": True, "n": 2}, {OPENAIS + "completed"}),
        (
            "/v1/images/generations",
            {"stream": True, "partial_images": 2},
            {OPENAIS + "partial_image", OPENAIS + "completed"},
        ),
    ],
)
def test_every_event_of_a_stream_is_as_the_document_says(
    servers: dict[str, Server], path: str, fields: dict[str, Any], names: set[str]
) -> None:
    process = servers["self-hosted"].process
    document = schemathesis.openapi.from_url(process.url + "/openapi.json")
    answer = document[path]["POST"].Case(body=FEW | fields).call_and_validate()
    assert answer.status_code == 200
    found = set(re.findall(r"^event: (\S+)$", answer.text, re.MULTILINE))
    assert found == names


MOST_MIB = 2048
"""Of one run below. What schemathesis holds grows with each case: one run of 1,000 for all
operations took 5.5 GB. So each operation has runs of its own."""
RUNS, EXAMPLES = 4, 250


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", STARTS)
def test_every_answer_to_many_requests_is_as_the_document_says(kind: str, tmp_path: Path) -> None:
    with started(kind, tmp_path) as server:
        paths = httpx.get(server.url + "/openapi.json", timeout=60).json()["paths"]
        operations = [
            f"{method.upper()} {path}" for path, methods in paths.items() for method in methods
        ]
        assert len(operations) == OPERATIONS[kind]
        for operation in operations:
            for seed in range(1, RUNS + 1):
                options = ("--max-examples", str(EXAMPLES), "--seed", str(seed))
                # The first two phases are the same with every seed.
                phases = "examples,coverage,fuzzing" if seed == 1 else "fuzzing"
                output, most_mib = check(
                    server, tmp_path, "--include-name", operation, *options, phases=phases
                )
                cases = re.search(r"(\d+) generated", output)
                print(f"{operation} seed {seed}: {cases and cases[1]} cases, {most_mib:.0f} MiB")
                assert most_mib < MOST_MIB
