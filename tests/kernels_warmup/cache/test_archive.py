"""The archive file: what is read back, and everything that is refused."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import random
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels_warmup.cache.archive import FORMAT, Refused, TooLarge, pack, unpack

KEY = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "setting shapes": "1024x1024"}
FILES = {
    "ab/cab.py": b"def call(args): return args\n" * 30,
    "ab/cab.so": bytes(range(256)) * 40,
    "fxgraph/qn/fqn/57l": random.Random(1).randbytes(5000),
    "triton/0/EMPTY/kernel.ptx": b"",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "made here"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "ab/cab.so").chmod(0o755)
    return root


@pytest.fixture
def path(tmp_path: Path, root: Path) -> Path:
    path = tmp_path / "whole.archive"
    with path.open("xb") as file:
        pack(file, KEY, root, list(FILES), 1 << 20)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "unpacked" / "here"
    target.mkdir(parents=True)
    return target


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if not path.is_dir()
    }


def test_every_file_comes_back_as_it_was(path: Path, target: Path) -> None:
    packed = unpack(path, KEY, target)
    assert contents(target) == FILES
    assert packed.files == len(FILES)
    assert packed.bytes == path.stat().st_size
    assert os.access(target / "ab/cab.so", os.X_OK)
    for name in FILES:
        assert not (target / name).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def test_the_first_line_is_a_readable_manifest(path: Path, root: Path) -> None:
    with path.open("rb") as file:
        manifest = json.loads(file.readline())
        payload = file.read()
    assert manifest["format"] == FORMAT
    assert manifest["key"] == KEY
    assert manifest["root"] == str(root)
    assert manifest["files"] == len(FILES)
    assert manifest["bytes"] == sum(map(len, FILES.values()))
    assert manifest["payload_bytes"] == len(payload)
    with tarfile.open(fileobj=io.BytesIO(payload), mode="r:xz") as tar:
        assert sorted(tar.getnames()) == sorted(FILES)


def test_similar_kernels_compress_well(tmp_path: Path) -> None:
    kernel = random.Random(2).randbytes(100_000)  # does not compress by itself
    for index in range(20):
        (tmp_path / f"k{index}").write_bytes(b"%d" % index + kernel)
    with (tmp_path / "archive").open("xb") as file:
        packed = pack(file, KEY, tmp_path, [f"k{index}" for index in range(20)], 1 << 30)
    assert packed.bytes < 1.1 * len(kernel)


def test_tritons_file_lists_name_the_new_directory(
    tmp_path: Path, root: Path, target: Path
) -> None:
    kernel = "triton/0/64DFTYFGP5MHS2"
    listed = {"child_paths": {"add.cubin": f"{root}/{kernel}/add.cubin"}}
    elsewhere = {"note": f"{root}/{kernel}/add.cubin"}
    (root / kernel).mkdir(parents=True)
    (root / kernel / "__grp__add.json").write_text(json.dumps(listed))
    (root / kernel / "add.json").write_text(json.dumps(elsewhere))
    with (tmp_path / "archive").open("xb") as file:
        names = [f"{kernel}/__grp__add.json", f"{kernel}/add.json"]
        pack(file, KEY, root, names, 1 << 20)
    unpack(tmp_path / "archive", KEY, target)
    found = json.loads((target / kernel / "__grp__add.json").read_text())
    assert found == {"child_paths": {"add.cubin": f"{target}/{kernel}/add.cubin"}}
    # Only the list of a kernel's files is rewritten.
    assert json.loads((target / kernel / "add.json").read_text()) == elsewhere


def test_past_the_bound_nothing_more_is_written(tmp_path: Path, root: Path) -> None:
    (root / "large").write_bytes(random.Random(3).randbytes(300_000))
    with (tmp_path / "archive").open("xb") as file, pytest.raises(TooLarge):
        pack(file, KEY, root, ["large"], 100_000)
    assert (tmp_path / "archive").stat().st_size <= 100_000


def test_the_bound_is_for_the_whole_file(tmp_path: Path, root: Path, path: Path) -> None:
    size = path.stat().st_size
    with (tmp_path / "a").open("xb") as file:
        # A bound with fewer digits makes the manifest shorter, so this is not exactly `size`.
        assert pack(file, KEY, root, list(FILES), size).bytes <= size
    with (tmp_path / "b").open("xb") as file, pytest.raises(TooLarge):
        pack(file, KEY, root, list(FILES), size - 100)


@pytest.mark.parametrize("left", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_a_truncated_archive_is_refused(path: Path, target: Path, left: float) -> None:
    os.truncate(path, int(path.stat().st_size * left))
    with pytest.raises(Refused, match="damaged"):
        unpack(path, KEY, target)
    assert not contents(target)


def test_a_grown_archive_is_refused(path: Path, target: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(Refused, match=r"damaged: \d+ bytes follow its manifest instead of \d+"):
        unpack(path, KEY, target)


def test_any_flipped_bit_is_noticed_before_a_file_is_written(path: Path, target: Path) -> None:
    whole = path.read_bytes()
    draw = random.Random(4)
    tar_at = whole.index(b"\n") + 1
    positions = [*range(tar_at), *(draw.randrange(tar_at, len(whole)) for _ in range(300))]
    for position in positions:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(Refused):
            unpack(path, KEY, target)
        assert not contents(target)


def test_another_gpu_or_setting_is_named(path: Path, target: Path) -> None:
    here = KEY | {"device": "NVIDIA A100-SXM4-80GB"}
    sentence = "another device: 'NVIDIA H100 80GB HBM3' instead of 'NVIDIA A100-SXM4-80GB'"
    with pytest.raises(Refused, match=sentence):
        unpack(path, here, target)
    with pytest.raises(Refused, match="another setting quantize: None instead of 'fp8'"):
        unpack(path, KEY | {"setting quantize": "fp8"}, target)
    assert not contents(target)


# The following archives are written by hand with the right checksum; their contents are wrong.


def write(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], **manifest: Any) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    entries = {
        "format": FORMAT,
        "key": KEY,
        "root": "/tmp/elsewhere",
        "files": len(members),
        "bytes": sum(len(content) for member, content in members if member.isreg()),
        "payload_bytes": len(packed.getvalue()),
    }
    seal(path, entries | manifest, packed.getvalue())


def seal(path: Path, entries: dict[str, Any], payload: bytes) -> None:
    checked = hashlib.sha256(payload + json.dumps(entries, sort_keys=True).encode())
    line = json.dumps(entries | {"sha256": checked.hexdigest()}).encode()
    path.write_bytes(line + b"   \n" + payload)


def file(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def link(kind: bytes, name: str, to: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def test_an_archive_written_by_hand_is_read(tmp_path: Path, target: Path) -> None:
    write(tmp_path / "hand", [(file("a/b"), b"content")])
    assert unpack(tmp_path / "hand", KEY, target).files == 1
    assert contents(target) == {"a/b": b"content"}


@pytest.mark.parametrize(
    "name", ["../out", "a/../../out", "/out", "//out", "a//b", "./a", "..", "a/..", "/", "a/./b"]
)
def test_no_name_leads_out_of_the_directory(tmp_path: Path, target: Path, name: str) -> None:
    absolute = str(target.parent / "out") if name == "/out" else name
    write(tmp_path / "hand", [(file("good"), b"1"), (file(absolute), b"x")])
    with pytest.raises(Refused, match="leads out of its directory"):
        unpack(tmp_path / "hand", KEY, target)
    assert contents(target.parent) == {"here/good": b"1"}


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
    ],
)
def test_only_regular_files_are_unpacked(tmp_path: Path, target: Path, kind: bytes) -> None:
    members = [(link(kind, "door", str(tmp_path)), b""), (file("door/out"), b"x")]
    write(tmp_path / "hand", members)
    with pytest.raises(Refused, match="'door', which is not a regular file"):
        unpack(tmp_path / "hand", KEY, target)
    assert not list(target.iterdir())
    assert not (tmp_path / "out").exists()


def test_a_name_given_twice_overwrites_nothing(tmp_path: Path, target: Path) -> None:
    write(tmp_path / "hand", [(file("a"), b"first"), (file("a"), b"second")])
    with pytest.raises(Refused, match="cannot be unpacked"):
        unpack(tmp_path / "hand", KEY, target)
    assert contents(target) == {"a": b"first"}


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        ({"format": 2}, "format 2; only format 1 can be read"),
        ({"files": 1}, "more than its manifest says"),
        ({"files": 3}, "less than its manifest says"),
        ({"bytes": 7}, "more than its manifest says"),
        ({"bytes": 9}, "less than its manifest says"),
        ({"bytes": 1 << 60}, "has [0-9]+ left"),
        ({"bytes": "many"}, "damaged"),
        ({"files": None}, "damaged"),
        ({"key": "mine"}, "damaged"),
    ],
)
def test_a_manifest_that_does_not_match_the_files_is_refused(
    tmp_path: Path, target: Path, manifest: dict[str, Any], complaint: str
) -> None:
    write(tmp_path / "hand", [(file("a"), b"1234"), (file("b"), b"5678")], **manifest)
    with pytest.raises(Refused, match=complaint):
        unpack(tmp_path / "hand", KEY, target)


@pytest.mark.parametrize(
    "payload",
    [b"", b"no xz at all", lzma.compress(b"no tar at all" * 100), lzma.compress(b"x" * 5000)[:-20]],
)
def test_a_payload_that_is_no_packed_tar_is_refused(
    tmp_path: Path, target: Path, payload: bytes
) -> None:
    entries = {"format": FORMAT, "key": KEY, "root": "/", "files": 1, "bytes": 1}
    seal(tmp_path / "hand", entries | {"payload_bytes": len(payload)}, payload)
    with pytest.raises(Refused, match="damaged"):
        unpack(tmp_path / "hand", KEY, target)


@pytest.mark.parametrize("line", [b"", b"\n", b"[]\n", b"{}\n", b'"x"\n', b"\xff\n", b"[" * 99999])
def test_a_file_without_a_manifest_is_refused(tmp_path: Path, target: Path, line: bytes) -> None:
    (tmp_path / "hand").write_bytes(line)
    with pytest.raises(Refused):
        unpack(tmp_path / "hand", KEY, target)


# Owner and mode.


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646, 0o602])
def test_a_file_that_others_may_write_is_not_read(path: Path, target: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(Refused, match="may be written by other users"):
        unpack(path, KEY, target)
    path.chmod(0o600)
    assert unpack(path, KEY, target).files == len(FILES)


def test_a_file_of_another_user_is_not_read(
    path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1000)
    if owner != 0:
        with pytest.raises(Refused, match=f"belongs to user {owner}"):
            unpack(path, KEY, target)
        return
    # Everyone reads root's archives; another user's are read by nobody else, root included.
    unpack(path, KEY, target)
    shutil.rmtree(target)
    target.mkdir()
    os.chown(path, 1234, -1)
    for user in (0, 5678):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        with pytest.raises(Refused, match="belongs to user 1234"):
            unpack(path, KEY, target)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert unpack(path, KEY, target).files == len(FILES)


def replaced_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (replaced_by_link, "symbolic link"),
        (replaced_by_pipe, "not a regular file"),
        (replaced_by_directory, "not a regular file"),
    ],
)
def test_what_is_not_a_file_is_refused_without_waiting(
    path: Path, target: Path, change: Callable[[Path], None], complaint: str
) -> None:
    change(path)
    with pytest.raises(Refused, match=complaint):
        unpack(path, KEY, target)


def test_none_is_written_where_every_file_is_writable_by_others(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "this file system has modes of its own")

    monkeypatch.setattr(os, "fchmod", refuse)
    with (tmp_path / "archive").open("xb") as file:
        os.chmod(tmp_path / "archive", 0o777)
        with pytest.raises(Refused, match="may be written by other users"):
            pack(file, KEY, root, list(FILES), 1 << 20)
    assert not (tmp_path / "archive").stat().st_size
