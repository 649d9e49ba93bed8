"""Loaded by the schemathesis command line: keeps what it generates valid, and quick to serve; and a
check of its own, that the document declares every answered header."""

from __future__ import annotations

from typing import Any

import schemathesis

from tests.support.declared_headers import undeclared


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """One step for any valid number of them, no deadline that would pass, no profiles."""
    body = case.body
    if not isinstance(body, dict):
        return
    steps, seconds = body.get("num_inference_steps"), body.get("deadline_seconds")
    if isinstance(steps, int) and 1 < steps <= 100:
        body["num_inference_steps"] = 1
    if isinstance(seconds, int | float) and 0 < seconds <= 3600:
        body["deadline_seconds"] = 60
    if isinstance(body.get("n"), int) and 1 < body["n"] <= 4:
        body["n"] = 2
    if isinstance(body.get("num_images"), int) and 1 < body["num_images"] <= 4:
        body["num_images"] = 2
    if isinstance(body.get("requests"), int) and 0 < body["requests"] <= 20:
        body["requests"] = 0


@schemathesis.check
def every_header_is_declared(_context: Any, response: Any, case: Any) -> None:
    """`response_headers_conformance` checks only those that are declared."""
    operation = case.operation
    found = undeclared(
        operation.schema.raw_schema,
        operation.method.lower(),
        operation.path,
        response.status_code,
        response.headers,
    )
    assert not found, f"{response.status_code}: {', '.join(sorted(found))} not declared"
