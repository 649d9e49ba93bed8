"""Folders that code is loaded from: refused if another user owns them or could write to them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kernels_warmup.cache.trust import UntrustedFolder, require_trusted, require_trusted_parent
from kernels_warmup.cache.working_directory import (
    CODE_FOLDERS,
    WORKING_PREFIX,
    use_trusted_folders,
)
from tests.kernels_warmup.cache.starts import ROOT, environment

STRANGER = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
ALL = ("TORCHINDUCTOR_CACHE_DIR", *CODE_FOLDERS)


@pytest.fixture(autouse=True)
def _no_folders_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL:
        monkeypatch.setenv(name, "")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder of compiled code, as an operator makes it."""
    folder = tmp_path / "way" / "kept"
    (folder / "ab").mkdir(parents=True)
    (folder / "ab" / "cab.so").write_bytes(b"machine code")
    for path in (folder.parent, folder, folder / "ab", folder / "ab" / "cab.so"):
        path.chmod(0o755)
    return folder


def refused(folder: Path, named: Path) -> str:
    with pytest.raises(UntrustedFolder) as caught:
        require_trusted(folder)
    sentence = str(caught.value)
    assert str(named) in sentence
    assert "\n" not in sentence
    return sentence


def test_a_folder_of_this_user_is_trusted_and_a_missing_one_is_made(kept: Path) -> None:
    require_trusted(kept)
    missing = kept / "not" / "yet"
    require_trusted(missing)
    assert stat.S_IMODE(missing.stat().st_mode) == 0o700


@AS_ROOT
@pytest.mark.parametrize("below", [".", "..", "ab", "ab/cab.so"])
def test_what_another_user_owns_is_refused(kept: Path, below: str) -> None:
    named = (kept / below).resolve()
    os.chown(named, STRANGER, -1)
    assert str(STRANGER) in refused(kept, named)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
@pytest.mark.parametrize("below", [".", "..", "ab", "ab/cab.so"])
def test_what_others_can_write_to_is_refused(kept: Path, below: str, mode: int) -> None:
    named = (kept / below).resolve()
    named.chmod(mode)
    refused(kept, named)


def test_a_sticky_folder_may_be_on_the_way_but_is_not_trusted_itself(kept: Path) -> None:
    kept.parent.chmod(0o1777)
    require_trusted(kept)
    require_trusted_parent(kept.parent)
    refused(kept.parent, kept.parent)


def test_modes_inside_a_closed_folder_follow_the_umask(kept: Path) -> None:
    (kept / "ab").chmod(0o775)
    kept.chmod(0o700)
    require_trusted(kept)


@AS_ROOT
def test_owners_count_inside_a_closed_folder_too(kept: Path) -> None:
    kept.chmod(0o700)
    os.chown(kept / "ab" / "cab.so", STRANGER, -1)
    refused(kept, kept / "ab" / "cab.so")


def test_a_link_is_followed_and_both_ways_are_checked(kept: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(kept)
    require_trusted(link)
    kept.chmod(0o777)
    refused(link, kept)
    kept.chmod(0o755)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    (open_to_all / "link").symlink_to(kept)
    open_to_all.chmod(0o777)
    refused(open_to_all / "link", open_to_all)


@AS_ROOT
def test_a_link_of_another_user_is_refused(kept: Path, tmp_path: Path) -> None:
    """As in /tmp, where anybody may make a link of a name that can be guessed."""
    tmp_path.chmod(0o1777)
    link = tmp_path / "link"
    link.symlink_to(kept)
    os.chown(link, STRANGER, -1, follow_symlinks=False)
    refused(link, link)
    refused(link / "ab", link)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", tmp_path / "file")
    refused(tmp_path / "file" / "below", tmp_path / "file" / "below")


# What a process uses -----------------------------------------------------------------------------


def test_what_no_operator_named_is_private_to_the_process() -> None:
    use_trusted_folders()
    root = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert root.name.startswith(WORKING_PREFIX)
    for name in ALL:
        folder = Path(os.environ[name])
        assert folder == root or root in folder.parents
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    use_trusted_folders()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == root


@AS_ROOT
def test_torchs_default_made_by_another_user_is_not_used() -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    theirs = Path(default_cache_dir())
    assert theirs.parent == Path(tempfile.gettempdir())
    theirs.mkdir()
    os.chown(theirs, STRANGER, -1)
    for value in ("", str(theirs)):  # torch writes its default into the environment
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = value
        use_trusted_folders()
        assert not os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(theirs))


@pytest.mark.parametrize("name", ALL)
def test_a_folder_that_an_operator_named_is_used_or_refused(
    name: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, str(kept))
    use_trusted_folders()
    assert os.environ[name] == str(kept)
    kept.chmod(0o777)
    with pytest.raises(UntrustedFolder, match=str(kept)):
        use_trusted_folders()


def test_triton_compiles_below_a_folder_that_an_operator_named_for_inductor(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kept))
    use_trusted_folders()
    assert os.environ["TRITON_CACHE_DIR"] == str(kept / "triton" / "0")


def test_kernels_that_override_tritons_are_checked(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.chmod(0o777)
    monkeypatch.setenv("TRITON_OVERRIDE_DIR", str(kept))
    use_trusted_folders()  # triton does not read it
    monkeypatch.setenv("TRITON_KERNEL_OVERRIDE", "1")
    with pytest.raises(UntrustedFolder, match=str(kept)):
        use_trusted_folders()


def test_a_folder_for_temporary_files_without_the_sticky_bit_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    monkeypatch.setattr("kernels_warmup.cache.working_directory._directory", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own))
    use_trusted_folders()
    assert own in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parents
    assert not list(shared.iterdir())
    monkeypatch.setattr("kernels_warmup.cache.working_directory._directory", None)
    own.chmod(0o777)
    with pytest.raises(UntrustedFolder, match=str(shared)):
        use_trusted_folders()


ENDS = """
import os, signal, sys
from kernels_warmup.cache.working_directory import remove_process_directory, use_trusted_folders
use_trusted_folders()
print(os.environ["TORCHINDUCTOR_CACHE_DIR"], flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "at once":
    remove_process_directory()
    os._exit(0)
"""


def test_the_directory_goes_with_its_process_or_at_the_next_start() -> None:
    def ended(how: str) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", ENDS, how],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return Path(done.stdout.strip())

    assert not ended("normally").exists()
    assert not ended("at once").exists()
    left = ended("killed")
    assert left.exists()
    assert ended("normally") != left
    assert not left.exists()
