"""Reading the apps' tables in pyproject.toml with fal's own code."""

from __future__ import annotations

import pytest
from fal.api import FalServerlessHost, Options, _sdist
from fal.cli._utils import AppData, get_app_data_from_toml
from fal.project import find_project_root
from fal.utils import load_function_from

from tests.support.processes import ROOT

FAL_DRAIN_SECONDS = 5.0
"""How long fal waits for its own uploads before it calls teardown."""
SDIST_URL = "https://cdn.test/stepspan.tar.gz"


def read_table(name: str, monkeypatch: pytest.MonkeyPatch) -> AppData:
    """`[tool.fal.apps.NAME]`, as fal's own code reads it."""
    monkeypatch.chdir(ROOT)
    find_project_root.cache_clear()
    return get_app_data_from_toml(name)


def resolve(table: AppData, entry_point: str, monkeypatch: pytest.MonkeyPatch) -> Options:
    """The options that `fal deploy` would send, loaded by fal's own code; no sdist is uploaded."""
    monkeypatch.setattr(_sdist, "_resolve_sdist_url", lambda *_: ("stepspan", SDIST_URL))
    host = FalServerlessHost()
    loaded = load_function_from(
        host,
        None,
        options=table.options,
        app_name=table.name,
        app_auth=table.auth,
        python_entry_point=table.python_entry_point,
    )
    assert loaded.function.run_entrypoint == entry_point
    return host.prepare_options(loaded.function.options)
