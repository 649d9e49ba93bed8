"""Loaded by the schemathesis command line: keeps what it generates valid, and quick to serve."""

from __future__ import annotations

from typing import Any

import schemathesis


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
