"""What of a library's messages and exceptions reaches the log."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch

from serve.errors import ModelError
from serve.telemetry.library_text import described, formatted
from serve.telemetry.logs import configure_logging
from tests.support.processes import ROOT, clean_environment

pytestmark = pytest.mark.usefixtures("logging_as_it_was")

SECRET = "hunter2hunter2"

LIBRARIES = (
    "asyncio",
    "diffusers.pipelines.pipeline_utils",
    "fal",
    "httpx",
    "huggingface_hub.file_download",
    "opentelemetry.sdk.resources",
    "opentelemetry.util.re",
    "requests",
    "transformers.modeling_utils",
    "urllib3.connectionpool",
)


@pytest.fixture(params=["json", "text"])
def logged(
    request: pytest.FixtureRequest, logging_as_it_was: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """Configure the log; returns what it has written."""
    for name in ("diffusers", "huggingface_hub", "transformers"):  # imported by another test
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    configure_logging(request.param, lambda: None)
    [handler] = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    stream = io.StringIO()
    handler.setStream(stream)
    return stream.getvalue


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_librarys_message_is_its_constant_text(logged: Callable[[], str], library: str) -> None:
    logging.getLogger(library).error("the header %s was refused by %d", SECRET, 7)
    shown = logged()
    assert "the header %s was refused by %d" in shown
    assert SECRET not in shown


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_message_that_was_put_together_before_is_not_shown(
    logged: Callable[[], str], library: str
) -> None:
    logger = logging.getLogger(library)
    logger.error(f"the header {SECRET} was refused")
    logger.error(ValueError(SECRET))
    logger.error(f"{SECRET} %s", 1)
    logger.error("%(key)s", {"key": SECRET}, extra={"headers": SECRET})
    shown = logged()
    assert SECRET not in shown
    assert shown.count("test_library_text.py") == 3  # where they come from
    assert "%(key)s" in shown


def test_our_own_lines_are_shown_whole(logged: Callable[[], str]) -> None:
    logging.getLogger("serve.http").warning("the limit is %d", 17, extra={"limit": 19})
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 23)
    logging.getLogger("triton.compiler").warning("recompiled for size %d", 29)
    shown = logged()
    assert "recompiled for size 29" in shown
    assert "the limit is 17" in shown
    assert "19" in shown
    assert "Started server process [23]" in shown


def _raise_chain() -> None:
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(f"bad header {SECRET}") from error
    except ValueError:
        raise ConnectionError(SECRET)  # noqa: B904 - the context is what is tested


@pytest.mark.parametrize("name", ["serve.server", "asyncio", "uvicorn.error"])
def test_an_exception_is_shown_by_type_and_place(logged: Callable[[], str], name: str) -> None:
    try:
        _raise_chain()
    except OSError:
        logging.getLogger(name).exception("it failed")
    shown = logged()
    assert SECRET not in shown
    for part in ("it failed", "KeyError", "ValueError", "ConnectionError", "_raise_chain"):
        assert part in shown


def test_a_librarys_own_handler_gets_no_more() -> None:
    """diffusers and transformers write to standard error by handlers of their own."""
    configure_logging("json", lambda: None)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    library = logging.getLogger("diffusers")
    library.addHandler(handler)
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("diffusers.models").error("could not load %s", SECRET, exc_info=True)
    finally:
        library.removeHandler(handler)
    assert "could not load %s" in stream.getvalue()
    assert "ValueError" in stream.getvalue()
    assert SECRET not in stream.getvalue()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", SECRET), "No such file or directory"),
        (ModelError("the model lacks a part"), "the model lacks a part"),
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), "tried to allocate 2 GiB"),
        (OSError(SECRET), ""),
        (UnicodeEncodeError("latin-1", SECRET, 0, 1, SECRET), ""),
        (RuntimeError(SECRET), ""),
    ],
)
def test_a_text_that_quotes_nothing_is_shown(error: Exception, text: str) -> None:
    assert described(error).partition(": ")[2] == text


def test_what_torch_raises_is_shown_by_its_text() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught:
        torch.nn.Linear(2, 2)(torch.zeros(3, 3))
    assert "shapes" in "".join(formatted(caught.value))


@pytest.mark.usefixtures("logged")
def test_a_line_that_cannot_be_written_is_reported_without_its_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = logging.getLogger().handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.stream.close()
    logging.getLogger("serve.http").error("%s", SECRET)
    reported = capsys.readouterr().err
    assert "serve.http" in reported
    assert "ValueError" in reported
    assert SECRET not in reported


def test_a_circle_of_causes_ends() -> None:
    one, other = ValueError(SECRET), TypeError(SECRET)
    one.__cause__, other.__cause__ = other, one
    lines = "".join(formatted(one))
    assert lines.index("TypeError") < lines.index("ValueError")
    assert lines.count("Error\n") == 2


def test_a_group_shows_its_parts_without_their_text() -> None:
    group = ExceptionGroup(SECRET, [ValueError(SECRET), TypeError(SECRET)])
    lines = "".join(formatted(group))
    assert "ValueError" in lines
    assert "TypeError" in lines
    assert SECRET not in lines


UNCAUGHT = """
import asyncio, gc, threading, warnings
from serve.telemetry.logs import configure_logging

configure_logging("json", lambda: None)
SECRET = "hunter2" * 2

warnings.warn(SECRET)
thread = threading.Thread(target=int, args=(SECRET,), name="a thread")
thread.start()
thread.join()
type("A", (), {"__del__": lambda self: int(SECRET)})()

async def work():
    raise ValueError(SECRET)

async def main():
    asyncio.create_task(work())
    await asyncio.sleep(0)

asyncio.run(main())
gc.collect()
raise KeyError(SECRET)
"""


def test_what_nobody_catches_is_logged_without_its_text() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCAUGHT],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert SECRET not in done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    warning, thread, finaliser, task, main = lines
    assert "UserWarning" in warning["event"]
    assert "a thread" in thread["event"]
    for line in (thread, finaliser, task):
        assert line["exception"].endswith("ValueError")
    assert main["exception"].endswith("KeyError")
    assert done.returncode == 1


def test_warnings_are_logged_by_category_and_place(logged: Callable[[], str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning(UserWarning(SECRET), UserWarning, "somewhere.py", 7)
    shown = logged()
    assert "UserWarning at somewhere.py:7" in shown
    assert SECRET not in shown
