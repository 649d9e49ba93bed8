"""A client's connection to the self-hosted server, and its limits.

uvicorn's h11 protocol parses requests and runs the app, but leaves a client all the time it wants.
Here every wait for a client has a limit:

    opened ──> the head arrives ──> the body arrives ──> the answer is taken ──> kept for the next
           header_seconds       read_body           send_seconds            keep_alive_seconds

A head is a request's line and headers. Reading a body is the app's part (`request_body.py`), as is
what runs between. What is refused before there is a request is answered here, in the shape of every
other error. `listener.py` limits how many connections there are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from serve.errors import Draining, HeadTooSlow, MalformedHttp, RequestError
from serve.http.error_responses import response_outside_the_app
from serve.http.service import Service
from serve.http.sockets.early_answers import OVER_THE_LIMIT
from serve.http.sockets.parser import CheckedParser

logger = logging.getLogger(__name__)

MAX_PIPELINED_BYTES = 64 * 1024
"""What may follow a request for an image before its answer."""

LINGER_SECONDS = 1.0
"""How long a refused client may take to read why. Closing at once would reset the connection while
the client still sends, and it would lose the answer."""

SHORT_SEND_SECONDS = 1.0
"""Takes the place of `send_seconds` once the process shuts down, and on connections over the
limit."""

_LOG_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How long a connection may wait for its client, in seconds.

    Attributes:
        header_seconds: from the opening, or a later request's first byte, to the end of a head.
        keep_alive_seconds: from an answer to the next request's first byte.
        send_seconds: until the system has taken all that was sent; its buffers are megabytes.
    """

    header_seconds: float
    keep_alive_seconds: float
    send_seconds: float


class Connections:
    """The open connections of a server.

    Attributes:
        waiting: those without a request, the one that has waited longest first.
        draining: the process shuts down.
    """

    def __init__(self, limits: ConnectionLimits, service: Service) -> None:
        self.limits = limits
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}
        self.draining = False
        self._service = service
        self._unlogged: Counter[str] = Counter()
        self._logged_at = -_LOG_SECONDS

    def opened(self, connection: Connection) -> None:
        self.open.add(connection)
        self._service.metrics.set_connections(len(self.open))

    def lost(self, connection: Connection) -> None:
        self.open.discard(connection)
        self.waiting.pop(connection, None)
        self._service.metrics.set_connections(len(self.open))

    def shut_down(self) -> None:
        """The process begins to shut down: every connection ends with what it does now."""
        self.draining = True
        for connection in list(self.open):
            if connection.transport is not None:
                connection.shutdown()

    def dropped(self, reason: str) -> None:
        """Count a connection that the server closes because of the client."""
        self._service.metrics.connection_dropped(reason)
        self.log_rarely(reason)

    def log_rarely(self, what: str) -> None:
        """Log what happens to connections: one line a minute, with the numbers until then."""
        self._unlogged[what] += 1
        now = time.monotonic()
        if now - self._logged_at >= _LOG_SECONDS:
            self._logged_at = now
            numbers = ", ".join(f"{name} {number}" for name, number in self._unlogged.items())
            self._unlogged.clear()
            logger.warning("connections closed or refused, %d open: %s", len(self.open), numbers)


class Connection(H11Protocol):
    """One client's connection, from its opening to its end."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.conn: CheckedParser = CheckedParser()
        self.timeout_keep_alive = connections.limits.keep_alive_seconds  # type: ignore[assignment]
        self._all = connections
        self._limits = connections.limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._refused = False
        self._over_the_limit = OVER_THE_LIMIT in app_state
        connections.opened(self)

    @property
    def _serves(self) -> bool:
        """Whether a request is being read, served or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _reads_a_state(self) -> bool:
        """Whether the last request draws nothing, and so may be answered though the client has
        closed its side."""
        return self.scope["method"] in ("GET", "HEAD")

    # Opened, and lost

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # From now on `pause_writing` means that the system has not taken all that was written, and
        # `resume_writing` that it has.
        transport.set_write_buffer_limits(0)
        self._wait_for_head()
        if self._all.draining:
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.lost(self)
        for timer in (self._head_timer, self._send_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close at once, whatever the client was sent or sends."""
        self.transport.abort()

    # The head

    def _wait_for_head(self) -> None:
        self._all.waiting.setdefault(self)
        self._head_timer = self.loop.call_later(self._limits.header_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(HeadTooSlow(self._limits.header_seconds))
        else:  # nothing was asked, so nothing is answered
            self._all.dropped(HeadTooSlow.error_type)
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # read and dropped until the client has the answer
        super().data_received(data)
        busy = self._serves or self._refused or self.transport.is_closing()
        if self._head_timer is None and not busy:
            self._wait_for_head()  # the first bytes of another request

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head_has_arrived()
            if self._over_the_limit:
                self._serve_no_further_request()
        if self.conn.problem is not None and not self._refused:
            self._refuse(self.conn.problem)
        self._watch_for_the_end()

    def _watch_for_the_end(self) -> None:
        """Read on while an image is drawn, whatever else the client has sent.

        uvicorn stops reading as soon as a byte follows a request, and then the end of the
        connection would not be noticed.
        """
        if not self._serves or self._refused or self.cycle.more_body or self._reads_a_state:
            return
        if len(self.conn.trailing_data[0]) > MAX_PIPELINED_BYTES:
            self._refuse(MalformedHttp("Too much was sent before the answer."))
        else:
            self.flow.resume_reading()

    def _head_has_arrived(self) -> None:
        self._all.waiting.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _should_upgrade(self) -> bool:
        return False  # there is no other protocol; uvicorn would log each wish for one

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client has closed its side, or all of it.

        A client that waits for an image has left: the work should stop. One that reads a state gets
        its answer, because some tools close their side as soon as they have asked.
        """
        if self._serves and not self.cycle.more_body and self._reads_a_state:
            self.cycle.keep_alive = False
            return True
        return None

    # Refused before there is a request

    def _refuse(self, error: RequestError) -> None:
        """Answer what is no request, or is none any more, and end the connection."""
        if self.transport.is_closing():
            return
        self._all.dropped(error.error_type)
        self._refused = True
        self._head_has_arrived()
        if self._serves:  # its body is malformed: for the app, the client has left
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # an answer has begun
            return
        answer = response_outside_the_app(error)
        close = (b"connection", b"close")
        headers = [*self.server_state.default_headers, *answer.raw_headers, close]
        reason = STATUS_PHRASES[error.status]
        response = h11.Response(status_code=error.status, headers=headers, reason=reason)
        content = (h11.Data(data=bytes(answer.body)), h11.EndOfMessage())
        # What answers HEAD ends with its head (RFC 9110, 9.3.2).
        for event in (response, *(() if self.conn.is_head else content)):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self.flow.resume_reading()
        self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    # The answer

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit_sending()

    def resume_writing(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()

    def _limit_sending(self) -> None:
        seconds = self._limits.send_seconds
        if self._all.draining or self._over_the_limit:
            seconds = min(seconds, SHORT_SEND_SECONDS)
        self._send_timer = self.loop.call_later(seconds, self._answer_not_taken)

    def _answer_not_taken(self) -> None:
        self._all.dropped("answer_not_taken")
        self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._serves or self._refused or self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()  # the rest of the request's body would be read for ever
        elif self.conn.trailing_data[0]:
            self._unset_keepalive_if_required()
            self._wait_for_head()
        else:
            self._all.waiting.setdefault(self)

    def _serve_no_further_request(self) -> None:
        """End the connection after the answer to the request that is served."""
        self.cycle.keep_alive = False
        if not self.cycle.response_started:
            close = (b"connection", b"close")
            self.cycle.default_headers = [*self.cycle.default_headers, close]

    # Shutting down

    def shutdown(self) -> None:
        """The process begins to shut down: no further request, and less time for the answer."""
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._limit_sending()
        if self._refused:
            return
        if self._serves:
            self._serve_no_further_request()
        elif self.conn.trailing_data[0] and not self.transport.is_closing():
            self._refuse(Draining())
        else:
            super().shutdown()
