"""The server of `bench overload`, whose uploads take time."""

from __future__ import annotations

import time

from bench.service.storing_server import slow_storage


def test_an_upload_takes_its_time_and_gives_the_image() -> None:
    started = time.monotonic()
    assert slow_storage(0.05)(b"\x00", "png") == "data:image/png;base64,AA=="
    assert time.monotonic() - started >= 0.05
