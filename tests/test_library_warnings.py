"""pytest's warning filters (pyproject.toml) against libraries that compile with warnings."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pytest


@pytest.mark.parametrize("source", [r"PATTERN = '\.'", r"PATTERN = '\400'", "SAME = 1if 1 else 2"])
def test_a_library_without_bytecode_imports(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "library_with_warnings", raising=False)
    (tmp_path / "library_with_warnings.py").write_text(source + "\n")
    # The filters stay those of the run; the warning is recorded instead of shown in its summary.
    with warnings.catch_warnings(record=True) as caught:
        importlib.import_module("library_with_warnings")
    assert [w.category for w in caught] in ([SyntaxWarning], [DeprecationWarning])
