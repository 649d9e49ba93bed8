"""`python -m bench.peers.environments`: install the packages of BentoML and LitServe.

Each peer gets a folder of its own, which its server finds first on PYTHONPATH. Everything that is
not in the folder (torch, diffusers, ...) comes from this Python's own packages, so both sides run
the same model code. They are no part of the service's environment, because BentoML's tracing needs
other semantic conventions than the service's, and because uvicorn would serve our server with
LitServe's uvloop and httptools if it found them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.errors import BenchError
from bench.service.processes import ROOT

FOLDER = ROOT / ".peers"
PINS: Mapping[str, Path] = {
    name: Path(__file__).with_name(f"{name}.txt") for name in ("bentoml", "litserve")
}
"""The packages of each environment, one `NAME==VERSION` a line."""

_INSTALLED = "installed.txt"
"""A copy of the pins, written last."""


def pythonpath(name: str) -> str:
    """The PYTHONPATH of that peer's server.

    Raises:
        BenchError: its environment is missing, or was built from other pins.
    """
    folder = FOLDER / name
    stamp = folder / _INSTALLED
    if not stamp.is_file() or stamp.read_bytes() != PINS[name].read_bytes():
        state = "is of other versions" if stamp.is_file() else "is missing"
        raise BenchError(f"the environment of {name} {state}: `make peers-env` builds it")
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def version(name: str) -> str:
    """The pinned version of that peer."""
    (found,) = (
        line.partition("==")[2]
        for line in PINS[name].read_text().splitlines()
        if line.startswith(f"{name}==")
    )
    return found


def build(name: str) -> None:
    """Install that peer's pins, unless they are installed.

    Raises:
        BenchError: a package cannot be installed; pip has printed why.
    """
    try:
        pythonpath(name)
    except BenchError:
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        # Without dependencies: the pins are complete, and torch is here already.
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        command += ["--no-deps", "--target", str(folder), "--requirement", str(PINS[name])]
        if subprocess.run(command, check=False).returncode:
            raise BenchError(f"the environment of {name} cannot be installed") from None
        shutil.copyfile(PINS[name], folder / _INSTALLED)


def main() -> int:
    for name in PINS:
        try:
            build(name)
        except BenchError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
        print(f"{name} {version(name)}: {FOLDER / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
