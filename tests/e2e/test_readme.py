"""The README shows what is: its transcript and its table of settings."""

from __future__ import annotations

import re

import pytest

from serve.settings import ServeSettings, environment_name
from tests.e2e.transcript import README, in_readme, record, shape


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_the_transcript_is_what_a_request_gives() -> None:
    assert shape(in_readme()) == shape(record())


def test_every_setting_is_in_the_readme_and_no_other() -> None:
    table = README.read_text().split("## Settings")[1].split("\n## ")[0]
    named = set(re.findall(r"`((?:SDXL|OTEL|ENABLE)_[A-Z_]+)`", table))
    ours = {environment_name(field) for field in ServeSettings.model_fields}
    assert ours <= named
    assert {name for name in named if name.startswith("SDXL_")} <= ours
