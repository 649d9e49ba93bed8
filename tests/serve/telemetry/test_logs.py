from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from metrics.sampling import TraceIdentity
from serve.engine.call import Call, current_call
from serve.telemetry.logs import configure_logging


@pytest.fixture(autouse=True)
def _root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_their_request(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("auto", current_call.get)  # no terminal here: JSON
    call = Call("/", "POST", TraceIdentity(trace_id=0xABC, span_id=1, exported=False))
    token = current_call.set(call)
    logging.getLogger("serve.test").warning("careful: %d", 7)
    current_call.reset(token)
    logging.getLogger("uvicorn.error").info("from a library")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["event"] == "careful: 7"
    assert first["level"] == "warning"
    assert first["trace_id"] == format(0xABC, "032x")
    assert first["request_id"] == call.request_id
    assert second["logger"] == "uvicorn.error"
    assert "trace_id" not in second


def test_text_is_one_line_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text", current_call.get)
    logging.getLogger("serve.test").info("hello")
    [line] = capsys.readouterr().err.splitlines()
    assert "hello" in line
    assert not line.startswith("{")


def test_an_exception_is_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", current_call.get)
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("serve.test").exception("it failed")
    [line] = capsys.readouterr().err.splitlines()
    assert "ValueError: no" in json.loads(line)["exception"]
