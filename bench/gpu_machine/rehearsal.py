"""Rehearses the commands of a measurement session on a GPU machine, on this machine's CPU.

    make gpu-rehearsal PYTHON312=/path/to/python3.12

Builds the GPU machine's environment in .gpu-rehearsal/: its packages (machine.txt) in a virtual
environment, missing packages (wheels.txt) as wheels in a folder on PYTHONPATH, and a checkout of
HEAD without git, not installed. Runs COMMANDS there with the demo model and without a network. The
log lists what ran and the outcome of every scenario.

Exit status: 0 every scenario was timed or needs a GPU; 1 something failed; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.outputs import output_file

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".gpu-rehearsal"
PYTHON = HOME / "venv/bin/python"
WHEELS, SITE, CHECKOUT, LOGS = (HOME / name for name in ("wheels", "site", "checkout", "logs"))
ARCHIVE = HOME / "results.tar.gz"
MACHINE, MISSING = (Path(__file__).with_name(name) for name in ("machine.txt", "wheels.txt"))

PYTHON_VERSION = "3.12"
PYTEST = "pytest -q -p no:cacheprovider -m gpu"
WORKLOAD = "--device cpu --model demo --shape 64x64 --steps 2 --requests 2"
COMMANDS: tuple[tuple[str, str], ...] = (
    ("kernels' tests", f"{PYTEST} -x tests/gpu/test_triton.py"),
    ("all GPU tests", f"{PYTEST} tests/gpu"),
    ("session", f"bench session --archive {ARCHIVE} --minutes 9 {WORKLOAD}"),
)
"""Names, and arguments of `python -m`. A command that exits with TIME_IS_UP is run again."""
COMMAND_SECONDS = 600
"""Time limit of one command on such a machine."""
TIME_IS_UP = 75
MOST_CALLS = 20
MOST_BYTES = 64 << 20
"""Size limit of the tracked files and the wheels, which are sent to the machine together."""

NEEDS_GPU = re.compile(r"\bneeds? an? .*\b(CUDA device|GPU)\b")
"""Reasons that allow a scenario not to be timed here."""

# A network namespace of its own with only the loopback interface.
OFFLINE = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


class RehearsalError(Exception):
    """The environment cannot be built; the message is one sentence."""


def build(python: str) -> None:
    """Build the environment, unless it was built from the same two lists.

    Raises:
        RehearsalError: `python` is no Python 3.12, or a package cannot be installed.
    """
    if shutil.which(python) is None or (version := _minor_version(python)) is None:
        raise RehearsalError(f"{python} does not run: set PYTHON312 to a Python 3.12")
    if version != PYTHON_VERSION:
        raise RehearsalError(f"{python} is Python {version}: set PYTHON312 to a Python 3.12")
    lists = hashlib.sha256(MACHINE.read_bytes() + MISSING.read_bytes()).hexdigest()
    stamp = HOME / "built"
    if stamp.exists() and stamp.read_text() == lists:
        return
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    pip = (str(PYTHON), "-m", "pip", "--disable-pip-version-check", "-q")
    wheels_only = ("--no-cache-dir", "--no-deps", "--only-binary=:all:")
    _do(python, "-m", "venv", str(HOME / "venv"))
    _do(*pip, "install", *wheels_only, "-r", str(MACHINE))
    _do(*pip, "download", *wheels_only, "-d", str(WHEELS), "-r", str(MISSING))
    # Without bytecode: every library is compiled at its first import, as on that machine.
    install = ("install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
    _do(*pip, *install, "--target", str(SITE), *map(str, sorted(WHEELS.glob("*.whl"))))
    stamp.write_text(lists)


def check_out() -> str:
    """Write the files of HEAD to CHECKOUT. Returns the commit."""
    shutil.rmtree(CHECKOUT, ignore_errors=True)
    CHECKOUT.mkdir()
    packed = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    ).stdout
    subprocess.run(["tar", "x", "-C", str(CHECKOUT)], input=packed, check=True)
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
    )
    return found.stdout.strip()


def size(*folders: Path) -> int:
    """Bytes of all files in the folders."""
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())


def run_commands(environment: Mapping[str, str], prefix: Sequence[str]) -> tuple[list[str], bool]:
    """Run COMMANDS. Returns a line for every call, and whether all succeeded."""
    lines, good = [], True
    for name, arguments in COMMANDS:
        for call in range(1, MOST_CALLS + 1):
            print(f"{name}, call {call}: python -m {arguments}", flush=True)
            log = LOGS / f"{re.sub(r'[^a-z]+', '-', name.lower())}-{call}.log"
            began = time.monotonic()
            with log.open("wb") as output:
                command = [*prefix, str(PYTHON), "-m", *arguments.split()]
                try:
                    status = subprocess.run(
                        command,
                        cwd=CHECKOUT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        timeout=COMMAND_SECONDS,
                        check=False,
                    ).returncode
                except subprocess.TimeoutExpired:
                    status = 124
            lines.append(f"{name}, call {call}: status {status}, {time.monotonic() - began:.0f} s")
            print(lines[-1], flush=True)
            if status != TIME_IS_UP:
                break
        if status != 0:
            good = False
            print(log.read_text(errors="replace")[-3000:])
    return lines, good


def scenarios(archive: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the scenarios that were timed, and the reason for each that was not."""
    timed: list[str] = []
    reasons: dict[str, str] = {}
    with tarfile.open(archive) as kept:
        for member in kept.getmembers():
            if member.name.endswith("-bench.json") and (content := kept.extractfile(member)):
                result = json.load(content)["result"]
                timed += [one["name"] for one in result["scenarios"]]
                for one in result["not_run"]:
                    reasons[one["name"]] = ("FAILED: " if one["failed"] else "") + one["reason"]
    return timed, reasons


def rehearse() -> tuple[list[str], bool]:
    """Run the rehearsal. Returns its log, and whether it passed."""
    LOGS.mkdir(exist_ok=True)
    ARCHIVE.unlink(missing_ok=True)
    caches = HOME / "caches"
    shutil.rmtree(caches, ignore_errors=True)
    commit = check_out()
    sent = size(CHECKOUT) + size(WHEELS)
    environment = {
        name: value for name, value in os.environ.items() if name in ("PATH", "LANG")
    } | {
        "HOME": str(caches),
        "PYTHONPATH": str(SITE),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Nothing is measured here, so another bench may run on this machine. One thread loses less
        # to a busy core than several that wait for each other. With a TMPDIR of its own, this run
        # has its own device lock and compiler cache.
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(caches),
    }
    caches.mkdir()
    offline = subprocess.run([*OFFLINE, "true"], capture_output=True, check=False).returncode == 0
    versions = subprocess.run(
        [str(PYTHON), "-c", VERSIONS],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    log = [
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit}",
        versions.stdout.strip(),
        f"tracked files and wheels: {sent / 2**20:.1f} MiB of {MOST_BYTES >> 20}",
        f"network: {'none' if offline else 'not disabled: unshare is not allowed here'}",
    ]
    print("\n".join(log), flush=True)
    lines, good = run_commands(environment, OFFLINE if offline else ())
    timed, reasons = scenarios(ARCHIVE) if ARCHIVE.exists() else ([], {})
    failed = {
        name
        for name, why in reasons.items()
        if why.startswith("FAILED") or not NEEDS_GPU.search(why)
    }
    log += [*lines, f"timed ({len(timed)}): {' '.join(timed)}"]
    log += [f"not timed: {name}: {why}" for name, why in sorted(reasons.items())]
    log += [f"failed: {name}" for name in sorted(failed)]
    return log, good and bool(timed) and not failed and sent <= MOST_BYTES


VERSIONS = """
import platform
from importlib.metadata import version
names = "torch triton numpy transformers diffusers torchao xformers".split()
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in names))
"""


def _minor_version(python: str) -> str | None:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _do(*command: str) -> None:
    print(" ".join(command), flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise RehearsalError(f"building the environment failed at: {' '.join(command)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default="python3.12", help="a Python 3.12")
    log_file = ROOT / "bench/results/gpu-rehearsal.txt"
    parser.add_argument("--log", type=output_file, default=str(log_file))
    options = parser.parse_args()
    try:
        build(options.python)
    except RehearsalError as error:
        print(error, file=sys.stderr)
        return 2
    log, good = rehearse()
    log.append("passed" if good else "FAILED")
    options.log.write_text("\n".join(log) + "\n")
    print("\n".join(log[4:]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
