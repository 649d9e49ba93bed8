"""The OpenAPI document: what the framework derives from the routes, corrected to what is answered.

The framework sees neither the middleware nor the exception handlers, so it knows only a 200 and its
own 422. It also writes every bound of a number as a float, which rounds the largest seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from kernels_warmup.shapes import LARGEST_SIDE, PIXELS_PER_LATENT, SMALLEST_SIDE
from serve import __version__
from serve.engine.images import CONTENT_TYPES
from serve.engine.planning import must_be_checked, serves_guidance
from serve.engine.runtime import IMAGE_TO_IMAGE, IMAGE_TO_IMAGE_STREAM, OPENAI_IMAGES
from serve.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    DeviceLost,
    Draining,
    Forbidden,
    HeadTooLarge,
    HeadTooSlow,
    InvalidRequest,
    KeyLimitReached,
    MalformedHttp,
    MethodNotAllowed,
    ModelNotFound,
    NotAcceptable,
    NotFound,
    NotReady,
    QueueFull,
    RequestError,
    TooManyConnections,
    Unauthorized,
    UnsupportedMediaType,
)
from serve.http.authentication import is_open
from serve.http.error_responses import OPENAI_PREFIX
from serve.http.middleware import FOR_EVERY_CONNECTION
from serve.http.openai.schema import CompletedImage, OpenAIErrorBody, PartialImage
from serve.http.openai_errors import openai_status
from serve.http.profiling_endpoint import ProfileRequest
from serve.http.service import Service
from serve.schema import REQUEST_ID, ErrorBody, LoraWeight, TextToImageResponse

Schema = dict[str, Any]
Errors = Iterable[type[RequestError]]

NOT_SERVED = (NotReady, Draining, DeviceLost)
"""What `/health` and `/ready` report."""

PROFILE_ERRORS = (Forbidden, BodyTooSlow, BodyTooLarge, UnsupportedMediaType, InvalidRequest)
"""What `/debug/profile` may answer, a fault of the service aside."""

CONNECTION_ERRORS = (MalformedHttp, HeadTooSlow, HeadTooLarge, Draining)
"""What a connection of the self-hosted server may answer by itself, whatever the path: in the shape
of this service's own errors, and without `x-request-id`."""

_REF = "#/components/schemas/{model}"
_TEXT: Schema = {"schema": {"type": "string"}}
_BYTES: Schema = {"type": "string", "format": "binary"}


def _ref(model: type[BaseModel]) -> Schema:
    return {"$ref": _REF.format(model=model.__name__)}


def _header(description: str, required: bool = False, **schema: Any) -> Schema:
    schema = {"type": "string"} | schema
    return {"description": description, "required": required, "schema": schema}


_IDS = {
    "x-trace-id": _header("The request's trace.", True, pattern="^[0-9a-f]{32}$"),
    "x-request-id": _header(
        "The request's name: the caller's own, or a drawn one.", True, pattern=f"^{REQUEST_ID}$"
    ),
}
_TIMING = {"server-timing": _header("The stages that have ended; milliseconds.")}
_BILLED = {"x-fal-billable-units": _header("What fal charges for: megapixels times steps.")}
_NOT_BILLED = {"x-fal-billable-units": _header("For fal.", True, const="0")}
_GENERATED = {**_IDS, **_TIMING, **_BILLED}
"""The headers of every image and every stream."""

_OF_IMAGES = {
    "x-seed": _header("With an image: its seed.", type="integer"),
    "x-prompt-truncated": _header("With an image: as in JSON.", enum=["true", "false"]),
    "x-has-nsfw-concepts": _header(
        "With an image that was checked: as in JSON.", enum=["true", "false"]
    ),
}
_UNBUFFERED = {"X-Accel-Buffering": _header("With a stream, for nginx.", const="no")}
_ETAG = {"ETag": _header("The page's version.", True)}

_RETRY_AFTER = _header("Seconds.", type="integer", minimum=1)
_FAL_RETRIES = _header("For fal's queue: whether the request may be tried again.", enum=["0", "1"])

_KNOW_WHEN = frozenset((QueueFull.error_type, KeyLimitReached.error_type))
"""The errors of status 429 that say when to try again. The gateway also answers 429 for whatever is
in front of the image app, which may not."""

_BY_STATUS: dict[int, dict[str, Schema]] = {
    401: {"WWW-Authenticate": _header("The scheme of a key.", True)},
    405: {"Allow": _header("The methods of this path.", True)},
    415: {
        "Accept": _header("The media type that a body must have."),
        "Accept-Encoding": _header("The encoding that a body must have."),
    },
    429: {"Retry-After": _RETRY_AFTER | {"required": True}},
    500: {"X-Fal-Needs-Retry": _FAL_RETRIES},
    502: {"X-Fal-Needs-Retry": _FAL_RETRIES, "Retry-After": _RETRY_AFTER},
    503: {
        "Retry-After": _RETRY_AFTER,
        "x-fal-stop-runner": _header("For fal: the runner is broken.", const="1"),
    },
    504: {"X-Fal-Needs-Retry": _FAL_RETRIES | {"required": True}},
}
"""What errors of a status have beside `_IDS`. The security headers are in no description: every
answer has them."""
_MODELS_PATH = OPENAI_PREFIX + "models"
_MODEL_PATH = OPENAI_PREFIX + "models/{name}"
_WITHOUT_A_MODEL = (NotReady, Draining)
"""What these two answer until the model is loaded."""


def install_document(
    app: FastAPI,
    service: Callable[[], Service | None],
    endpoints: Collection[str],
    errors: Sequence[type[RequestError]],
    connection_errors: Sequence[type[RequestError]] = (),
) -> None:
    """Replace the app's OpenAPI document by a corrected one.

    Args:
        service: returns the service, or None before there is one. Its settings and its warm shapes
            restrict what the document allows.
        endpoints: the paths that generate.
        errors: what a request to them may get.
        connection_errors: what any request may get from the server instead of the app.
    """
    derive = app.openapi
    corrected: Schema = {}

    def document() -> Schema:
        if not corrected:
            corrected.update(_corrected(app, derive(), endpoints, errors, connection_errors))
        return _restricted(corrected, service())

    app.openapi = document  # type: ignore[method-assign]


def _corrected(
    app: FastAPI,
    document: Schema,
    endpoints: Collection[str],
    errors: Sequence[type[RequestError]],
    connection_errors: Sequence[type[RequestError]],
) -> Schema:
    document = copy.deepcopy(document)
    document["info"]["version"] = __version__
    schemas: Schema = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for name, schema in _exact_schemas(app).items():
        schemas[name] = {**schemas.get(name, {}), **schema}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            responses.pop("422", None)
            openai = path.startswith(OPENAI_PREFIX)
            generates = path in endpoints and method == "post"
            found: list[type[RequestError]] = [RequestError]
            if generates:
                responses["200"]["headers"] = dict(_GENERATED)
                found = [each for each in errors if openai or each is not ModelNotFound]
            elif path == _MODELS_PATH:
                found += _WITHOUT_A_MODEL
            elif path == _MODEL_PATH:
                found += [ModelNotFound, *_WITHOUT_A_MODEL]
            if (
                connection_errors
                and path not in FOR_EVERY_CONNECTION
                and TooManyConnections not in found
            ):
                found.append(TooManyConnections)
            responses |= _error_responses(found, openai, generates)
    for path, correct in _BY_PATH.items():
        for method, operation in document["paths"].get(path, {}).items():
            if correct is _image and NotAcceptable not in errors:
                continue  # it answers JSON only, so no Accept header can be refused
            if path not in endpoints or method == "post":
                correct(operation)
    if (page := document["paths"].get("/", {}).get("get")) is not None:
        _page(page)
    for operations in document["paths"].values():
        for operation in operations.values():
            _add_connection_errors(operation["responses"], connection_errors)
    document["components"]["responses"] = _OF_NO_OPERATION
    return document


def _add_connection_errors(responses: Schema, errors: Errors) -> None:
    for status, ours in _error_responses(errors).items():
        ours["headers"]["x-request-id"]["required"] = False
        app = responses.get(status)
        if app is not None:
            schemas = [each["content"]["application/json"]["schema"] for each in (app, ours)]
            ours["content"] = {"application/json": {"schema": {"anyOf": schemas}}}
            both = dict.fromkeys((*app["description"].split(" or "), ours["description"]))
            ours["description"] = " or ".join(both)
            only_the_apps = app["headers"].keys() - _IDS.keys() - _NOT_BILLED.keys()
            for name in only_the_apps:
                ours["headers"][name] = app["headers"][name] | {"required": False}
        responses[status] = ours


def _exact_schemas(app: FastAPI) -> Schema:
    """Pydantic's own schemas of all requests, responses and errors."""
    models: list[tuple[Any, JsonSchemaMode]] = [
        (ErrorBody, "serialization"),
        (OpenAIErrorBody, "serialization"),
        (TextToImageResponse, "serialization"),
        (ProfileRequest, "validation"),
    ]
    for route in app.routes:
        if not isinstance(route, APIRoute):
            continue
        if route.body_field is not None:
            models.append((route.body_field.field_info.annotation, "validation"))
        if isinstance(route.response_model, type):
            models.append((route.response_model, "serialization"))
        if route.path == OPENAI_IMAGES:
            models += [(PartialImage, "serialization"), (CompletedImage, "serialization")]
    _, schema = models_json_schema(models, ref_template=_REF)
    exact: Schema = schema["$defs"]
    return exact


def _error_responses(errors: Errors, openai: bool = False, generates: bool = False) -> Schema:
    """The responses of all `errors` by status.

    Args:
        openai: in the shape and with the statuses of OpenAI's API.
        generates: of an endpoint that generates.
    """
    types: dict[int, list[str]] = {}
    for error in errors:
        if error is not ClientGone:  # nobody receives that answer
            status = openai_status(error) if openai else error.status
            types.setdefault(status, []).append(error.error_type)
    if 502 in types:  # the gateway answers 502 where the image app answered 503
        types[502] += types.get(503, [])
    return {
        str(status): _error_response(status, types[status], openai, generates)
        for status in sorted(types)
    }


def _error_response(
    status: int, error_types: Sequence[str], openai: bool, generates: bool
) -> Schema:
    headers = copy.deepcopy({**_IDS, **_NOT_BILLED, **_BY_STATUS.get(status, {})})
    if generates:
        headers |= _TIMING
    if status == 429 and not _KNOW_WHEN.issuperset(error_types):
        headers["Retry-After"]["required"] = False
    if openai:
        headers["x-should-retry"] = _header("For OpenAI's clients.", True, enum=["true", "false"])
    if openai:
        schema: Schema = _ref(OpenAIErrorBody)
    else:
        this = {"properties": {"error_type": {"enum": list(error_types)}}}
        schema = {"allOf": [_ref(ErrorBody), this]}
    return {
        "description": " or ".join(f"`{error_type}`" for error_type in error_types),
        "headers": headers,
        "content": {"application/json": {"schema": schema}},
    }


def _stream(operation: Schema) -> None:
    events = {
        "queued": _object(waiting={"type": "integer"}, trace_id={"type": "string"}),
        "step": _object(
            index={"type": "integer"}, total={"type": "integer"}, gpu_ms={"type": "number"}
        ),
        "image": _ref(TextToImageResponse),
        "error": _ref(ErrorBody),
    }
    operation["responses"]["200"]["headers"] |= _UNBUFFERED
    operation["responses"]["200"] |= {
        "description": "Server-sent events: `queued`, `step`, then `image` or `error`.",
        "content": {"text/event-stream": _events(events)},
    }


def _events(data_by_name: Mapping[str, Schema]) -> Schema:
    """A stream of these events, whose data is JSON. `itemSchema`, of OpenAPI 3.2, describes one
    event. An older tool finds no schema, which is right: what arrives is not one JSON text."""
    data = {"type": "string", "contentMediaType": "application/json"}
    items = [
        _object(event={"const": name}, data={**data, "contentSchema": schema})
        for name, schema in data_by_name.items()
    ]
    return {"itemSchema": {"oneOf": items}}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _image(operation: Schema) -> None:
    """JSON, or the image itself if the Accept header names an image type."""
    operation["responses"]["200"]["headers"] |= _OF_IMAGES
    content = operation["responses"]["200"]["content"]
    content |= {content_type: {"schema": _BYTES} for content_type in CONTENT_TYPES.values()}


def _openai_images(operation: Schema) -> None:
    operation["responses"]["200"]["headers"] |= _UNBUFFERED
    events = {
        "image_generation.partial_image": _ref(PartialImage),
        "image_generation.completed": _ref(CompletedImage),
        "error": _ref(OpenAIErrorBody),
    }
    operation["responses"]["200"]["content"]["text/event-stream"] = _events(events)


def _metrics(operation: Schema) -> None:
    operation["responses"]["200"] |= {
        "description": "OpenMetrics if the Accept header allows it, else Prometheus text.",
        "content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT},
    }


def _health(operation: Schema) -> None:
    _state(operation, "status", {"200": ["ok"], "503": ["unhealthy"]})
    hang = _object(
        stage={"type": "string"},
        step={"type": ["integer", "null"]},
        silent_seconds={"type": "number"},
    )
    unhealthy = operation["responses"]["503"]["content"]["application/json"]["schema"]
    unhealthy["allOf"][-1]["properties"]["hang"] = hang  # of a run, if one does


def _ready(operation: Schema) -> None:
    states = {"200": ["ready"], "503": ["starting", "failed", "draining", "ready"]}
    _state(operation, "state", states)


def _state(operation: Schema, name: str, values: dict[str, list[str]]) -> None:
    """An answer that names a state in both its 200 and its 503."""
    responses = operation["responses"]
    responses |= _error_responses(NOT_SERVED)
    schemas = {
        status: _object(**{name: {"type": "string", "enum": allowed}})
        for status, allowed in values.items()
    }
    responses["200"]["content"] = {"application/json": {"schema": schemas["200"]}}
    responses["503"]["content"]["application/json"]["schema"]["allOf"].append(schemas["503"])


def _profile(operation: Schema) -> None:
    body = {"schema": _ref(ProfileRequest)}
    operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    operation["responses"]["200"]["content"]["application/json"]["schema"] = _object(
        armed={"type": "integer"}, profiles={"type": "array", "items": {"type": "string"}}
    )
    operation["responses"] |= _error_responses(PROFILE_ERRORS)


def _page(operation: Schema) -> None:
    operation["responses"]["200"] |= {"content": {"text/html": _TEXT}, "headers": _ETAG}
    operation["responses"]["304"] = {
        "description": "The client has this version of the page.",
        "headers": _ETAG,
    }


def _timeline(operation: Schema) -> None:
    operation["responses"] |= _error_responses([RequestError, NotFound])


def _requests(operation: Schema) -> None:
    operation["responses"] |= _error_responses([RequestError, Forbidden])


def _of_any_path(error: type[RequestError]) -> Schema:
    """The response to what is no operation: an unknown path, or another method."""
    response = _error_response(error.status, [error.error_type], openai=False, generates=False)
    schema = response["content"]["application/json"]["schema"]
    openais = _ref(OpenAIErrorBody)
    response["content"]["application/json"]["schema"] = {"anyOf": [schema, openais]}
    response["headers"]["x-should-retry"] = _header(f"Below {OPENAI_PREFIX}.")
    return response


_OF_NO_OPERATION = {each.__name__: _of_any_path(each) for each in (NotFound, MethodNotAllowed)}

_BY_PATH: dict[str, Callable[[Schema], None]] = {
    "/": _image,
    "/stream": _stream,
    IMAGE_TO_IMAGE: _image,
    IMAGE_TO_IMAGE_STREAM: _stream,
    OPENAI_IMAGES: _openai_images,
    "/metrics": _metrics,
    "/health": _health,
    "/ready": _ready,
    "/timeline/{trace_id}": _timeline,
    "/debug/requests": _requests,
    "/debug/profile": _profile,
}


def _restricted(document: Schema, service: Service | None) -> Schema:
    """The document with the sizes, the guidance, the LoRAs and the safety check that are served."""
    document = copy.deepcopy(document)
    if service is not None and service.settings.api_keys:
        _with_keys(document)
    lora = document["components"]["schemas"].get(LoraWeight.__name__)
    if lora is not None and service is not None and service.readiness.loras:
        lora["properties"]["path"]["enum"] = list(service.readiness.loras)
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if not {"width", "height", "guidance_scale"} <= properties.keys():
            continue
        for side in ("width", "height"):
            properties[side] |= _side(side, service)
        if service is not None and must_be_checked(service.settings):
            properties.get("enable_safety_checker", {})["const"] = True
        if service is not None and not serves_guidance(service.settings):
            for option in properties["guidance_scale"]["anyOf"]:
                if option["type"] == "number":
                    option["maximum"] = 1
    return document


def _with_keys(document: Schema) -> None:
    """Add how a key is sent, which operations need one, and what is answered without."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document["security"] = [{"bearer": []}, {"x-api-key": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if is_open(path, method.upper()):
                operation["security"] = []
            else:
                openai = path.startswith(OPENAI_PREFIX)
                operation["responses"] |= _error_responses([Unauthorized], openai)


def _side(side: str, service: Service | None) -> Schema:
    """The schema of a width or height: what is warm, or any that the model could draw."""
    allowed: Schema = {
        "minimum": SMALLEST_SIDE,
        "maximum": LARGEST_SIDE,
        "multipleOf": PIXELS_PER_LATENT,
    }
    warm = () if service is None else service.readiness.shapes or service.settings.shapes or ()
    described = "Pixels; null: the default size."
    if service is not None and warm:
        described += f" The size must be one of {', '.join(map(str, warm))}"
        if service.settings.serve_cold_shapes:
            described += ", or another one with fewer pixels than the largest."
        else:
            described += "."
            allowed = {"enum": sorted({getattr(shape, side) for shape in warm})}
    return {
        "anyOf": [{"type": "integer", **allowed}, {"type": "null"}],
        "description": described,
    }
