"""The fal app without a process of its own: what fal builds from it, and its responses.

`tests/e2e` compares it with the self-hosted server, as real processes.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fal
import pytest
from fal.toolkit import Image
from fal.toolkit.file.file import BUILT_IN_REPOSITORIES
from fal.toolkit.file.types import FileData, FileRepository
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest
from starlette.testclient import TestClient

from serve import app as app_module
from serve.app import SdxlApp, build_upload, show_on_metrics_port, upload_to_cdn
from serve.engine.build import build_runtime
from serve.engine.images import bounded, data_uri
from serve.engine.runtime import Runtime
from serve.errors import (
    BodyTooLarge,
    ConfigurationError,
    DeadlineExceeded,
    DeviceLost,
    Draining,
    FieldProblem,
    GenerationFailed,
    InvalidRequest,
    NonFiniteOutput,
    NotReady,
    OutOfMemory,
    QueueFull,
    RequestError,
)
from serve.http.middleware import RequestMiddleware
from serve.http.security_headers import SecurityHeaders
from serve.http.sockets.early_answers import EarlyAnswers
from serve.schema import EXAMPLE_PICTURE, GeneratedImage, ImageFormat
from serve.server import FLUSH_SECONDS
from serve.settings import ServeSettings


def test_importing_the_app_loads_no_model_library() -> None:
    code = (
        "import sys, serve.app;"
        "print({'torch', 'diffusers', 'transformers', 'accelerate', 'PIL'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


# How fal builds it


@pytest.fixture
def app() -> SdxlApp:
    return SdxlApp(_allow_init=True)


def test_our_handlers_routes_and_middleware_win_over_fals(app: SdxlApp) -> None:
    """When this fails after an update of fal, the hook in serve/app.py has moved."""
    assert hasattr(fal.App, "_add_extra_routes"), "fal has no _add_extra_routes any more"
    built = app._build_app()

    outermost = [added.cls for added in built.user_middleware[:3]]
    assert outermost == [SecurityHeaders, EarlyAnswers, RequestMiddleware], "ours must be outermost"
    assert CORSMiddleware not in [added.cls for added in built.user_middleware]
    for error, handler in built.exception_handlers.items():
        if error in (RequestError, Exception) or getattr(error, "__name__", "") in (
            "RequestValidationError",
        ):
            assert handler.__module__ == "serve.http.error_responses", (
                f"fal's own handler of {error} is in use"
            )
    routes = {
        (path, method): route.endpoint.__module__
        for route in reversed(built.routes)
        for path in [getattr(route, "path", "")]
        for method in getattr(route, "methods", None) or ()
        if hasattr(route, "endpoint")
    }
    assert routes["/health", "GET"] == "serve.http.endpoints"
    assert routes["/ready", "GET"] == "serve.http.endpoints"
    assert routes["/", "POST"] == "serve.app"
    assert routes["/stream", "POST"] == "serve.app"


def test_setup_refuses_to_serve_with_fals_error_handlers(app: SdxlApp) -> None:
    with pytest.raises(RuntimeError, match="no longer calls _add_extra_routes"):
        asyncio.run(app.setup())


def test_a_wrong_setting_stops_setup_with_its_sentence(
    app: SdxlApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app._build_app()
    monkeypatch.setenv("SDXL_MAX_WAITNG", "1")
    with pytest.raises(ConfigurationError, match="did you mean SDXL_MAX_WAITING"):
        asyncio.run(app.setup())
    monkeypatch.delenv("SDXL_MAX_WAITNG")
    monkeypatch.setenv("SDXL_API_KEYS", "alice=Wm4tZc8NvR2qLx6Y")
    with pytest.raises(ConfigurationError, match=r"SDXL_API_KEYS.*self-hosted"):
        asyncio.run(app.setup())


@pytest.mark.parametrize(("mounted", "named"), [(True, None), (True, "named"), (False, None)])
def test_compiled_artifacts_are_kept_on_the_accounts_disk(
    app: SdxlApp,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mounted: bool,
    named: str | None,
) -> None:
    kept = tmp_path / "kept"
    if mounted:
        kept.mkdir()
    if named is not None:
        monkeypatch.setenv("SDXL_CACHE_DIR", str(tmp_path / named))
    monkeypatch.setattr(app_module, "KEPT", kept)
    seen: list[Path | None] = []

    def build(settings: ServeSettings, *_: Any, **__: Any) -> Any:
        seen.append(settings.cache_dir)
        raise OSError("that is all")

    monkeypatch.setattr("serve.engine.build.build_runtime", build)
    monkeypatch.setattr("serve.telemetry.logs.configure_logging", lambda *_: None)
    app._build_app()
    with pytest.raises(OSError, match="that is all"):
        asyncio.run(app.setup())
    expected = tmp_path / named if named else kept / "stepspan" if mounted else None
    assert seen == [expected]


def test_fal_publishes_the_schema(app: SdxlApp) -> None:
    schema = app.openapi()
    operation = schema["paths"]["/"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/TextToImageRequest"
    }
    assert operation["responses"]["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/TextToImageResponse"
    }
    assert schema["components"]["schemas"]["GeneratedImage"]["ui"] == {"field": "image"}
    for path in ("/image-to-image", "/image-to-image/stream"):
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"] == {"$ref": "#/components/schemas/ImageToImageRequest"}


# The failure table through fal's stack


class FailingRuntime:
    """A runtime that fails every request as a test chooses. The rest is the real runtime's."""

    def __init__(self, error: Exception) -> None:
        self._real: Runtime = build_runtime(ServeSettings(), CollectorRegistry())
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def generate(self, *_: Any, **__: Any) -> Any:
        raise self._error


PROMPT = "a word nobody echoes: xylograph"


PATHS = ["/", "/stream", "/image-to-image", "/image-to-image/stream"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_ends_with_a_line_break_is_unknown(app: SdxlApp, path: str) -> None:
    client = TestClient(app._build_app())
    for character in ("%0A", "%0D", "%00"):
        answer = client.post(path + character, json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()["error_type"]) == (404, "not_found")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (InvalidRequest([FieldProblem(("body", "width"), "is odd", "shape")]), 422, {}),
        (BodyTooLarge(10), 413, {}),
        (QueueFull(3, 7), 429, {"retry-after": "7"}),
        (DeadlineExceeded(60), 504, {"x-fal-needs-retry": "0"}),
        (NotReady("not warm"), 503, {"retry-after": "5"}),
        (Draining(), 503, {}),
        (OutOfMemory(), 500, {"x-fal-needs-retry": "0"}),
        (NonFiniteOutput(), 500, {"x-fal-needs-retry": "0"}),
        (GenerationFailed("ValueError"), 500, {}),
        (DeviceLost(), 503, {"x-fal-stop-runner": "1"}),
        # fal's own handler would turn it into a 503, which ends the runner.
        (RuntimeError(f"CUDA error at {PROMPT}"), 500, {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_say_whether_to_retry_and_that_nothing_is_billed(
    app: SdxlApp, error: Exception, status: int, headers: dict[str, str], path: str
) -> None:
    runtime = FailingRuntime(error)
    built = app._build_app()
    app._runtime = runtime  # type: ignore[assignment]
    client = TestClient(built, raise_server_exceptions=False)
    picture = {"image_url": EXAMPLE_PICTURE} if "image" in path else {}
    answer = client.post(path, json={"prompt": PROMPT, **picture})
    assert answer.status_code == status
    fals = {
        name: value
        for name, value in answer.headers.items()
        if name.startswith("x-fal-") or name == "retry-after"
    }
    assert fals == headers | {"x-fal-billable-units": "0"}
    body = answer.json()
    assert set(body) == {"detail", "error_type", "trace_id"}
    assert body["trace_id"] == answer.headers["x-trace-id"]
    assert "xylograph" not in answer.text
    runtime.close(0.1)


def test_the_fal_app_draws_from_a_picture(app: SdxlApp, runtime: Runtime) -> None:
    built = app._build_app()
    app._runtime = runtime
    client = TestClient(built, raise_server_exceptions=False)
    body = {"prompt": PROMPT, "image_url": EXAMPLE_PICTURE, "num_inference_steps": 2}
    answer = client.post("/image-to-image", json=body | {"strength": 0.5})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["timings"]["steps_ms"]) == 1
    refused = client.post("/image-to-image", json=body | {"image_url": PROMPT})
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "image_url"]
    assert "xylograph" not in refused.text


def test_a_gateways_path_prefix_is_no_part_of_the_endpoint(
    app: SdxlApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAL_APP_ROOT_PATH", "/owner/sdxl")
    runtime = FailingRuntime(OutOfMemory())
    built = app._build_app()
    app._runtime = runtime  # type: ignore[assignment]
    client = TestClient(built, raise_server_exceptions=False)
    for path in ("/", "/owner/sdxl/", "/stream", "/owner/sdxl/stream"):
        answer = client.post(path, json={"prompt": PROMPT})
        assert (path, answer.status_code) == (path, 500)
        assert answer.json()["error_type"] == "out_of_memory"
    runtime.close(0.1)


def test_a_connection_closed_after_the_last_byte_cancels_nothing() -> None:
    """uvicorn reports the end of a response as a disconnect, while fal's own middleware is still
    returning."""
    runtime = build_runtime(ServeSettings(), CollectorRegistry())
    gone = asyncio.Event()
    messages = iter([{"type": "http.request", "body": b"{}"}])

    async def receive() -> Any:
        for message in messages:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    async def slow_to_leave(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        gone.set()
        await asyncio.sleep(0.05)

    json_body = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": json_body}
    middleware = RequestMiddleware(slow_to_leave, lambda: runtime, endpoints=("/",))
    asyncio.run(middleware(scope, receive, send))
    runtime.close(1)
    shown = generate_latest(runtime.metrics.registry).decode()
    assert 'sdxl_errors_total{error_type="client_gone"} 0.0' in shown
    assert 'sdxl_request_duration_seconds_count{endpoint="/",outcome="ok"} 1.0' in shown


# Metrics


def test_a_second_app_in_a_process_replaces_the_firsts_metrics() -> None:
    def registry_with(count: int) -> CollectorRegistry:
        registry = CollectorRegistry()
        Counter("sdxl_test_images", "Images.", registry=registry).inc(count)
        return registry

    try:
        show_on_metrics_port(registry_with(1))
        show_on_metrics_port(registry_with(2))
        shown = generate_latest(REGISTRY).decode().splitlines()
        assert [line for line in shown if line.startswith("sdxl_test_images_total")] == [
            "sdxl_test_images_total 2.0"
        ]
    finally:
        assert app_module._on_metrics_port is not None
        REGISTRY.unregister(app_module._on_metrics_port)
        app_module._on_metrics_port = None


# Images


def test_without_a_key_images_are_answered_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fal.auth.key_credentials", lambda: None)
    assert build_upload() is data_uri


def test_with_a_key_images_go_to_fals_cdn_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fal.auth.key_credentials", lambda: ("id", "secret"))
    monkeypatch.setattr(app_module, "UPLOAD_SECONDS", 0.05)
    monkeypatch.setattr(app_module, "upload_to_cdn", lambda *_: time.sleep(1))
    with pytest.raises(TimeoutError):
        build_upload()(b"", "png")


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_fals_image_type_uploads_each_format(
    image_format: ImageFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[FileData] = []

    class Cdn(FileRepository):
        def save(self, file: FileData, **_: Any) -> str:
            saved.append(file)
            return f"https://cdn.test/{file.file_name}"

    monkeypatch.setitem(BUILT_IN_REPOSITORIES, "fal_v3", Cdn)
    url = upload_to_cdn(b"pixels", image_format)
    (file,) = saved
    assert (file.data, file.content_type) == (b"pixels", f"image/{image_format}")
    assert url == f"https://cdn.test/{file.file_name}"
    assert url.endswith({"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[image_format])


def test_the_response_is_readable_as_fals_image() -> None:
    ours = GeneratedImage(
        url="https://cdn.test/a.webp", width=128, height=96, content_type="image/webp", seed=1
    )
    fals = Image.model_validate(ours.model_dump())
    assert (fals.url, fals.width, fals.height, fals.content_type) == (
        ours.url,
        ours.width,
        ours.height,
        ours.content_type,
    )


def test_stuck_uploads_take_a_bounded_time_and_further_ones_fail_at_once() -> None:
    release = threading.Event()

    def stuck(_data: bytes, _format: ImageFormat) -> str:
        release.wait(10)
        return "late"

    upload = bounded(stuck, seconds=0.2, at_once=2)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            upload(b"", "png")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="stuck"):
        upload(b"", "png")
    assert time.monotonic() - start < 0.1
    release.set()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert upload(b"", "png") == "late"
            return
        except TimeoutError:
            time.sleep(0.01)
    raise AssertionError("the slots never came back")


def test_an_upload_sees_the_requests_context_and_its_failure_comes_back() -> None:
    caller: ContextVar[str] = ContextVar("caller", default="nobody")
    caller.set("someone")
    assert bounded(lambda *_: caller.get(), 5, 1)(b"", "png") == "someone"

    def failing(*_: Any) -> str:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        bounded(failing, 5, 1)(b"", "png")


# Lifecycle


def test_exit_before_setup_is_no_error(app: SdxlApp) -> None:
    app.handle_exit()
    asyncio.run(app.teardown())


def test_exit_in_warm_up_ends_setup_without_an_error(
    app: SdxlApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = threading.Event()
    closed: list[float] = []

    async def start(on_progress: Any) -> None:
        entered.set()
        await asyncio.sleep(60)

    runtime = SimpleNamespace(start=start, begin_drain=lambda: None, close=closed.append)
    monkeypatch.setattr("serve.engine.build.build_runtime", lambda *_, **__: runtime)
    monkeypatch.setattr("serve.telemetry.logs.configure_logging", lambda *_: None)
    monkeypatch.setattr(app_module, "show_on_metrics_port", lambda _: None)
    app._build_app()

    async def life() -> None:
        setup = asyncio.create_task(app.setup())
        await asyncio.to_thread(entered.wait, 5)
        app.handle_exit()
        await asyncio.wait_for(setup, 5)
        await app.teardown()

    asyncio.run(life())
    assert closed == [FLUSH_SECONDS]


def test_a_failed_start_flushes_and_fails_setup(
    app: SdxlApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[float] = []

    async def start(on_progress: Any) -> None:
        raise OSError("no weights")

    runtime = SimpleNamespace(start=start, close=closed.append)
    monkeypatch.setattr("serve.engine.build.build_runtime", lambda *_, **__: runtime)
    monkeypatch.setattr("serve.telemetry.logs.configure_logging", lambda *_: None)
    monkeypatch.setattr(app_module, "show_on_metrics_port", lambda _: None)
    app._build_app()
    with pytest.raises(OSError, match="no weights"):
        asyncio.run(app.setup())
    assert closed == [FLUSH_SECONDS]
