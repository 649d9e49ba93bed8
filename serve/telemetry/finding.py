"""What the doctor reports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is: a `PROBLEM` keeps spans from arriving, a `NOTE` may be intended."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's checklist. `advice` says what to do, if there is something to do."""

    severity: Severity
    subject: str
    text: str
    advice: str = ""
