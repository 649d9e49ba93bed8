"""Accepting connections, and how many there may be.

When the limit is reached, a new connection takes the place of the one that has waited longest
without a request. If every one is served, a few more are accepted, which may read `/health`,
`/ready` and `/metrics` only. So clients that are silent or slow cannot keep the process from being
watched, nor use up its file descriptors.

asyncio's own server has no limit. Once there are no descriptors left it logs a traceback for each
connection it cannot accept, thousands a second.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Callable

from serve.errors import ConfigurationError
from serve.http.sockets.connections import Connection, Connections

MAX_CONNECTIONS = 1000
"""The limit if the operator sets none and the process may open enough files."""

RESERVED_CONNECTIONS = 16
"""Connections over the limit, for those who watch the process."""

OTHER_DESCRIPTORS = 48
"""File descriptors for everything else: the model's files, the GPU's devices, exporters."""

BACKLOG = 2048
ACCEPTS_AT_ONCE = 16
RETRY_SECONDS = 0.2


def connection_limit(wanted: int | None) -> int:
    """How many connections may be open, by the setting and by the limit on open files.

    Raises:
        ConfigurationError: the process may not open that many files.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return wanted or MAX_CONNECTIONS
    room = files - OTHER_DESCRIPTORS - RESERVED_CONNECTIONS - ACCEPTS_AT_ONCE
    if wanted is not None and wanted > room:
        raise ConfigurationError(
            f"SDXL_MAX_CONNECTIONS={wanted} needs {files - room + wanted} open files, and this "
            f"process may open {files} (`ulimit -n`). Allowed: up to {max(0, room)}."
        )
    if room < 1:
        raise ConfigurationError(
            f"this process may open {files} files (`ulimit -n`): at least {files - room + 1} are "
            "needed."
        )
    return wanted or min(room, MAX_CONNECTIONS)


class Listener:
    """Accepts connections on a bound socket, up to a limit.

    Args:
        make_connection: called with whether the connection is over the limit.
    """

    def __init__(
        self,
        listening: socket.socket,
        connections: Connections,
        limit: int,
        make_connection: Callable[[bool], Connection],
    ) -> None:
        self._socket = listening
        self._connections = connections
        self._limit = limit
        self._make_connection = make_connection
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        self._closed = False
        listening.setblocking(False)
        listening.listen(BACKLOG)
        self._listen()

    def close(self) -> None:
        """Accept no more."""
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _listen(self) -> None:
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                client, _address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                # No descriptor or no memory. The socket stays readable, so do not watch it for a
                # moment.
                self._connections.log_rarely("not_accepted")
                self._drop_longest_waiting()
                self._loop.remove_reader(self._socket)
                self._retry = self._loop.call_later(RETRY_SECONDS, self._listen)
                return
            self._take(client)

    def _take(self, client: socket.socket) -> None:
        over = len(self._connections.open) - self._limit
        if over >= 0 and self._drop_longest_waiting():
            over -= 1
        if over >= RESERVED_CONNECTIONS:
            self._connections.dropped("too_many_connections")
            client.close()
            return
        client.setblocking(False)
        connection = self._make_connection(over >= 0)
        task = self._loop.create_task(
            self._loop.connect_accepted_socket(lambda: connection, client)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _drop_longest_waiting(self) -> bool:
        """Close the connection that has waited longest without a request, if there is one."""
        connection = next(iter(self._connections.waiting), None)
        if connection is None:
            return False
        self._connections.dropped("too_many_connections")
        self._connections.lost(connection)
        connection.abort()
        return True
