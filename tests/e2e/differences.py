"""The rows of the table of differences in docs/fal.md, and which tests assert them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., None])

ROWS: set[str] = set()


def row(title: str) -> Callable[[Test], Test]:
    """The decorated test asserts this row."""

    def asserts(test: Test) -> Test:
        ROWS.add(title)
        return test

    return asserts


def documented_rows() -> list[str]:
    document = Path(__file__).resolve().parents[2] / "docs" / "fal.md"
    section = document.read_text().split("## What differs from the self-hosted server")[1]
    table = section.split("\n## ")[0]
    _header, *titles = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    return titles
