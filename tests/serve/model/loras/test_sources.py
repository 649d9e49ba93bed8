"""Where a LoRA's file is: a file, a directory, a repository on a hub on loopback, a shipped one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve.errors import ModelError
from serve.model.loras import sources
from serve.model.loras.sources import find_file
from tests.support.hub_endpoint import hub_endpoint
from tests.support.processes import clean_environment

REPOSITORY = "someone/ink-sdxl"

FIND = """
import json, sys
from serve.errors import ModelError
from serve.model.loras.sources import find_file
for source in json.loads(sys.argv[1]):
    try:
        print(json.dumps(find_file("ink", source).read_text()))
    except ModelError as error:
        print(json.dumps(f"ModelError: {error}"))
"""


def found_on_hub(url: str, cache: Path, *wanted: str) -> list[str]:
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIND, json.dumps(wanted)],
        env=clean_environment(environment),
        capture_output=True, text=True, timeout=110, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(wanted)
    return [json.loads(line) for line in lines]


def folder(root: Path, *names: str) -> Path:
    root.mkdir()
    for name in names:
        (root / name).write_text(f"{root.name}/{name}")
    return root


def test_a_file_and_a_directory(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", "ink.safetensors", "README.md")
    assert find_file("ink", str(one / "ink.safetensors")) == one / "ink.safetensors"
    assert find_file("ink", str(one)) == one / "ink.safetensors"
    usual = folder(tmp_path / "usual", "a.safetensors", "pytorch_lora_weights.safetensors")
    assert find_file("ink", str(usual)).name == "pytorch_lora_weights.safetensors"
    several = folder(tmp_path / "several", "a.safetensors", "b.safetensors")
    with pytest.raises(ModelError, match=r"a\.safetensors, b\.safetensors"):
        find_file("ink", str(several))
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        find_file("ink", str(folder(tmp_path / "none", "ink.bin")))


@pytest.mark.parametrize(
    "source",
    [
        *("/nowhere/ink.safetensors", "ink", "https://example.com/ink.safetensors", "a/b@c@d"),
        *("a/b/../../ink.safetensors", "a/b/../c.safetensors@v1", "../b", "a/.."),
        *("a/b//etc/ink.safetensors", "a/b/c\\d.safetensors", "a/b@../../x", "a/b@/etc"),
        *("a/b@v1/../../x", "a/b@v\\1"),
        *("~nobody-here/ink.safetensors", "x" * 5000),
    ],
)
def test_what_is_nowhere_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match="SDXL_LORAS: ink="):
        find_file("ink", source)


def test_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = folder(tmp_path / "loras", "ink.safetensors")
    monkeypatch.setattr(sources, "loras_path", lambda: shipped)
    assert find_file("x", "demo:ink") == shipped / "ink.safetensors"
    for wrong in ("demo:chalk", "demo:", "demo:../loras/ink"):
        with pytest.raises(ModelError, match="these are: ink"):
            find_file("x", wrong)


def test_a_repository_with_a_revision_and_without_the_hub(tmp_path: Path) -> None:
    revisions = {
        "main": folder(tmp_path / "main", "pytorch_lora_weights.safetensors", "other.safetensors"),
        "v2": folder(tmp_path / "v2", "adapter_model.safetensors", "adapter_config.json"),
    }
    wanted = (REPOSITORY, f"{REPOSITORY}@v2", f"{REPOSITORY}/other.safetensors")
    wrong = (f"{REPOSITORY}@v9", "someone/else", f"{REPOSITORY}/missing.safetensors")
    with hub_endpoint(REPOSITORY, revisions) as hub:
        *found, no_revision, no_repository, no_file = found_on_hub(
            hub.url, tmp_path / "cache", *wanted, *wrong
        )
        assert found == [
            "main/pytorch_lora_weights.safetensors",
            "v2/adapter_model.safetensors",
            "main/other.safetensors",
        ]
        assert ("v2", "adapter_config.json") in {(r, Path(p).name) for r, p in hub.fetched}
        assert "no revision 'v9'" in no_revision
        assert "no such repository" in no_repository
        assert "ModelError" in no_file
        url = hub.url
    # Nothing listens there now.
    assert found_on_hub(url, tmp_path / "cache", *wanted) == found
