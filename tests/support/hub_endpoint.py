"""A model hub on loopback for the real client library: one repository with its revisions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from bench.service.loopback import LoopbackHandler, serving


@dataclass
class HubEndpoint:
    """The hub's URL, and which files were fetched from it."""

    url: str = ""
    fetched: list[tuple[str, str]] = field(default_factory=list)
    """(revision, path)"""


@contextmanager
def hub_endpoint(repository: str, revisions: dict[str, Path]) -> Iterator[HubEndpoint]:
    """Serve `repository`, each revision's files from its directory, until the block ends."""
    hub = HubEndpoint()
    commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in revisions}
    names = {commit: name for name, commit in commits.items()} | {name: name for name in revisions}

    def files(revision: str) -> dict[str, Path]:
        root = revisions[names[revision]]
        return {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}

    class Handler(LoopbackHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api, file = f"/api/models/{repository}", f"/{repository}/resolve/"
            if path.startswith(file):
                revision, _, name = path.removeprefix(file).partition("/")
                self._file(revision, name)
            elif path.startswith(api + "/tree/"):
                revision = path.removeprefix(api + "/tree/").split("/")[0]
                if revision in names:
                    self._json(
                        [
                            {
                                "type": "file",
                                "path": name,
                                "size": p.stat().st_size,
                                "oid": "0" * 40,
                            }
                            for name, p in files(revision).items()
                        ]
                    )
                else:
                    self._missing("RevisionNotFound")
            elif path == api or path.startswith(api + "/revision/"):
                revision = path.removeprefix(api).removeprefix("/revision/") or "main"
                if revision in names:
                    self._json(
                        {
                            "_id": "1",
                            "id": repository,
                            "sha": commits[names[revision]],
                            "siblings": [{"rfilename": name} for name in files(revision)],
                        }
                    )
                else:
                    self._missing("RevisionNotFound")
            else:
                self._missing("RepoNotFound")

        def _file(self, revision: str, name: str) -> None:
            found = files(revision).get(name) if revision in names else None
            if found is None:
                self._missing("EntryNotFound")
                return
            data = found.read_bytes()
            if self.command == "GET":
                hub.fetched.append((names[revision], name))
            self.send(
                data,
                {
                    "X-Repo-Commit": commits[names[revision]],
                    "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                    "Content-Type": "application/octet-stream",
                },
            )

        def _json(self, value: Any) -> None:
            self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _missing(self, code: str) -> None:
            self.send(b"", {"X-Error-Code": code, "X-Error-Message": "not here"}, status=404)

    with serving(Handler) as hub.url:
        yield hub
