"""The one shape of all errors, whatever answers: the apps' endpoints, or nothing of the app."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.engine.readiness import State
from serve.engine.runtime import Runtime
from serve.errors import REQUEST_ERRORS, DeviceLost, MalformedHttp, NotReady
from serve.gateway import PromptGateway
from serve.http.endpoints import install
from serve.http.error_responses import response_outside_the_app
from serve.http.openapi import CONNECTION_ERRORS
from serve.server import create_app

SECRET = "xylograph"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **options)

    return asyncio.run(once())


@pytest.fixture(scope="module")
def app(runtime: Runtime) -> FastAPI:
    app = create_app(runtime)

    @app.get("/several")
    @app.put("/several")
    async def several() -> None: ...

    @app.delete("/several")
    async def another() -> None:
        raise LookupError(SECRET)

    return app


def check_shape(answer: httpx.Response, status: int, error_type: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["error_type"]) == (status, error_type)
    assert answer.headers["content-type"] == "application/json"
    assert {"detail", "error_type", "trace_id"} <= set(body)
    assert answer.headers.get_list("x-trace-id") == [body["trace_id"]]
    assert re.fullmatch("[0-9a-f]{32}", body["trace_id"])
    return body


@pytest.mark.parametrize(
    ("method", "path", "status", "error_type"),
    [
        ("GET", f"/{SECRET}", 404, "not_found"),
        (SECRET.upper(), f"/{SECRET}", 404, "not_found"),
        ("PUT", "/", 405, "method_not_allowed"),
        ("OPTIONS", "/", 405, "method_not_allowed"),
        (SECRET.upper(), "/", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("DELETE", "/several", 500, "internal"),
        ("POST", "/", 415, "unsupported_media_type"),
    ],
)
def test_an_error_has_the_callers_trace_id_and_a_log_line_with_it(
    app: FastAPI,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    status: int,
    error_type: str,
) -> None:
    caplog.set_level("INFO", "serve.http.middleware")
    content = f'{{"prompt": "{SECRET}"}}'
    for headers in ({}, {"traceparent": PARENT}):
        caplog.clear()
        answer = ask(app, method, path, content=content, headers=headers)
        body = check_shape(answer, status, error_type)
        assert (body["trace_id"] == TRACE) == bool(headers)
        ids = [record.__dict__.get("trace_id") for record in caplog.records]
        assert ids.count(body["trace_id"]) == 1
        # neither the path nor the method nor an exception's text
        assert SECRET not in (answer.text + caplog.text).lower()


def test_allow_names_the_methods_of_all_routes_of_a_path(app: FastAPI) -> None:
    answer = ask(app, "POST", "/several")
    check_shape(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, PUT"


def test_what_makes_no_image_is_not_recorded(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(runtime.recorder, "record", lambda *call: recorded.append(call))
    for method, path in (("GET", "/nope"), ("GET", "/"), ("GET", "/health"), ("GET", "/metrics")):
        answer = ask(app, method, path)
        assert ("x-trace-id" in answer.headers) == (answer.status_code >= 400)
    assert recorded == []
    ask(app, "POST", "/")
    assert len(recorded) == 1


@pytest.mark.parametrize(
    ("state", "status", "error_type"),
    [
        (State.STARTING, 200, "not_ready"),
        (State.DRAINING, 200, "draining"),
        (State.FAILED, 503, "not_ready"),
    ],
)
def test_health_and_readiness_say_why_in_the_same_shape(
    app: FastAPI,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    status: int,
    error_type: str,
) -> None:
    monkeypatch.setattr(runtime.readiness, "state", state)
    ready = ask(app, "GET", "/ready")
    body = check_shape(ready, 503, error_type)
    progress = json.loads(json.dumps(runtime.readiness.as_json()))
    assert {name: body[name] for name in progress} == progress
    assert ("retry-after" in ready.headers) == (error_type == NotReady.error_type)
    health = ask(app, "GET", "/health")
    assert health.status_code == status
    if status == 503:
        assert check_shape(health, 503, error_type)["status"] == "unhealthy"


def test_a_lost_device_is_named_by_health_and_readiness(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_device_lost", True)
    for path in ("/health", "/ready"):
        check_shape(ask(app, "GET", path), 503, DeviceLost.error_type)


def test_before_there_is_a_service() -> None:
    app = FastAPI()
    install(app, lambda: None)
    assert ask(app, "GET", "/health").status_code == 200
    assert check_shape(ask(app, "GET", "/ready"), 503, "not_ready")["state"] == "starting"
    check_shape(ask(app, "GET", "/nope"), 404, "not_found")


def test_what_never_reached_the_app_has_the_same_shape(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    response = response_outside_the_app(MalformedHttp())
    answer = httpx.Response(
        response.status_code, headers=response.raw_headers, content=response.body
    )
    body = check_shape(answer, 400, "malformed_http")
    assert [record.__dict__["trace_id"] for record in caplog.records] == [body["trace_id"]]


# The document


def statuses(document: dict[str, Any], path: str) -> set[str]:
    [operation] = document["paths"][path].values()
    return set(operation["responses"])


def test_the_document_declares_every_failure(app: FastAPI) -> None:
    document = app.openapi()
    declared: set[str] = set()
    for path in ("/", "/stream"):
        responses = document["paths"][path]["post"]["responses"]
        for response in responses.values():
            assert response["headers"]["x-trace-id"]["required"]
        assert responses["429"]["headers"]["Retry-After"]["required"]
        assert "Retry-After" in responses["503"]["headers"]
        assert set(responses["422"]["content"]) == {"application/json"}
        for status, response in responses.items():
            if status != "200":
                schema = response["content"]["application/json"]["schema"]
                # Of the app, and of the connection before it.
                for one in schema.get("anyOf", [schema]):
                    assert one["allOf"][0] == {"$ref": "#/components/schemas/ErrorBody"}
                    declared |= set(one["allOf"][1]["properties"]["error_type"]["enum"])
    seen = {error.error_type for error in REQUEST_ERRORS} - {"client_gone"} | {"internal"}
    seen -= {"model_not_found"}  # OpenAI's endpoints only
    seen |= {error.error_type for error in CONNECTION_ERRORS}
    assert declared == seen
    of_connections = {str(error.status) for error in CONNECTION_ERRORS}
    states = {"200", "500", "503"} | of_connections
    assert statuses(document, "/health") == statuses(document, "/ready") == states
    assert "ValidationError" not in json.dumps(document)


def test_the_document_names_the_media_types(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    assert set(paths["/stream"]["post"]["responses"]["200"]["content"]) == {"text/event-stream"}
    metrics = paths["/metrics"]["get"]["responses"]["200"]["content"]
    assert set(metrics) == {"text/plain", "application/openmetrics-text"}


def request_fields(app: FastAPI, model: str = "TextToImageRequest") -> dict[str, Any]:
    fields: dict[str, Any] = app.openapi()["components"]["schemas"][model]["properties"]
    return fields


def test_the_document_allows_what_is_served(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = request_fields(app)
    seed = fields["seed"]["anyOf"][0]["maximum"]
    assert (seed, type(seed)) == (2**63 - 1, int)
    assert fields["width"]["anyOf"][0]["enum"] == [128, 160]
    assert fields["height"]["anyOf"][0]["enum"] == [96, 128]
    changed = runtime.settings.model_copy(update={"serve_cold_shapes": True, "guidance_scale": 0.0})
    monkeypatch.setattr(runtime, "settings", changed)
    fields = request_fields(app)
    assert fields["width"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 64,
        "maximum": 2048,
        "multipleOf": 8,
    }
    assert fields["guidance_scale"]["anyOf"][0]["maximum"] == 1


def test_fals_document_is_corrected_too() -> None:
    app = PromptGateway(_allow_init=True)._build_app()
    fields = request_fields(app, "PromptRequest")
    assert fields["seed"]["anyOf"][0]["maximum"] == 2**63 - 1
    assert fields["width"]["anyOf"][0]["multipleOf"] == 8
    responses = app.openapi()["paths"]["/"]["post"]["responses"]
    assert {"408", "413", "415", "422", "429", "500", "502", "503", "504"} <= set(responses)


def test_the_gateway_has_no_stream() -> None:
    """Its requests would be counted under an endpoint that its metrics do not declare."""
    app = PromptGateway(_allow_init=True)._build_app()
    check_shape(ask(app, "POST", "/stream", json={}), 404, "not_found")
