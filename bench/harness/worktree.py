"""Another commit's files in a temporary git worktree, which is always removed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import BenchError
from bench.harness.environment import MEASURED, git

NEEDED = (*MEASURED, "serve/engine", "serve/model")
"""Folders of a commit that this bench imports from."""


@contextmanager
def worktree(revision: str, root: Path) -> Iterator[tuple[Path, str]]:
    """The folder with the commit's files and the commit's full name, until the block ends.

    Its `bench` is replaced by the one at `root`, so that the same code measures both sides.

    Raises:
        BenchError: `root` is no git checkout, there is no such commit, or this bench cannot measure
            it.
    """
    commit = git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        if git(root, "rev-parse", "--git-dir") is None:
            raise BenchError("--base needs a git checkout, and this folder is not in one")
        raise BenchError(f"there is no commit {revision!r} here; use a branch, tag or commit")
    with tempfile.TemporaryDirectory(prefix="stepspan-base-") as folder:
        place = Path(folder) / "base"
        try:
            if git(root, "worktree", "add", "--detach", str(place), commit) is None:
                raise BenchError(f"git could not check out {commit[:12]} into a worktree")
            missing = [name for name in NEEDED if not (place / name).is_dir()]
            if missing:
                raise BenchError(
                    f"the base commit {commit[:12]} cannot be measured by this bench: it has no "
                    f"{missing[0]}/"
                )
            shutil.rmtree(place / "bench", ignore_errors=True)
            shutil.copytree(
                root / "bench",
                place / "bench",
                ignore=shutil.ignore_patterns("__pycache__", "results"),
            )
            yield place, commit
        finally:
            git(root, "worktree", "remove", "--force", str(place))
            git(root, "worktree", "prune")
