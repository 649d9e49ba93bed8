"""A file or folder for results that cannot be written ends a command before its work begins."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from bench import __main__, outputs
from bench.__main__ import COMMANDS
from bench.errors import BenchError
from bench.outputs import check_can_write, check_folder, output_file, output_folder

INPUTS = {
    ("show", "file"),
    ("kernels", "launches"),
    ("compare", "files"),
    ("capacity", "results"),
}
"""Options and arguments that name a file to read."""


def paths_of(name: str) -> list[argparse.Action]:
    """The options of a command that name a file or folder."""
    parser = argparse.ArgumentParser()
    COMMANDS[name].load().add_arguments(parser)
    kinds = (Path, output_file, output_folder)
    return [action for action in parser._actions if action.type in kinds]


def test_every_path_that_a_command_writes_is_checked_as_it_is_read() -> None:
    found = {(name, action.dest): action for name in COMMANDS for action in paths_of(name)}
    written = {key: action for key, action in found.items() if key not in INPUTS}
    assert all(action.type in (output_file, output_folder) for action in written.values()), [
        key for key, action in written.items() if action.type is Path
    ]
    assert {name for name, dest in written if dest == "out"} >= {"run", "load", "coldstart"}
    assert {dest for _, dest in written} == {"out", "results", "archive", "html"}


@pytest.mark.parametrize(
    ("command", "option"),
    [(name, action.option_strings[-1]) for name in COMMANDS for action in paths_of(name)
     if action.option_strings and (name, action.dest) not in INPUTS],
)  # fmt: skip
def test_a_command_stops_before_its_work(
    command: str,
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(_options: object) -> int:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(COMMANDS[command].load(), "run", work)
    needed = {
        "show": [str(tmp_path)],
        "load": ["--url", "http://127.0.0.1:9"],
        "capacity": ["--rate", "1", "--p95", "1", "--results", str(tmp_path)],
        "precompile": ["--scenario", "served"],
    }
    nowhere = tmp_path / "nowhere" / "result.json"
    with pytest.raises(SystemExit) as stop:
        __main__.main([command, *needed.get(command, []), option, str(nowhere)])
    assert stop.value.code == 2
    assert str(nowhere) in capsys.readouterr().err


def test_a_run_checks_the_file_that_it_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --out it writes into the working directory: here one where nobody can."""
    monkeypatch.chdir("/proc")
    assert __main__.main(["run", "--scenario", "diffusers", "--device", "cpu"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_check_leaves_no_trace(tmp_path: Path) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    os.utime(old, (1, 1))
    for path in (new, old):
        check_can_write(path)
    check_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (old.read_text(), old.stat().st_mtime) == ("kept", 1)
    check_can_write(Path(os.devnull))


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere" / "x")
    for path in (tmp_path, file / "below", tmp_path / "no" / "file", dangling):
        with pytest.raises(BenchError, match="cannot be written") as caught:
            check_can_write(path)
        assert str(path) in str(caught.value)
    for path in (file, tmp_path / "nowhere"):
        with pytest.raises(BenchError, match="folder"):
            check_folder(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_permissions_are_those_of_the_user_who_runs_it(tmp_path: Path) -> None:
    """Root may write anywhere, so a child becomes another user."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    locked = tmp_path / "locked.json"
    locked.touch(0o644)
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        refused = 0
        for check, path in (
            (check_can_write, locked),
            (check_can_write, tmp_path / "new.json"),
            (check_folder, tmp_path),
        ):
            try:
                check(path)
            except BenchError:
                refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


def test_a_disk_that_fills_up_is_a_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(BenchError, match="cannot be written: No space left"):
        outputs.write_json(Path("/dev/full"), {"figures": list(range(10_000))})
