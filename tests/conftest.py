"""How the tests are divided between workers, and how many cases a parser is tested with."""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Without a time limit a case: a busy machine takes many times as long.
settings.register_profile("quick", deadline=None)
settings.load_profile("quick")
# `make test-slow`: pytest -m parser --hypothesis-profile=long
settings.register_profile(
    "long",
    max_examples=50_000,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

TOGETHER = {
    "tests/e2e/test_contract.py": "servers",
    "tests/e2e/test_fal_client.py": "servers",
    "tests/e2e/test_gateway.py": "servers",
    "tests/e2e/test_image_responses.py": "servers",
    "tests/e2e/test_load.py": "servers",
    "tests/e2e/test_openai.py": "servers",
    "tests/e2e/test_openapi.py": "servers",
}
"""Files whose tests share the servers of tests/e2e: one worker starts them and runs all."""


# A shell starts its background jobs with SIGINT ignored, and nohup its command with SIGHUP. So they
# would be in all that the tests start.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Seek no garbage while libraries and tests are imported: a fourth of that time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Generator[None, object, object]:
    """Seek none among what was imported: a tenth of the tests' time."""
    gc.freeze()
    try:
        return (yield)
    finally:
        gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker runs all tests of a file, which share its fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return TOGETHER.get(file, file)

    # In the order of their names, which ends with short files. By default the files with the fewest
    # tests come last, and those are the longest.
    config.option.loadscopereorder = False
    return ByFile(config, log)
