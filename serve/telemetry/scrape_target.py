"""A port of its own for a replica's metrics, and the file by which Prometheus finds it.

Behind a proxy that chooses the replica, `/metrics` answers for any of them. So each replica also
serves its metrics itself. The file is one of Prometheus's `file_sd_configs`.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from serve.errors import ConfigurationError


class ScrapeTarget:
    """Listens until it is closed.

    Args:
        host: the address to listen on, which Prometheus reaches.
        port: 0 takes a free one.
        folder: where the file is written, if at all. Prometheus reads all files of it.
        replica: the name that the file gives this process, as the label `replica`.

    Raises:
        ConfigurationError: the address cannot be used.
    """

    def __init__(
        self,
        host: str,
        port: int,
        folder: Path | None,
        replica: str,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigurationError(
                f"metrics cannot be served on {host} port {port}: {error}. Port 0 takes a free one."
            ) from None
        self.address = f"{host}:{self._server.server_port}"
        self._file: Path | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_files_of_ended_processes(folder)
            self._file = folder / f"{socket.gethostname()}-{os.getpid()}.json"
            target = {"targets": [self.address], "labels": {"replica": replica}}
            unfinished = self._file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps([target]))
            unfinished.replace(self._file)

    def close(self) -> None:
        """Stop listening and remove the file. May be called more than once."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()


def remove_files_of_ended_processes(folder: Path) -> None:
    """Remove what processes of this host have left that were killed."""
    for file in folder.glob(f"{socket.gethostname()}-*.json"):
        process = file.stem.rpartition("-")[2]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            file.unlink(missing_ok=True)
