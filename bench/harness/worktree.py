"""Another commit beside this one: a temporary git worktree that is always removed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import BenchError
from bench.harness.environment import MEASURED, git


@contextmanager
def worktree(revision: str, root: Path) -> Iterator[tuple[Path, str]]:
    """The commit's files and its full name, until the block ends.

    Its `bench` is replaced by ours, so that both sides are measured by the same code.

    Raises:
        BenchError: `root` is no git checkout, or there is no such commit.
    """
    commit = git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        if git(root, "rev-parse", "--git-dir") is None:
            raise BenchError("--base needs a git checkout, and this is none")
        raise BenchError(
            f"there is no commit {revision!r} here; a branch, tag or commit is allowed"
        )
    with tempfile.TemporaryDirectory(prefix="stepspan-base-") as folder:
        place = Path(folder) / "base"
        try:
            if git(root, "worktree", "add", "--detach", str(place), commit) is None:
                raise BenchError(f"git could not check out {commit[:12]} into a worktree")
            missing = [name for name in MEASURED if not (place / name).is_dir()]
            if missing:
                raise BenchError(f"the base commit {commit[:12]} has no {missing[0]}/ to measure")
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
