"""The OpenAPI document declares the headers and the statuses of what is rarely answered.
schemathesis checks the rest, in tests/e2e/test_openapi.py."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from serve.engine.build import build_runtime
from serve.engine.readiness import State
from serve.engine.runtime import Runtime
from serve.errors import (
    REQUEST_ERRORS,
    ClientGone,
    FieldProblem,
    ModelNotFound,
    RequestError,
)
from serve.gateway import PromptGateway
from serve.http.openapi import CONNECTION_ERRORS
from serve.server import create_app
from serve.settings import ServeSettings
from tests.support.declared_headers import undeclared

BODY = {"prompt": "a circle"}
OF_IMAGES = {"x-seed", "x-prompt-truncated", "x-has-nsfw-concepts"}
DRAWING = ("/", "/stream", "/v1/images/generations")
ARGUMENTS: dict[str, Any] = {
    "problems": [FieldProblem(("body", "prompt"), "is wrong", "wrong")],
    "names": ["a"],
    "content_types": ["image/png"],
    "limit": 1,
    "limit_bytes": 1,
    "limit_seconds": 1.0,
    "waiting": 1,
    "retry_after_seconds": 1,
    "deadline_seconds": 1.0,
    "why": "",
    "exception_type": "LookupError",
    "message": "",
}


def made(error: type[RequestError]) -> RequestError:
    needed = [
        name
        for name, each in inspect.signature(error).parameters.items()
        if each.default is each.empty
    ]
    return error(**{name: ARGUMENTS[name] for name in needed})


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    runtime = build_runtime(ServeSettings(model="demo", device="cpu"), CollectorRegistry())
    yield runtime
    runtime.close(5)


@pytest.fixture(scope="module")
def app(runtime: Runtime) -> FastAPI:
    return create_app(runtime)


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.request(method, path, **options)

    return asyncio.run(once())


def check(app: FastAPI, answer: httpx.Response, path: str) -> None:
    method = answer.request.method.lower()
    document = app.openapi()
    assert not undeclared(document, method, path, answer.status_code, answer.headers)
    declared = document["paths"][path][method]["responses"][str(answer.status_code)]["headers"]
    required = {name.lower() for name, header in declared.items() if header["required"]}
    assert required <= set(answer.headers)


@pytest.mark.parametrize("path", DRAWING)
@pytest.mark.parametrize("error", [each for each in REQUEST_ERRORS if each is not ClientGone])
def test_every_error_of_a_request_for_an_image_has_declared_headers(
    app: FastAPI,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    error: type[RequestError],
) -> None:
    if error is ModelNotFound and path != "/v1/images/generations":
        return

    async def fail(*_: Any, **__: Any) -> Any:
        raise made(error)

    monkeypatch.setattr(runtime, "generate", fail)
    answer = ask(app, "POST", path, json=BODY)
    assert answer.status_code in (error.status, 400)
    check(app, answer, path)


@pytest.mark.parametrize("state", [State.STARTING, State.FAILED, State.DRAINING])
@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("POST", "/v1/images/generations", None),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/{name}", "demo"),
    ],
)
def test_without_a_model_openais_endpoints_say_so(
    app: FastAPI,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    method: str,
    path: str,
    name: str | None,
) -> None:
    """Also where the settings have further names for it."""
    monkeypatch.setattr(runtime.readiness, "state", state)
    monkeypatch.setattr(
        runtime, "settings", runtime.settings.model_copy(update={"model_names": ("another",)})
    )
    body = {"json": BODY | {"model": "demo"}} if method == "POST" else {}
    answer = ask(app, method, path.format(name=name), **body)
    assert answer.status_code == 503
    code = "draining" if state is State.DRAINING else "not_ready"
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-should-retry"] == "true"
    check(app, answer, path)
    declared = app.openapi()["paths"][path][method.lower()]["responses"]["503"]
    assert f"`{code}`" in declared["description"]


@pytest.mark.parametrize("headers", [{}, {"content-encoding": "gzip"}])
def test_what_is_accepted_is_declared(app: FastAPI, headers: dict[str, str]) -> None:
    answer = ask(app, "POST", "/", content=b"{}", headers=headers)
    assert answer.status_code == 415
    check(app, answer, "/")


def test_the_headers_of_the_page_are_declared(app: FastAPI) -> None:
    page = ask(app, "GET", "/")
    check(app, page, "/")
    again = ask(app, "GET", "/", headers={"if-none-match": page.headers["etag"]})
    assert again.status_code == 304
    check(app, again, "/")


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/stream", 405)])
def test_what_is_no_operation_is_declared(app: FastAPI, path: str, status: int) -> None:
    answer = ask(app, "GET", path)
    assert answer.status_code == status
    assert not undeclared(app.openapi(), "post", "/stream", status, answer.headers)


def test_what_a_connection_answers_is_declared_for_every_path(app: FastAPI) -> None:
    for operations in app.openapi()["paths"].values():
        for operation in operations.values():
            for error in CONNECTION_ERRORS:
                response = operation["responses"][str(error.status)]
                assert f"`{error.error_type}`" in response["description"]
                assert not response["headers"]["x-request-id"]["required"]


def test_a_header_that_is_not_declared_is_found(app: FastAPI) -> None:
    document = app.openapi()
    for method, path, status in (("get", "/health", 200), ("post", "/", 422), ("get", "/", 304)):
        assert undeclared(document, method, path, status, ["Date", "X-New"]) == {"x-new"}
    with pytest.raises(AssertionError):
        undeclared(document, "get", "/health", 201, [])


def test_the_gateway_declares_when_to_retry_only_where_it_knows() -> None:
    responses = PromptGateway(_allow_init=True).openapi()["paths"]["/"]["post"]["responses"]
    assert not responses["429"]["headers"]["Retry-After"]["required"]
    assert "431" not in responses


def test_the_gateway_declares_json_only_and_no_error_of_keys() -> None:
    responses = PromptGateway(_allow_init=True).openapi()["paths"]["/"]["post"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json"}
    assert not [name for name in responses["200"]["headers"] if name in OF_IMAGES]
    assert not {"401", "406"} & set(responses)
    [schema] = [
        part["properties"]["error_type"]
        for part in responses["429"]["content"]["application/json"]["schema"]["allOf"]
        if "properties" in part
    ]
    assert set(schema["enum"]) == {"queue_full", "image_app_busy"}


def test_an_image_has_declared_headers(app: FastAPI) -> None:
    """Every one that `image_response` may set."""
    headers = app.openapi()["paths"]["/"]["post"]["responses"]["200"]["headers"]
    assert OF_IMAGES | {"server-timing"} <= set(headers)
    assert headers["x-seed"]["schema"]["type"] == "integer"
