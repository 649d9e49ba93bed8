"""Errors that end a command of the bench with one sentence and exit status 2."""

from __future__ import annotations


class BenchError(Exception):
    """The command cannot run as it was called. The message is one sentence that names the cause."""


class ResultFileError(BenchError):
    """A result file cannot be used. The message names the file."""
