"""A process that sees other file systems: a small, a read-only or a noexec one."""

from __future__ import annotations

import subprocess

import pytest

UNSHARED = ["unshare", "--user", "--map-root-user", "--mount"]
"""The beginning of a command that may mount what it likes, for itself alone."""


def _may_mount() -> bool:
    try:
        return subprocess.run([*UNSHARED, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(not _may_mount(), reason="no user namespaces here")
