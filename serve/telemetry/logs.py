"""The process's logs: text on a terminal, else JSON. A line about a request has its ids.

All code logs through the standard library and structlog renders it, so the lines of uvicorn,
diffusers and OpenTelemetry have the same form. A prompt, a header's value or a secret is never
logged: of a library's message only what `library_text` lets through.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import structlog

from serve.telemetry import library_text

if TYPE_CHECKING:
    from metrics.sampling import TraceIdentity


class LoggedCall(Protocol):
    """The call that the running code works for; its ids are added to log lines."""

    @property
    def identity(self) -> TraceIdentity: ...
    @property
    def request_id(self) -> str: ...


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Report a line that could not be written. logging's own report has the texts and
        arguments that the line was to leave out."""
        kind = sys.exc_info()[0]
        name = "?" if kind is None else kind.__name__
        with suppress(Exception):
            sys.stderr.write(f"a log line of {record.name} could not be written: {name}\n")


def configure_logging(
    log_format: str, current_call: Callable[[], LoggedCall | None], level: int = logging.INFO
) -> None:
    """Install the process's one log handler, on standard error.

    Args:
        log_format: `text`, `json`, or `auto`: text on a terminal, else JSON.
        current_call: returns the call that the running code works for, or None.
    """

    def add_ids(
        _logger: Any, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        event.pop("color_message", None)  # uvicorn's line once more, in colour
        call = current_call()
        if call is not None:
            event["trace_id"] = call.identity.trace_id_hex
            event["request_id"] = call.request_id
        return event

    if log_format == "auto":
        log_format = "text" if sys.stderr.isatty() else "json"
    renderer: structlog.types.Processor
    if log_format == "text":
        # Its own tracebacks would show the texts that `library_text` leaves out.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    else:
        renderer = structlog.processors.JSONRenderer()
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                library_text.add_extra,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                add_ids,
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                library_text.add_exception,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        # uvicorn installs handlers of its own; its lines go through ours.
        library = logging.getLogger(name)
        library.handlers.clear()
        library.setLevel(logging.NOTSET)
        library.propagate = True
    # The middleware logs one line a request, with its ids.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    # Whatever a caller sends as tracestate is its own affair.
    logging.getLogger("opentelemetry.trace.span").setLevel(logging.CRITICAL)
    quiet_model_libraries()
    # These log every connection.
    for name in ("httpx", "httpx2", "urllib3", "asyncio", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.setLogRecordFactory(library_text.record_factory)
    library_text.hide_texts_of_uncaught_exceptions()


def quiet_model_libraries() -> None:
    """Leave out what model libraries log about packages and kernels that are not needed here. Call
    it before they are imported."""
    # transformers advises to install optional packages, as torchvision.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torchao, which SDXL_QUANTIZE uses, logs at import that kernels for other machines are missing.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)
