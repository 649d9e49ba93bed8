"""Fetching a picture from a real TLS server: only from an allowed host, within every limit."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from serve.engine.pictures import fetching
from serve.engine.pictures.fetching import fetch_picture
from serve.errors import MAX_PICTURE_BYTES, UnusablePicture
from tests.support.certificates import self_signed

SECONDS = 0.5
SECRET = "a-token-that-no-answer-repeats"

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Host:
    """A TLS server on 127.0.0.1 with one answer to every request."""

    def __init__(self, answer: Answer, tls: ssl.SSLContext) -> None:
        self.heads: list[bytes] = []
        self.place = ""
        self._answer = answer
        self._tls = tls

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Host]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            await self._answer(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    for path, pem in zip(paths, self_signed(), strict=True):
        path.write_bytes(pem)
    return paths


@pytest.fixture
def tls(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ssl.SSLContext]:
    """The server's TLS, whose certificate this process trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setattr(fetching, "FETCH_SECONDS", SECONDS)
    fetching._trusted.cache_clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    yield context
    fetching._trusted.cache_clear()


def sends(data: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


def head(status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return ("\r\n".join([*lines, "Connection: close"]) + "\r\n\r\n").encode()


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(head())
    while True:
        writer.write(bytes(65536))
        await writer.drain()


async def drips(writer: asyncio.StreamWriter) -> None:
    writer.write(head(Content_Length="1000"))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(5)


def fetched(tls: ssl.SSLContext, answer: Answer) -> tuple[bytes, Host]:
    host = Host(answer, tls)

    async def story() -> bytes:
        async with host.listening():
            return await fetch_picture(f"https://{host.place}/{SECRET}?x=1#y", [host.place])

    return asyncio.run(story()), host


def refused(tls: ssl.SSLContext, answer: Answer) -> tuple[str, Host]:
    host, began = Host(answer, tls), time.monotonic()

    async def story() -> None:
        async with host.listening():
            await fetch_picture(f"https://{host.place}/{SECRET}", [host.place])

    with pytest.raises(UnusablePicture) as caught:
        asyncio.run(story())
    assert time.monotonic() - began < SECONDS + 2
    assert SECRET not in caught.value.message
    (problem,) = caught.value.problems
    assert problem.location == ("body", "image_url")
    return problem.kind, host


def test_a_picture_is_fetched(tls: ssl.SSLContext) -> None:
    data, host = fetched(tls, sends(head(Content_Length="3") + b"abc"))
    assert data == b"abc"
    (request,) = host.heads
    assert request.startswith(f"GET /{SECRET}?x=1 HTTP/1.1\r\n".encode())
    assert b"accept-encoding: identity" in request.lower()


def test_a_body_without_a_length_may_be_as_large_as_is_allowed(tls: ssl.SSLContext) -> None:
    data, _ = fetched(tls, sends(head() + bytes(1000)))
    assert data == bytes(1000)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (sends(head("302 Found", Location="https://169.254.169.254/")), "fetch"),
        (sends(head("301 Moved", Location="/elsewhere")), "fetch"),
        (sends(head("404 Not Found", Content_Length="0")), "fetch"),
        (sends(head("206 Partial Content", Content_Length="1") + b"x"), "fetch"),
        (sends(head("500 Oh No", Content_Length="0")), "fetch"),
        (sends(head(Content_Length=str(MAX_PICTURE_BYTES + 1))), "too_large"),
        (endless, "too_large"),
        (drips, "fetch"),
        (silent, "fetch"),
        (sends(b"nonsense\r\n\r\n"), "fetch"),
        (sends(b""), "fetch"),
        (sends(head(Content_Length="10") + b"short"), "fetch"),
    ],
)
def test_any_other_answer_is_refused_in_time(
    tls: ssl.SSLContext, answer: Answer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer is endless:  # the machine may be busy
        monkeypatch.setattr(fetching, "FETCH_SECONDS", 10)
    found, host = refused(tls, answer)
    assert found == kind
    assert len(host.heads) == 1, "a redirect was followed"


def test_a_host_must_prove_its_name(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of a machine that an allowed name leads to, unless it has a certificate for
    that name: so it does not matter which address the name leads to."""
    host = Host(sends(head(Content_Length="0")), tls)

    async def fetch(name: str) -> None:
        async with host.listening():
            place = host.place.replace("127.0.0.1", name)
            await fetch_picture(f"https://{place}/", [place])

    with pytest.raises(UnusablePicture):
        asyncio.run(fetch("localhost"))
    monkeypatch.delenv("SSL_CERT_FILE")
    fetching._trusted.cache_clear()
    with pytest.raises(UnusablePicture):
        asyncio.run(fetch("127.0.0.1"))
    assert host.heads == []


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example/a.png",
        "HTTPS:/images.example/a.png",
        "//images.example/a.png",
        "images.example/a.png",
        "https://other.example/a.png",
        "https://images.example.evil.example/a.png",
        "https://images.example:8443/a.png",
        "https://images.example.:443/a.png",
        "https://user:password@images.example/a.png",
        "https://images.example@other.example/a.png",
        "https://other.example#@images.example/",
        "https://other.example\\@images.example/",
        "https://127.0.0.1/a.png",
        "https://[::1]/a.png",
        "https://2130706433/",
        "https://169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/",
        "file:///etc/passwd",
        "ftp://images.example/a.png",
        "gopher://images.example/",
        "https://",
        "https://images.example:99999/",
        "https://images.example/" + "a" * 5000,
        "https://images.ex\tample/",
        "https://\ud800/",
        "",
    ],
)
def test_other_places_are_refused_without_a_connection(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_connection(_url: str) -> bytes:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(fetching, "_get", no_connection)
    for hosts in ([], ["images.example"]):
        with pytest.raises(UnusablePicture) as caught:
            asyncio.run(fetch_picture(url, hosts))
        assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "url", ["https://images.example/a", "https://IMAGES.example:443/a", "https://b.example:8443/"]
)
def test_allowed_places(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def get(_url: str) -> bytes:
        return b"data"

    monkeypatch.setattr(fetching, "_get", get)
    assert asyncio.run(fetch_picture(url, ["images.example", "b.example:8443"])) == b"data"
