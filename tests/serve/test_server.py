"""The self-hosted server: address, connections, signals. Its app: tests/serve/http."""

from __future__ import annotations

import resource
import signal

import pytest
import uvicorn
from fastapi import FastAPI

from serve import server
from serve.engine.runtime import Runtime
from serve.errors import ConfigurationError
from serve.http.sockets.listener import MAX_CONNECTIONS, connection_limit
from serve.server import bind
from serve.settings import ServeSettings


def test_the_number_of_connections_follows_from_the_open_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def limited_to(files: int) -> None:
        monkeypatch.setattr("resource.getrlimit", lambda _: (files, files))

    limited_to(resource.RLIM_INFINITY)
    assert connection_limit(None) == MAX_CONNECTIONS
    assert connection_limit(5000) == 5000
    limited_to(1024)
    room = connection_limit(None)
    assert 800 < room < 1000
    assert connection_limit(room) == room
    with pytest.raises(ConfigurationError, match=f"SDXL_MAX_CONNECTIONS={room + 1} .* {room}\\."):
        connection_limit(room + 1)
    limited_to(64)
    with pytest.raises(ConfigurationError, match="64 files"):
        connection_limit(None)


@pytest.mark.parametrize("ignored", [True, False])
def test_sighup_is_left_alone_under_nohup(app: FastAPI, runtime: Runtime, ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with bind("127.0.0.1", 0) as listening:
            process = server._Server(uvicorn.Config(app), runtime, listening, 10)
            with process.capture_signals():
                handler = signal.getsignal(signal.SIGHUP)
        assert handler == (signal.SIG_IGN if ignored else process.handle_exit)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_address_that_cannot_be_bound() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port}"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigurationError, match="cannot listen"):
        bind("127.0.0.1", 99_999)


def test_a_missing_model_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(ConfigurationError, match=r"torch not installed: `pip install 'stepspan\["):
        server.run(ServeSettings(), "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("0.0.0.0", True),
        ("::", True),
        ("::ffff:0.0.0.0", True),
        ("192.0.2.7", True),
        ("fe80::1%eth0", True),
    ],
)
def test_who_reaches_an_address_is_known(
    caplog: pytest.LogCaptureFixture, address: str, reached: bool
) -> None:
    assert (server.reachable_by(address) is not None) == reached
    server.warn_if_open(ServeSettings(), address, 8080)
    assert ("SDXL_API_KEYS" in caplog.text) == reached
    caplog.clear()
    keyed = ServeSettings(api_keys="alice=Wm4tZc8NvR2qLx6Y")  # type: ignore[arg-type]
    server.warn_if_open(keyed, address, 8080)
    assert caplog.text == ""
