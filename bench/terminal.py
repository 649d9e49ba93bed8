"""Tables and coloured text for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

COLOURS = {"red": "31", "green": "32", "yellow": "33", "faint": "2", "bold": "1"}


def coloured(text: str, colour: str | None) -> str:
    """The text in a colour, if standard output is a terminal and NO_COLOR is not set."""
    if colour is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    colours: Sequence[str | None] = (),
) -> str:
    """A table with aligned columns, two spaces apart.

    Args:
        left: how many first columns are aligned left. The others are aligned right, but for a last
            column of words.
        colours: one for each row.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    aligned_left = {len(header) - 1} if any(not _is_number(row[-1]) for row in rows) else set()
    aligned_left |= set(range(left))

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if index in aligned_left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    shades = [*colours, *[None] * (len(rows) - len(colours))]
    return "\n".join(
        [coloured(line(header), "bold")]
        + [coloured(line(row), shade) for row, shade in zip(rows, shades, strict=True)]
    )


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] in "+-."


def percent(share: float) -> str:
    """A change in percent, with its sign."""
    return f"{100 * share:+.1f}%"
