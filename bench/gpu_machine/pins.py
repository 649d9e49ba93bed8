"""Whether the fal image's wheels provide every CUDA library that its GPU packages need.

    make gpu-pins

Resolves `[tool.fal.apps.sdxl].requirements` for a CUDA machine (manylinux x86-64) on the table's
Python and on 3.12, downloads the GPU packages except torch, and reads their shared libraries with
readelf. Needs a network; installs nothing.

Exit status: 0 every CUDA library is provided; 1 one is missing; 2 the wheels cannot be read.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = ("torch", "triton", "torchao", "xformers", "nvidia-ml-py")
LIBRARY = re.compile(r"NEEDED.*\[(lib(?:cu|nv).*\.so.*)\]")
"""Matches CUDA's libraries. All others come with the system or with torch."""
PLATFORMS = [f"manylinux{v}_x86_64" for v in (*(f"_2_{v}" for v in range(35, 4, -1)), 2014, 1)]
"""The platforms whose wheels run on such a machine; pip wants each by name."""


def resolve(requirements: list[str], python: str, report: Path) -> dict[str, tuple[str, str]]:
    """Version and URL of every package, by name."""
    _pip("install", *_target(python), "--dry-run", "--ignore-installed", "--report", str(report),
         "--target", str(report.parent / "none"), *requirements)  # fmt: skip
    found = json.loads(report.read_text())["install"]
    return {
        one["metadata"]["name"].lower().replace("_", "-"): (
            one["metadata"]["version"],
            one["download_info"]["url"],
        )
        for one in found
    }


def needed(wheel: Path, folder: Path) -> dict[str, set[str]]:
    """The CUDA libraries that each shared library of a wheel needs."""
    found = {}
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if re.search(r"\.so(\.\d+)*$", name):
                path = files.extract(name, folder)
                listed = subprocess.run(
                    ["readelf", "-d", path], stdout=subprocess.PIPE, text=True, check=True
                ).stdout
                found[name] = set(LIBRARY.findall(listed))
    return found


def check(requirements: list[str], python: str, folder: Path) -> bool:
    """Print the table for one Python. Returns whether every library is provided."""
    packages = resolve(requirements, python, folder / "report.json")
    runtimes = [name for name in packages if name.startswith("nvidia-cuda-runtime")]
    read = [name for name in (*SHOWN, *runtimes) if name != "torch"]
    pinned = [f"{name}=={packages[name][0]}" for name in read]
    _pip("download", *_target(python), "--no-deps", "-d", str(folder), *pinned)
    wheels = {name: folder / packages[name][1].rsplit("/", 1)[1] for name in read}
    provided: dict[str, str] = {}
    for name in runtimes:
        with zipfile.ZipFile(wheels[name]) as files:
            provided |= {Path(file).name: name for file in files.namelist() if ".so." in file}
    complete = True
    print(f"Python {python}\n{'package':26} {'version':12} {'needs':18} provided by")
    print(f"{'torch':26} {packages['torch'][0]:12}")
    for name in read:
        needs = sorted(set().union(*needed(wheels[name], folder / "files").values()))
        print(f"{name:26} {packages[name][0]:12}")
        for library in needs:
            by = provided.get(library)
            complete &= by is not None
            print(f"{'':39} {library:18} {by or 'NOTHING: it does not load'}")
    return complete


def main() -> int:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fal"]["apps"]["sdxl"]
    requirements = [one for one in table["requirements"] if not one.startswith(".")]
    complete = True
    try:
        for python in dict.fromkeys((table["python_version"], "3.12")):
            with tempfile.TemporaryDirectory() as folder:
                complete &= check(requirements, python, Path(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the wheels cannot be read: {error}", file=sys.stderr)
        return 2
    return 0 if complete else 1


def _target(python: str) -> list[str]:
    platforms = [argument for one in PLATFORMS for argument in ("--platform", one)]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]


def _pip(command: str, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", command]
    # Without this machine's pip configuration: a runner installs from the index alone.
    environment = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    subprocess.run([*pip, *arguments], check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())
