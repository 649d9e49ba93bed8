"""`python -m serve doctor`: checks whether the telemetry settings work, and prints a checklist.

It reads the settings as the service does, checks them against what the backend needs
(`settings_checks`), sends a small trace (`trial_export`), and explains the response
(`export_responses`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from serve.settings import ServeSettings
from serve.telemetry.backends import Backend
from serve.telemetry.finding import Finding, Severity
from serve.telemetry.settings_checks import check_settings
from serve.telemetry.trial_export import send_trial_trace


def run(
    settings: ServeSettings,
    print_line: Callable[[str], None],
    *,
    sends: bool = True,
    treat_as: Backend | None = None,
    width: int = 100,
) -> int:
    """Check the settings, send a trace if `sends`, and print the findings.

    Args:
        sends: whether to send a trace.
        treat_as: the backend that the endpoint forwards to, if its host does not show it.
        width: the longest line printed.

    Returns the exit status: 0, or 1 if there is a problem.
    """

    def report(findings: list[Finding]) -> int:
        """Print findings; returns how many problems are among them."""
        wrong = [finding.subject for finding in findings if finding.severity is Severity.PROBLEM]
        for finding in findings:
            # "ok" would mislead beside a problem of the same subject.
            plain = finding.severity is Severity.OK and finding.subject in wrong
            print_line(_lines(finding, "" if plain else finding.severity.value, width))
        return len(wrong)

    problems = report(check_settings(settings, treat_as))
    if sends:
        problems += report(send_trial_trace(settings, treat_as))
    unsent = "" if sends else " Nothing was sent."
    if problems:
        count = "one problem" if problems == 1 else f"{problems} problems"
        print_line(f"\nSpans will not arrive as they should: {count}.{unsent}")
        return 1
    print_line(f"\nNothing is wrong with the settings.{unsent}" if unsent else "\nSpans arrive.")
    return 0


def _lines(finding: Finding, severity: str, width: int) -> str:
    """A finding on lines of at most `width` characters, its advice below it."""
    lead = f"{severity:<8} {finding.subject:<12} "
    indent = " " * len(lead)
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(
        finding.text, width, initial_indent=lead, subsequent_indent=indent, **options
    )
    if finding.advice:
        lines += textwrap.wrap(
            finding.advice,
            width,
            initial_indent=indent + "-> ",
            subsequent_indent=indent + "   ",
            **options,
        )
    return "\n".join(lines)
