"""Puts the playground into the self-hosted server. The fal app has none of it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from serve.engine.runtime import Runtime
from serve.errors import Forbidden, NotFound
from serve.http.authentication import is_operator
from serve.http.playground.page_files import INDEX, PageFile, page_files
from serve.http.playground.recent import RecentRequests
from serve.http.playground.stats import stats
from serve.http.routes import add_get_route

TIMELINE_SECONDS = 0.5
"""How long `/timeline` waits. A request is recorded after its client has read the last byte."""

_TRACE_ID = re.compile("[0-9a-f]{32}")


def install_playground(app: FastAPI, runtime: Runtime) -> None:
    """Add the page, its figures and the timelines, as far as the settings allow them.

    All of these routes answer while the model warms up.
    """
    settings = runtime.settings
    if not settings.playground and not settings.debug:
        return
    recent = RecentRequests()
    runtime.recorder.listen(recent.add)
    if settings.playground:
        _install_page(app, runtime, recent)
    if settings.debug:
        _install_debug(app, runtime, recent)


def _install_page(app: FastAPI, runtime: Runtime, recent: RecentRequests) -> None:
    for file in page_files().values():
        if file.name == INDEX:
            add_get_route(app, "/", _endpoint(file))
        else:
            # Not in the OpenAPI document: these are parts of the page.
            path = f"/playground/{file.name}"
            app.add_api_route(
                path, _endpoint(file), methods=["GET", "HEAD"], include_in_schema=False
            )

    async def show_stats() -> Response:
        """The figures that the playground shows."""
        return JSONResponse(stats(runtime, recent))

    async def show_timeline(trace_id: str) -> Response:
        """The timeline of one of the last requests, for who knows its trace id: the client that
        made it. Waits a moment for a request that ends just now."""
        end = time.monotonic() + TIMELINE_SECONDS
        while (found := recent.timeline_of(trace_id)) is None:
            if time.monotonic() > end or not _TRACE_ID.fullmatch(trace_id):
                raise NotFound
            await asyncio.sleep(0.02)
        return JSONResponse(found)

    add_get_route(app, "/stats", show_stats)
    add_get_route(app, "/timeline/{trace_id}", show_timeline)


def _install_debug(app: FastAPI, runtime: Runtime, recent: RecentRequests) -> None:
    async def requests(request: Request) -> Response:
        """The timelines of the last requests, the newest first. For an operator only."""
        if not is_operator(request.scope, runtime.settings.admin_token):
            raise Forbidden(
                "Only an operator may read the requests of all callers: from this machine, or with "
                "SDXL_ADMIN_TOKEN as bearer token."
            )
        return JSONResponse({"requests": recent.timelines()})

    add_get_route(app, "/debug/requests", requests)


def _endpoint(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        """A page to try the model with, and to see where each request's time went."""
        return file.response(request)

    return page
