"""A model from a hub: the real client against a hub on loopback, in a process of its own."""

from __future__ import annotations

import errno
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from bench.service.loopback import LoopbackHandler, serving
from serve.demo_model import checkpoint_path
from serve.model.hub import HubUnavailable, commit_of, first_line, hub_failure, variant_on_hub
from tests.support.hub_endpoint import HubEndpoint, hub_endpoint
from tests.support.processes import clean_environment, refusing_port

pytestmark = pytest.mark.timeout(300)

REPOSITORY = "someone/tiny-sdxl"

LOAD = """
import json, sys
from serve.errors import ModelError
from serve.model.loading import load_model
said = {}
for name, revision in json.loads(sys.argv[1]):
    try:
        model = load_model(name, revision or None, device_name="cpu")
        said[f"{name}@{revision}"] = f"{model.name} {model.dtype}"
        said[f"commit of {name}@{revision}"] = model.commit
    except ModelError as error:
        said[f"{name}@{revision}"] = f"ModelError: {error}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def revisions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Revision `main` has both precisions, and pickles; `plain` has one precision."""
    root = tmp_path_factory.mktemp("hub")
    plain, both = root / "plain", root / "both"
    shutil.copytree(checkpoint_path(), plain)
    shutil.copytree(checkpoint_path(), both)
    for weights in list(both.rglob("*.safetensors")):
        tensors = load_file(weights)
        save_file(tensors, weights.with_name(weights.name.replace(".safe", ".fp16.safe")))
        save_file({name: t.float() for name, t in tensors.items()}, weights)
        weights.with_suffix(".bin").write_bytes(b"a pickle that must not be fetched")
    return {"main": both, "plain": plain}


def load(hub: HubEndpoint, cache: Path, *wanted: tuple[str, str]) -> dict[str, str]:
    """`name@revision` -> the model's name and type, or the error. In one process of its own, which
    takes seconds to start; each of its loads takes less than one."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(wanted)],
        env=clean_environment(
            {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        ),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


@dataclass(frozen=True)
class Loaded:
    """What loading said, and which files of which revision the hub gave."""

    said: dict[str, str]
    fetched: list[tuple[str, str]]
    said_without_hub: dict[str, str]


@pytest.fixture(scope="module")
def loaded(revisions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    cache = tmp_path_factory.mktemp("cache")
    with hub_endpoint(REPOSITORY, revisions) as hub:
        said = load(
            hub,
            cache,
            (REPOSITORY, ""),
            (REPOSITORY, "plain"),
            (REPOSITORY, "nowhere"),
            ("someone/else", ""),
        )
    # The same address, where nothing listens now.
    return Loaded(said, hub.fetched, load(hub, cache, (REPOSITORY, "plain")))


def test_half_precision_is_fetched_if_the_repository_has_it(loaded: Loaded) -> None:
    assert loaded.said[f"{REPOSITORY}@"] == "tiny-sdxl torch.float32"
    fetched = [path for revision, path in loaded.fetched if revision == "main"]
    weights = [path for path in fetched if "safetensors" in path or ".bin" in path]
    assert len(weights) == 4
    assert all(".fp16.safetensors" in path for path in weights)


def test_a_revision_is_pinned_and_may_have_one_precision(loaded: Loaded) -> None:
    assert loaded.said[f"{REPOSITORY}@plain"] == "tiny-sdxl torch.float32"
    assert {revision for revision, _ in loaded.fetched} == {"main", "plain"}
    fetched = [path for revision, path in loaded.fetched if revision == "plain"]
    assert len([path for path in fetched if path.endswith(".safetensors")]) == 4
    assert not any(".fp16." in path for path in fetched)


def test_a_missing_revision_or_repository_is_an_error(loaded: Loaded) -> None:
    for name, revision in ((REPOSITORY, "nowhere"), ("someone/else", "")):
        said = loaded.said[f"{name}@{revision}"]
        assert said.startswith("ModelError")
        assert name in said


def test_what_was_downloaded_before_is_used_without_the_hub(loaded: Loaded) -> None:
    # A directory's name instead of the repository's would make another model of it.
    plain = f"{REPOSITORY}@plain"
    assert loaded.said_without_hub[plain] == "tiny-sdxl torch.float32"
    assert loaded.said_without_hub[f"commit of {plain}"] == loaded.said[f"commit of {plain}"]


def test_the_commit_of_a_revision_is_known(loaded: Loaded) -> None:
    commits = [loaded.said[f"commit of {REPOSITORY}@{revision}"] for revision in ("", "plain")]
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits)
    assert len(set(commits)) == 2


@pytest.mark.parametrize(
    ("path", "commit"),
    [
        (f"/hub/models--a--b/snapshots/{'0a' * 20}", "0a" * 20),
        (f"/hub/models--a--b/snapshots/{'0a' * 20}/unet/x.safetensors", "0a" * 20),
        ("/hub/models--a--b/snapshots/main", None),
        ("/models/snapshots", None),
        ("/models/sdxl", None),
    ],
)
def test_the_commit_is_read_from_the_hubs_cache_only(path: str, commit: str | None) -> None:
    assert commit_of(Path(path)) == commit


# A hub that does not answer ----------------------------------------------------------------------


@contextmanager
def silent() -> Iterator[int]:
    """A port that accepts connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@contextmanager
def answering(status: int, code: str) -> Iterator[int]:
    class Hub(LoopbackHandler):
        def respond(self) -> None:
            self.send(b"", {"X-Error-Code": code} if code else {}, status)

    with serving(Hub) as url:
        yield int(url.rpartition(":")[2])


@pytest.mark.parametrize(
    ("hub", "said"),
    [
        (refusing_port(), "cannot be reached"),
        (silent(), "cannot be reached"),
        (answering(503, ""), "503"),
        (answering(429, ""), "429"),
        (answering(401, "RepoNotFound"), "no such repository"),
        (answering(404, "RevisionNotFound"), "no revision 'v9'"),
        (answering(403, "GatedRepo"), "granted access"),
    ],
    ids=["refuses", "is silent", "503", "429", "unknown", "no such revision", "gated"],
)
def test_why_the_hub_gives_nothing_is_a_clause_without_its_address(
    hub: AbstractContextManager[int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr("serve.model.hub.HUB_SECONDS", 0.5)
    with hub as port:
        address = f"http://user:hunter2@127.0.0.1:{port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(HubUnavailable, match=said) as caught:
            variant_on_hub(REPOSITORY, "v9")
    assert "hunter2" not in str(caught.value)
    assert str(port) not in str(caught.value)


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "full"), "HF_HOME"),
        (OSError(errno.EDQUOT, "full"), "HF_HOME"),
        (OSError(errno.EROFS, "read-only", "/cache/blobs"), "HF_HOME"),
        (PermissionError(errno.EACCES, "no", "/cache/blobs"), "HF_HOME"),
        (raised_from(OSError("it"), OSError(errno.ENOSPC, "full")), "HF_HOME"),
        # A firewall forbids the connection: no file is named.
        (raised_from(httpx.ConnectError("no"), PermissionError(errno.EPERM, "no")), "reached"),
        (OSError(errno.ECONNREFUSED, "no"), "reached"),
    ],
    ids=["full", "quota", "read-only", "forbidden", "wrapped", "firewall", "refused"],
)
def test_a_disk_that_cannot_be_written_is_not_taken_for_the_hub(
    error: Exception, said: str
) -> None:
    clause = hub_failure(error, None)
    assert said in clause
    assert "/cache" not in clause


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("401 for https://user:pw@hub.example/api/x", "401 for https://...@hub.example/api/x"),
        ("get 'https://cdn.example/f?X-Signature=abc&k=1' failed",
         "get 'https://cdn.example/f?...' failed"),
        ("first\nsecond", "first"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_librarys_message_is_shown_without_what_its_urls_hold(message: str, shown: str) -> None:
    assert first_line(OSError(message)) == shown
