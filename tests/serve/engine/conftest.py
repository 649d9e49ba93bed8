"""What several files of tests compile with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def traced() -> Iterator[None]:
    """torch.compile without code generation."""
    real = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch,
            "compile",
            lambda function, **_: real(function, backend="eager", fullgraph=True, dynamic=False),
        )
        yield
    torch.compiler.reset()
