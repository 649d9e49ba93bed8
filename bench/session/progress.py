"""What a session keeps between its calls: an archive of its files, and each piece's outcome."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from bench.errors import BenchError
from bench.harness.run_record import ATTEMPTS, code_digest


class Archive:
    """Keeps a folder in one compressed file. At first the file, if it exists, fills the folder.

    Raises:
        BenchError: the file cannot be read or written.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder
        if not path.exists():
            self.write()  # fails now, and not after the first minutes on a GPU
            return
        try:
            with tarfile.open(path) as kept:
                kept.extractall(folder, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise BenchError(f"{path} cannot be read: {type(error).__name__}") from None

    def write(self) -> None:
        """Replace the file with the present content of the folder."""
        beside = self._path.with_name(f".{self._path.name}.new")
        try:
            with tarfile.open(beside, "w:gz") as kept:
                for path in sorted(self._folder.iterdir()):
                    kept.add(path, path.name)
            beside.replace(self._path)
        except OSError as error:
            raise BenchError(f"{self._path} cannot be written: {error.strerror}") from None


class PieceLog:
    """The outcome of each piece, in a file beside the results.

    Failed attempts are counted for one state of the code: when it changes, the counts start at
    zero.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._code = path, code_digest()
        kept = json.loads(path.read_text()) if path.exists() else {}
        self._succeeded: dict[str, bool] = kept.get("succeeded", {})
        same = kept.get("code") == self._code
        self._attempts: dict[str, int] = kept.get("tries", {}) if same else {}

    def succeeded(self, name: str) -> bool:
        return self._succeeded.get(name, False)

    def exhausted(self, name: str) -> bool:
        """Whether the piece failed as often as is allowed."""
        return self._attempts.get(name, 0) >= ATTEMPTS

    def begin(self, name: str) -> None:
        self._attempts[name] = self._attempts.get(name, 0) + 1
        self._write()

    def end(self, name: str, *, success: bool) -> None:
        """Record that the piece ended without failing; `success` if it is complete."""
        self._attempts.pop(name, None)
        self._succeeded[name] = success
        self._write()

    def _write(self) -> None:
        kept = {"code": self._code, "tries": self._attempts, "succeeded": self._succeeded}
        self._path.write_text(json.dumps(kept, indent=1) + "\n")
