"""What of a library's text is shown: its constant parts.

The message of an HTTP client may quote a header with its key, a URL with its password, or what a
server said; a tokenizer's may quote the prompt. Which of them do is known only by reading the
library. So a message's format is shown without its arguments, and an exception as its type and the
places it passed through. The exceptions are listed here, each with the reason.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Iterator, MutableMapping
from typing import Any

import structlog

logger = logging.getLogger(__name__)

OURS = frozenset({"bench", "kernels_warmup", "metrics", "serve"})

# Compilers and drivers get tensors: neither a prompt nor a key reaches them.
_COMPILERS = frozenset({"torch", "torchao", "triton"})

# uvicorn's arguments are process ids, addresses and paths of sockets. The exporters' are sizes and
# the text of an exception or a status that `metrics.otlp.AnswerReader` has replaced by its own.
_SHOWN_WHOLE = (
    *_COMPILERS,
    "uvicorn",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
)

_add_all_extra = structlog.stdlib.ExtraAdder()

_LEFT_OUT = "(the text is not shown: it may quote a secret)"


def record_factory(*arguments: Any, **options: Any) -> logging.LogRecord:
    """Make a log record without a library's text.

    It is done here because diffusers, transformers and huggingface_hub have log handlers of their
    own, which pass the process's by.
    """
    record = logging.LogRecord(*arguments, **options)
    if not record.name:
        return record  # of `logging.makeLogRecord`, which fills in another record's fields
    if not _is_ours(record.name) and not record.name.startswith(_SHOWN_WHOLE):
        record.msg, record.args = _constant_text(record), ()
    if record.exc_info and record.exc_info[1] is not None:
        # What a handler writes; without it, the handler would format the exception by itself.
        record.exc_text = "".join(formatted(record.exc_info[1])).rstrip()
    return record


def add_exception(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A structlog processor that renders a record's exception as `formatted` does."""
    error = event.pop("exc_info", None)
    if isinstance(error, tuple) and error[1] is not None:
        event["exception"] = "".join(formatted(error[1])).rstrip()
    return event


def add_extra(
    logger: Any, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A structlog processor that adds the `extra` fields of our own records."""
    return _add_all_extra(logger, method, event) if _is_ours(event["_record"].name) else event


def formatted(error: BaseException, within: frozenset[int] = frozenset()) -> Iterator[str]:
    """The lines of a traceback, with the text of an exception only where it quotes nothing.

    Args:
        within: the ids of the exceptions whose cause this one is; a chain may be a circle.
    """
    within |= {id(error)}
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and id(cause) not in within:
        yield from formatted(cause, within)
        yield "\nThen:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{described(error)}\n"
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from formatted(part, within)


def described(error: BaseException) -> str:
    """An exception's type, and its text where it is known to quote nothing."""
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    text = _harmless_text(error)
    return f"{name}: {text}" if text else name


def _harmless_text(error: BaseException) -> str:
    if isinstance(error, OSError) and type(error).__module__ == "builtins" and error.errno:
        return os.strerror(error.errno)
    if _is_ours(type(error).__module__) or _root(type(error).__module__) in _COMPILERS:
        return str(error)
    frames = list(traceback.walk_tb(error.__traceback__))
    if frames and _root(frames[-1][0].f_globals.get("__name__", "")) in _COMPILERS:
        return str(error)
    return ""


def hide_texts_of_uncaught_exceptions() -> None:
    """Log uncaught exceptions and warnings, whose text Python would write to standard error."""

    def uncaught(
        kind: type[BaseException], error: BaseException, _trace: types.TracebackType | None
    ) -> None:
        logger.critical("uncaught %s", kind.__name__, exc_info=error)

    def uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
            name = "?" if arguments.thread is None else arguments.thread.name
            logger.critical("uncaught in thread %s", name, exc_info=arguments.exc_value)

    def unraisable(arguments: sys.UnraisableHookArgs) -> None:
        logger.error("ignored %s", arguments.exc_type.__name__, exc_info=arguments.exc_value)

    def warned(
        _message: Warning | str, category: type[Warning], filename: str, line: int, *_: Any
    ) -> None:
        logger.warning("%s at %s:%d %s", category.__name__, filename, line, _LEFT_OUT)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    sys.unraisablehook = unraisable
    warnings.showwarning = warned  # type: ignore[assignment]


def _constant_text(record: logging.LogRecord) -> str:
    """A record's format, if it is a constant of the function that logged it."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == record.pathname and code.co_name == record.funcName:
            if isinstance(record.msg, str) and record.msg in code.co_consts:
                return record.msg
            break
        frame = frame.f_back
    return f"a message of {record.pathname}:{record.lineno} {_LEFT_OUT}"


def _is_ours(name: str) -> bool:
    return _root(name) in OURS or name == "__main__"


def _root(name: str) -> str:
    return name.partition(".")[0]
