"""What stops a command of the bench: one sentence, and exit status 2."""

from __future__ import annotations


class BenchError(Exception):
    """Something that was asked for cannot be done. The message is one sentence that names what was
    wrong and what is allowed."""


class ResultFileError(BenchError):
    """A result file that cannot be used; the message names the file."""
