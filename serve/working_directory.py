"""What lies in the working directory must not replace our packages.

`python -m NAME` puts the working directory before the installed packages, so a `metrics.py` there
would be imported instead of ours. The installed command `stepspan` never looks there. A `serve.py`
there replaces this package itself under `python -m serve`, which nothing here can notice.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Where our packages are: a checkout, or the folder of installed packages."""

PACKAGES = ("bench", "kernels_warmup", "metrics", "serve")


def name_shadowing_files(command: str) -> None:
    """Say on standard error which files of the working directory have the names of our packages.

    Args:
        command: what to run instead, which is not subject to this.
    """
    here = Path.cwd()
    if here == ROOT:
        return
    found = [
        path.name
        for name in PACKAGES
        for path in (here / f"{name}.py", here / name)
        if path.is_file() or (path / "__init__.py").is_file()
    ]
    if found:
        print(
            f"stepspan: {' and '.join(found)} in the working directory {here} would replace a part "
            f"of stepspan under `python -m`, and is not used; {command}.",
            file=sys.stderr,
        )
