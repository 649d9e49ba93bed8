"""Who may use the service, in process: on a runtime without a model, which answers 503 to whoever
may draw. With a model and real clients: tests/e2e/test_api_keys.py."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message

from serve.engine.build import build_runtime
from serve.engine.call import the_call
from serve.engine.runtime import ENDPOINTS, Runtime
from serve.http.authentication import given_keys, is_operator
from serve.http.middleware import RequestMiddleware
from serve.http.playground.page_files import page_files
from serve.http.security_headers import SECURITY_HEADERS
from serve.http.sockets.early_answers import OVER_THE_LIMIT
from serve.server import create_app
from serve.settings import ServeSettings

ALICE, ALICES_NEXT, BOB = "Wm4tZc8NvR2qLx6Y", "pK7dHs3BgF9jTe5A", "uC1yXn6VbM4wQz8E"
ADMIN = "hG2rSk5UeJ8oDi3P"
PROMPT = "a zebra that no error may mention"
BODY = {"prompt": PROMPT, "num_inference_steps": 1}
DRAWING = ("/", "/stream", "/image-to-image", "/image-to-image/stream", "/v1/images/generations")
AWAY = "192.0.2.7"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    settings = ServeSettings(
        model="demo",
        device="cpu",
        api_keys=f"alice:2={ALICE},alice={ALICES_NEXT},bob={BOB}",  # type: ignore[arg-type]
        admin_token=ADMIN,  # type: ignore[arg-type]
        profile_dir=tmp_path_factory.mktemp("profiles"),
    )
    runtime = build_runtime(settings, CollectorRegistry())
    yield runtime
    runtime.close(5)


@pytest.fixture(scope="module")
def app(runtime: Runtime) -> FastAPI:
    return create_app(runtime)


def ask(
    app: Any, method: str, path: str, key: str = "", client: str = AWAY, **options: Any
) -> httpx.Response:
    headers = options.pop("headers", {})
    if key:
        headers = {"authorization": f"Bearer {key}"} | headers

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.request(method, path, headers=headers, **options)

    return asyncio.run(once())


def metric(runtime: Runtime, name: str, **labels: str) -> float:
    runtime.recorder._executor.submit(lambda: None).result(30)
    return runtime.metrics.registry.get_sample_value(name, labels) or 0.0


# Keys


@pytest.mark.parametrize("path", DRAWING)
def test_without_a_key_nothing_is_drawn(app: FastAPI, path: str) -> None:
    for headers in ({}, {"authorization": f"Bearer {ALICE}x"}, {"x-api-key": ADMIN}):
        answer = ask(app, "POST", path, json=BODY, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-trace-id"] == answer.json()["trace_id"]
        if path.startswith("/v1/"):
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "unauthorized")
            assert answer.headers["x-should-retry"] == "false"
        else:
            assert answer.json()["error_type"] == "unauthorized"
        assert "zebra" not in answer.text
        assert ALICE[:6] not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {ALICE}"},
        {"authorization": f"bearer   {ALICE} "},
        {"authorization": f"Key {ALICE}"},
        {"x-api-key": ALICE},
        {"x-api-key": ALICES_NEXT},
        {"x-api-key": BOB},
        {"authorization": "Basic bWU6aXQ=", "x-api-key": BOB},
        {"authorization": "Bearer of-a-proxy", "x-api-key": BOB},
    ],
)
@pytest.mark.parametrize("path", DRAWING[::2])
def test_each_form_of_each_key_is_accepted(
    app: FastAPI, path: str, headers: dict[str, str]
) -> None:
    body = BODY | ({"image_url": "data:image/png;base64,"} if "image-to" in path else {})
    answer = ask(app, "POST", path, json=body, headers=headers)
    assert answer.status_code == 503  # the model is not loaded
    assert "www-authenticate" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", ALICE)],
        [("authorization", f"Basic {ALICE}")],
        [("authorization", f"Bearer{ALICE}")],
        [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {ALICE}")],
        [("x-api-key", ALICE), ("x-api-key", "another")],
        [("x-api-key", f"Bearer {ALICE}")],
        [("x-api-key", f"alice={ALICE}")],
        [("cookie", f"key={ALICE}")],
        [("authorization", "Bearer \u00e9\u00ff".encode("latin-1"))],
    ],
)
def test_other_forms_are_no_key(app: FastAPI, headers: list[tuple[str, Any]]) -> None:
    assert ask(app, "POST", "/", json=BODY, headers=httpx.Headers(headers)).status_code == 401
    asked = ask(app, "GET", f"/stats?key={ALICE}", headers=httpx.Headers(headers))
    assert asked.status_code == 401


WHAT_EACH_PATH_NEEDS = [
    ("GET", "/", 200, 200, 200),
    ("HEAD", "/", 200, 200, 200),
    ("GET", "/playground/style.css", 200, 200, 200),
    ("GET", "/playground/nothing", 404, 404, 404),
    ("GET", "/health", 200, 200, 200),
    ("GET", "/ready", 503, 503, 503),
    ("GET", "/stats", 401, 200, 401),
    ("GET", "/timeline/" + "0" * 32, 401, 404, 401),
    ("GET", "/v1/models", 401, 503, 401),
    ("GET", "/openapi.json", 401, 200, 401),
    ("GET", "/nothing", 401, 404, 401),
    ("GET", "/stream", 401, 405, 401),
    ("PUT", "/", 401, 405, 401),
    ("OPTIONS", "/stream", 401, 405, 401),
    ("GET", "/%2Fstats", 401, 404, 401),
    ("GET", "/playground/../stats", 401, 200, 401),
    ("GET", "/playground/%2e%2e/stats", 404, 404, 404),
    ("GET", "/metrics", 401, 401, 200),
    ("GET", "/debug/requests", 403, 403, 200),
    ("POST", "/debug/profile", 403, 403, 415),
    ("GET", "/debug/nothing", 404, 404, 404),
]


@pytest.mark.parametrize(("method", "path", "anyone", "caller", "operator"), WHAT_EACH_PATH_NEEDS)
def test_what_each_path_needs(
    app: FastAPI, method: str, path: str, anyone: int, caller: int, operator: int
) -> None:
    content: dict[str, Any] = {"content": b"{}"} if method == "POST" else {}
    found = [ask(app, method, path, key, **content).status_code for key in ("", BOB, ADMIN)]
    assert found == [anyone, caller, operator]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *((row[0], row[1]) for row in WHAT_EACH_PATH_NEEDS),
        ("HEAD", "/metrics"),
        *(("POST", path) for path in DRAWING),
    ],
)
def test_a_path_with_a_control_character_is_unknown(
    runtime: Runtime, app: FastAPI, method: str, path: str
) -> None:
    """The router takes one that ends with a line break for the path before it."""
    content: dict[str, Any] = {"json": BODY} if method == "POST" else {}
    for character in ("%0A", "%0D", "%00", "%C2%85", "%E2%80%A8"):
        for key in ("", BOB, ADMIN):
            answer = ask(app, method, path + character, key, **content)
            assert answer.status_code == 404, (character, key)
            assert len(answer.headers["x-trace-id"]) == 32
            assert method == "HEAD" or answer.headers["x-trace-id"] in answer.text
    # This is no character by itself, and so the path is an ordinary unknown one.
    assert ask(app, method, path + "%85", **content).status_code in (401, 404)
    assert metric(runtime, "sdxl_requests_in_flight") == 0


@pytest.mark.parametrize("key", ["", BOB])
def test_a_connection_over_the_limit_reads_the_state_only(app: FastAPI, key: str) -> None:
    async def over_the_limit(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {"state": {OVER_THE_LIMIT: True}}, receive, send)

    def status(method: str, path: str, **content: Any) -> int:
        return ask(over_the_limit, method, path, key, "127.0.0.1", **content).status_code

    assert [status("GET", path) for path in ("/health", "/ready", "/metrics")] == [200, 503, 200]
    refused = ask(over_the_limit, "GET", "/stats", key, "127.0.0.1")
    assert refused.json()["error_type"] == "too_many_connections"
    assert int(refused.headers["retry-after"]) >= 1
    for path in (
        "/",
        "/playground/main.js",
        "/openapi.json",
        "/v1/models",
        "/debug/requests",
        "/x",
    ):
        assert status("GET", path) == 503, path
    assert status("POST", "/debug/profile", content=b"{}") == 503
    assert status("POST", "/", json=BODY) == (503 if key else 401)


def test_this_machine_reads_the_metrics_and_draws_nothing(app: FastAPI) -> None:
    assert ask(app, "GET", "/metrics", client="127.0.0.1").status_code == 200
    assert ask(app, "GET", "/metrics", BOB, client="127.0.0.1").status_code == 200
    assert ask(app, "POST", "/", client="127.0.0.1", json=BODY).status_code == 401
    forwarded = {"x-forwarded-for": "127.0.0.1"}
    answer = ask(app, "GET", "/metrics", client="127.0.0.1", headers=forwarded)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_refused_body_is_not_read(app: FastAPI) -> None:
    async def once(path: str, key: str) -> tuple[int, int]:
        read, status = 0, 0

        async def receive() -> Message:
            nonlocal read
            read += status == 0  # what is dropped after the answer does not count
            return {"type": "http.request", "body": b"x" * 100, "more_body": status == 0}

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        headers = [(b"content-length", b"100"), (b"x-api-key", key.encode())]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": headers,
            "client": (AWAY, 1),
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "server": ("127.0.0.1", 80),
        }
        await app(scope, receive, send)
        return status, read

    for path in (*DRAWING, "/nothing"):
        assert asyncio.run(once(path, "wrong")) == (401, 0)
    assert asyncio.run(once("/", BOB))[1] > 0


def requests_by_key(runtime: Runtime) -> dict[tuple[str, str], float]:
    metric(runtime, "")  # waits until all are recorded
    return {
        (sample.labels["api_key"], sample.labels["outcome"]): sample.value
        for family in runtime.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "sdxl_api_key_requests_total"
    }


def test_a_refusal_is_recorded_without_a_name(runtime: Runtime, app: FastAPI) -> None:
    failures = {"error_type": "unauthorized"}
    before = metric(runtime, "sdxl_errors_total", **failures)
    by_key = requests_by_key(runtime)
    answer = ask(app, "POST", "/", json=BODY)
    assert metric(runtime, "sdxl_errors_total", **failures) == before + 1
    assert metric(runtime, "sdxl_rejections_total", reason="unauthorized") >= 1
    assert metric(runtime, "sdxl_requests_in_flight") == 0
    assert requests_by_key(runtime) == by_key
    assert {name for name, _ in by_key} == {"alice", "bob"}
    # It displaces no other one in the list of the last requests.
    shown = ask(app, "GET", "/debug/requests", ADMIN).json()["requests"]
    assert answer.headers["x-trace-id"] not in [each["trace_id"] for each in shown]


@pytest.mark.parametrize("flags", ["00", "01"])
def test_without_a_key_nobody_decides_what_is_exported(app: FastAPI, flags: str) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-{flags}"}
    known = ask(app, "POST", "/", BOB, json=BODY, headers=dict(headers))
    assert known.headers["x-trace-id"] == trace_id
    for path in DRAWING:
        unknown = ask(app, "POST", path, json=BODY, headers=dict(headers))
        assert unknown.status_code == 401
        assert unknown.headers["x-trace-id"] != trace_id
        assert unknown.headers["x-trace-id"] in unknown.text


def test_a_name_is_counted_and_logged(
    runtime: Runtime, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "serve.http.middleware")
    labels = {"api_key": "alice", "outcome": "rejected"}
    before = metric(runtime, "sdxl_api_key_requests_total", **labels)
    for key in (ALICE, ALICES_NEXT):
        ask(app, "POST", "/", key, json=BODY)
    assert metric(runtime, "sdxl_api_key_requests_total", **labels) == before + 2
    assert [line.__dict__["api_key"] for line in caplog.records] == ["alice", "alice"]


def test_a_names_limit_holds_for_all_its_keys(runtime: Runtime, app: FastAPI) -> None:
    """Requests whose body has not arrived are in progress, too."""

    async def once() -> tuple[list[int], httpx.Response, httpx.Response, float]:
        arrive = asyncio.Event()

        async def slowly() -> Any:
            await arrive.wait()
            yield json.dumps(BODY).encode()

        transport = httpx.ASGITransport(app, client=(AWAY, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:

            def send(key: str, content: Any) -> Any:
                headers = {"x-api-key": key, "content-type": "application/json"}
                return http.post("/", content=content, headers=headers)

            waiting = [asyncio.create_task(send(k, slowly())) for k in (ALICE, ALICES_NEXT)]
            while metric(runtime, in_flight, api_key="alice") < 2:
                await asyncio.sleep(0.01)
            refused = await send(ALICE, b"{}")
            other = await send(BOB, json.dumps(BODY).encode())
            most = metric(runtime, in_flight, api_key="alice")
            arrive.set()
            statuses = [(await task).status_code for task in waiting]
            statuses.append((await send(ALICE, json.dumps(BODY).encode())).status_code)
            return statuses, refused, other, most

    in_flight = "sdxl_api_key_requests_in_flight"
    invalid = requests_by_key(runtime)["alice", "invalid"]
    statuses, refused, other, most = asyncio.run(once())
    assert refused.status_code == 429
    assert refused.json()["error_type"] == "key_limit_reached"
    assert int(refused.headers["retry-after"]) >= 1
    assert other.status_code == 503
    assert statuses == [503, 503, 503]
    assert most == 2
    assert metric(runtime, in_flight, api_key="alice") == 0
    assert requests_by_key(runtime)["alice", "invalid"] == invalid + 1


def test_a_names_place_is_free_when_its_work_has_ended(runtime: Runtime) -> None:
    """The run of a stream that its client has left goes on for some steps."""

    async def once() -> tuple[int, list[int], int]:
        stopped = asyncio.Event()
        left = 0

        async def streams(scope: Any, receive: Any, send: Any) -> None:
            nonlocal left
            the_call().work = asyncio.create_task(stopped.wait())
            await Response()(scope, receive, send)
            left += 1

        transport = httpx.ASGITransport(RequestMiddleware(streams, lambda: runtime, ENDPOINTS))
        headers = {"x-api-key": ALICE}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:

            def send() -> Any:
                return asyncio.create_task(http.post("/stream", json=BODY, headers=headers))

            running = [send(), send()]
            while left < 2:
                await asyncio.sleep(0.01)
            next_one = send()
            await asyncio.wait({next_one}, timeout=5)
            stopped.set()
            statuses = [(await task).status_code for task in running]
            return (await next_one).status_code, statuses, (await send()).status_code

    refused, statuses, afterwards = asyncio.run(once())
    assert (refused, statuses, afterwards) == (429, [200, 200], 200)
    assert metric(runtime, "sdxl_api_key_requests_in_flight", api_key="alice") == 0


def test_the_document_says_how_a_key_is_sent(app: FastAPI) -> None:
    document = ask(app, "GET", "/openapi.json", BOB).json()
    schemes = document["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}
    assert document["security"] == [{name: []} for name in schemes]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            is_open = operation.get("security") == []
            refused = ask(app, method.upper(), path).status_code == 401
            assert is_open != refused, (method, path)
            assert ("401" in operation["responses"]) >= refused
    assert "securitySchemes" not in json.dumps(create_app(keyless()).openapi())


def keyless() -> Runtime:
    return build_runtime(ServeSettings(model="demo", device="cpu"), CollectorRegistry())


def test_without_keys_nothing_is_asked_and_nothing_counted() -> None:
    runtime = keyless()
    app = create_app(runtime)
    assert ask(app, "POST", "/", json=BODY).status_code == 503
    assert ask(app, "GET", "/metrics").status_code == 200
    assert ask(app, "GET", "/stats").status_code == 200
    assert ask(app, "OPTIONS", "/").status_code == 405
    assert "api_key=" not in ask(app, "GET", "/metrics").text
    runtime.close(5)


def test_a_key_is_in_no_answer_metric_or_log(
    runtime: Runtime, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    shown = ""
    for key in (ALICE, BOB, ADMIN, ALICE + "x"):
        for method, path in (("POST", "/"), ("POST", "/stream"), ("GET", "/stats"), ("GET", "/x")):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                content: dict[str, Any] = {"json": BODY} if method == "POST" else {}
                answer = ask(app, method, path, headers=dict(headers), **content)
                shown += answer.text + str(answer.headers)
    for path in ("/metrics", "/debug/requests"):
        shown += ask(app, "GET", path, ADMIN).text
    for path in ("/openapi.json", "/stats"):
        shown += ask(app, "GET", path, BOB).text
    shown += caplog.text + repr([record.__dict__ for record in caplog.records])
    shown += repr(runtime.settings) + repr(runtime.settings.api_keys)
    for key in (ALICE, ALICES_NEXT, BOB, ADMIN):
        assert not any(key[at : at + 6] in shown for at in range(len(key) - 5))


@pytest.mark.parser
@given(
    st.sampled_from(["Bearer", "bearer", "KEY", "Key"]), st.from_regex(r"[!-~]+", fullmatch=True)
)
def test_a_key_is_read_from_its_header(scheme: str, key: str) -> None:
    headers = Headers({"authorization": f"{scheme} {key}", "x-api-key": key})
    assert list(given_keys(headers)) == [key, key]


@pytest.mark.parser
@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_header_can_be_read(authorization: bytes, own: bytes) -> None:
    raw = [(b"authorization", authorization), (b"x-api-key", own)]
    for key in given_keys(Headers(raw=raw)):
        assert key
        assert key == key.strip()


# Operators


@pytest.mark.parametrize(
    ("client", "headers", "operator"),
    [
        ("127.0.0.1", {}, True),
        ("127.0.0.1", {"host": "localhost:8080"}, True),
        ("::1", {"host": "[::1]:8080"}, True),
        ("::ffff:127.0.0.1", {"host": "127.0.0.1"}, True),
        ("::ffff:192.0.2.7", {"host": "127.0.0.1"}, False),
        (AWAY, {"host": "127.0.0.1"}, False),
        # DNS rebinding: a page's own name leads to this machine.
        ("127.0.0.1", {"host": "evil.test"}, False),
        ("127.0.0.1", {"host": "localhost.evil.test"}, False),
        ("127.0.0.1", {"host": "127.0.0.1.evil.test:8080"}, False),
        ("127.0.0.1", {"host": ""}, False),
        ("127.0.0.1", {"host": "[::1"}, False),
        ("127.0.0.1", {"host": "localhost:evil.test"}, False),
        ("127.0.0.1", {"host": "127.0.0.1%evil.test"}, False),
        ("127.0.0.1", {"host": "evil.test@localhost"}, False),
        ("127.0.0.1", {"host": "localhost#evil.test"}, False),
        ("127.0.0.1", {"host": "[::1]evil.test"}, False),
        *(
            ("127.0.0.1", {name: "127.0.0.1"}, False)
            for name in (
                "forwarded",
                "x-forwarded-for",
                "x-forwarded-host",
                "x-forwarded-proto",
                "x-real-ip",
                "via",
                "cf-connecting-ip",
                "true-client-ip",
                "origin",
                "sec-fetch-site",
            )
        ),
        # A proxy that drops what `Connection` names would drop its own headers, too.
        ("127.0.0.1", {"connection": "close, X-Forwarded-For"}, False),
        ("127.0.0.1", {"connection": "x-real-ip"}, False),
        ("127.0.0.1", {"connection": "keep-alive"}, True),
        ("127.0.0.1", {"connection": "Upgrade, HTTP2-Settings"}, True),
        ("127.0.0.1", {"connection": "Close,TE, "}, True),
        (AWAY, {"x-forwarded-for": "127.0.0.1"}, False),
        (AWAY, {"authorization": f"Bearer {ADMIN}"}, True),
        (AWAY, {"authorization": f"Bearer {ALICE}"}, False),
        ("127.0.0.1", {"authorization": f"Bearer {ALICE}"}, True),
    ],
)
def test_who_is_an_operator(
    runtime: Runtime, client: str, headers: dict[str, str], operator: bool
) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "headers": raw, "client": (client, 1)}
    assert is_operator(scope, runtime.settings.admin_token) is operator


def test_every_connection_header_is_read() -> None:
    headers = [(b"connection", b"close"), (b"connection", b"x-forwarded-for")]
    scope = {"type": "http", "headers": headers, "client": ("127.0.0.1", 1)}
    assert not is_operator(scope, None)
    assert is_operator(scope | {"headers": headers[:1]}, None)


def test_without_an_address_nobody_is_on_this_machine() -> None:
    assert not is_operator({"type": "http", "headers": [], "client": None}, None)
    assert not is_operator({"type": "http", "headers": []}, None)


# Browsers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/playground/main.js"),
        ("GET", "/health"),
        ("GET", "/stats"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("POST", "/"),
        ("POST", "/stream"),
        ("POST", "/v1/images/generations"),
        ("OPTIONS", "/"),
    ],
)
@pytest.mark.parametrize("key", ["", BOB])
def test_every_answer_has_the_security_headers(
    app: FastAPI, method: str, path: str, key: str
) -> None:
    content: dict[str, Any] = {"json": BODY} if method == "POST" else {}
    elsewhere = {"origin": "https://elsewhere.test"}
    headers = ask(app, method, path, key, headers=elsewhere, **content).headers
    for name in SECURITY_HEADERS:
        assert len(headers.get_list(name)) == 1, name
    page = path == "/" and method == "GET"
    if not page and not path.startswith("/playground/"):
        assert headers["content-security-policy"] == SECURITY_HEADERS["Content-Security-Policy"]
        assert headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert not [name for name in headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_a_page_from_elsewhere_draws_nothing(content_type: str) -> None:
    """A browser sends these types to any address without asking first."""
    runtime = keyless()
    app = create_app(runtime)
    headers = {"content-type": content_type, "origin": "https://elsewhere.test"}
    for path in DRAWING:
        answer = ask(
            app, "POST", path, client="127.0.0.1", content=json.dumps(BODY), headers=headers
        )
        assert answer.status_code == 415, path
    runtime.close(5)


def test_the_page_keeps_a_key_for_the_session_only() -> None:
    scripts = "".join(
        file.body.decode() for name, file in page_files().items() if name.endswith(".js")
    )
    assert not re.search(r"localStorage|document\.cookie|indexedDB", scripts)
