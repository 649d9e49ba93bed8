"""Adding endpoints to an app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI


def add_get_route(app: FastAPI, path: str, endpoint: Callable[..., Any]) -> None:
    """Add an endpoint for GET, and for HEAD, which the framework does not add."""
    app.add_api_route(path, endpoint, methods=["GET"])
    app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
