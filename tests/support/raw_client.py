"""A client of raw bytes, which decides itself what it sends and when it reads."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

PATIENCE = 15.0
"""How long a client waits for what should take about a second."""

_ERROR_FIELDS = {"detail", "error_type", "trace_id"}

GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Client:
    """A connection to a server."""

    socket: socket.socket

    def send(self, data: bytes | str) -> None:
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def read(self, seconds: float = PATIENCE) -> bytes:
        """What arrives until the server closes its side."""
        received = b""
        self.socket.settimeout(seconds)
        while data := self.socket.recv(65536):
            received += data
        return received

    def answer(self, seconds: float = PATIENCE) -> Answer:
        """The next answer. It must have a length."""
        self.socket.settimeout(seconds)
        received = b""
        while b"\r\n\r\n" not in received:
            data = self.socket.recv(1)
            assert data, received
            received += data
        length = int(re.search(rb"content-length: (\d+)", received.lower())[1])  # type: ignore[index]
        content = b""
        while len(content) < length:
            data = self.socket.recv(length - len(content))
            assert data, received + content
            content += data
        return Answer.parse(received + content)

    def is_closed(self, seconds: float = PATIENCE) -> bool:
        """Whether the server closes the connection, or resets it, in time."""
        try:
            self.read(seconds)
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @classmethod
    def parse(cls, received: bytes) -> Answer:
        head, _, content = received.partition(b"\r\n\r\n")
        line, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return cls(int(line.split()[1]), headers, content)

    def error_type(self) -> str:
        """The type of an error, whose shape is checked."""
        fields = json.loads(self.content)
        assert set(fields) == _ERROR_FIELDS
        assert re.fullmatch("[0-9a-f]{32}", fields["trace_id"])
        assert self.headers["x-trace-id"] == fields["trace_id"]
        return str(fields["error_type"])


@contextmanager
def connected(url: str, receive_buffer: int | None = None) -> Iterator[Client]:
    """A client of the server at `url`; `receive_buffer`: how many bytes it lets arrive unread."""
    address = urlsplit(url)
    with socket.socket() as opened:
        if receive_buffer is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        opened.settimeout(PATIENCE)
        opened.connect((address.hostname, address.port))
        yield Client(opened)


def post(path: str = "/", content: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    """A request; `length` declares another length than the content has."""
    size = len(content) if length is None else length
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {size}", "", ""]).encode() + content
