"""Log lines that carry their request: text on a terminal, JSON elsewhere.

Everything logs through the standard library; structlog renders it, so lines of uvicorn, diffusers
and OpenTelemetry look like ours. Never logged: a prompt, a header's value, a secret.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from serve.engine.call import current_call


def configure_logging(log_format: str, level: int = logging.INFO) -> None:
    """Install the process's one log handler, on standard error.

    Args:
        log_format: `text`, `json`, or `auto`: text on a terminal, else JSON.
    """
    # Advice about optional parts (torchvision is one) is noise to whoever runs a server.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if log_format == "auto":
        log_format = "text" if sys.stderr.isatty() else "json"
    renderer: structlog.types.Processor
    if log_format == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    else:
        renderer = structlog.processors.JSONRenderer()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _add_ids,
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        # uvicorn brings handlers of its own; its lines go through ours.
        library = logging.getLogger(name)
        library.handlers.clear()
        library.setLevel(logging.NOTSET)
        library.propagate = True
    # One line a request is ours, with its ids; httpx and the like tell of every connection.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    # These two quote what they could not parse: a header's value, a caller's tracestate.
    for name in ("opentelemetry.util.re", "opentelemetry.trace.span"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # torchao is there for SDXL_QUANTIZE; importing it tells of kernels for other machines.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("httpx", "urllib3", "asyncio", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _add_ids(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    event.pop("color_message", None)  # uvicorn's line again, in colour
    call = current_call.get()
    if call is not None:
        event["trace_id"] = call.identity.trace_id_hex
        event["request_id"] = call.request_id
    return event
