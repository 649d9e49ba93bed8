"""Callers' keys as settings: what is read, what is refused, and that no key is shown."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ConfigurationError
from serve.settings import ServeSettings, load_settings
from serve.settings.api_keys import (
    LONGEST_KEY,
    SHORTEST_KEY,
    ApiKey,
    digest_of,
    matching,
    parse_api_keys,
)

OLD = "Wm4tZc8NvR2qLx6Y"
NEW = "pK7dHs3BgF9jTe5A=:+/"
OTHER = "uC1yXn6VbM4wQz8E"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SDXL_API_KEYS", "SDXL_API_KEYS_FILE", "SDXL_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def named(keys: tuple[ApiKey, ...]) -> list[tuple[str, int | None]]:
    return [(key.name, key.limit) for key in keys]


def test_two_keys_of_one_name_and_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_API_KEYS", f" alice:3={OLD}, alice={NEW},b-1={OTHER}")
    keys = load_settings().api_keys
    assert named(keys) == [("alice", 3), ("alice", 3), ("b-1", None)]
    for key, name in ((OLD, "alice"), (NEW, "alice"), (OTHER, "b-1")):
        found = matching(keys, key)
        assert found is not None
        assert found.name == name
    for wrong in ("", OLD[:-1], OLD + "x", OLD.lower(), f"alice={OLD}", "é" * 16):
        assert matching(keys, wrong) is None


def test_keys_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# callers, and their keys\n\nalice={OLD}\n  # a new one, too\nbob:2={NEW}\n")
    monkeypatch.setenv("SDXL_API_KEYS_FILE", str(file))
    assert named(load_settings().api_keys) == [("alice", None), ("bob", 2)]
    monkeypatch.setenv("SDXL_API_KEYS", f"alice={OLD}")
    with pytest.raises(ConfigurationError, match="SDXL_API_KEYS and SDXL_API_KEYS_FILE"):
        load_settings()


@pytest.mark.parametrize("content", ["", "# nothing\n", f"{OLD}\n", f"alice={OLD} \u00e9\n", None])
def test_a_file_without_keys_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    monkeypatch.setenv("SDXL_API_KEYS_FILE", str(file))
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert str(file) in str(caught.value)
    assert OLD[:6] not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        OLD,
        f"={OLD}",
        f"alice={OLD[1:]}",
        f"alice={'x' * (LONGEST_KEY + 1)}",
        f"-alice={OLD}",
        f"al ice={OLD}",
        f"{'a' * 65}={OLD}",
        f"alice:0={OLD}",
        f"alice:10000={OLD}",
        f"alice:={OLD}",
        f"alice:two={OLD}",
        f"alice={OLD},bob={OLD}",
        f"alice={OLD},alice={OLD}",
        f"alice:1={OLD},alice:2={NEW}",
        f"alice={OLD[:8]} {OLD[8:]}",
        f"alice={OLD}\x7f",
        f"alice={OLD}é",
        " ",
        ",",
    ],
)
def test_what_is_no_list_of_keys_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SDXL_API_KEYS", value)
    with pytest.raises(ConfigurationError, match="SDXL_API_KEYS is not allowed") as caught:
        load_settings()
    assert OLD[:6] not in str(caught.value)


def test_an_operators_token_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_API_KEYS", f"alice={OLD}")
    monkeypatch.setenv("SDXL_ADMIN_TOKEN", OLD)
    with pytest.raises(ConfigurationError, match="SDXL_ADMIN_TOKEN") as caught:
        load_settings()
    assert OLD not in str(caught.value)


def test_the_variable_of_clients_does_not_open_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_API_KEY", OLD)
    with pytest.raises(ConfigurationError, match="did you mean SDXL_API_KEYS") as caught:
        load_settings()
    assert OLD not in str(caught.value)


def test_no_representation_has_a_key_or_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_API_KEYS", f"alice={OLD}")
    settings = load_settings()
    shown = f"{settings!r} {settings} {settings.api_keys}"
    assert "alice" in shown
    assert OLD[:6] not in shown
    assert repr(digest_of(OLD))[2:12] not in shown
    assert OLD[:6] not in str(settings.model_dump())


def test_every_key_is_compared_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = parse_api_keys(",".join(f"k{n}={n:016}" for n in range(5)))
    for given_key in (f"{0:016}", f"{4:016}", "wrong", ""):
        compared.clear()
        matching(keys, given_key)
        assert compared == [(32, 32)] * 5  # digests, so the length says nothing either


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
KEYS = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters=","),
    min_size=SHORTEST_KEY,
    max_size=LONGEST_KEY,
)
LIMITS = st.none() | st.integers(1, 9999)


@pytest.mark.parser
@given(
    names=st.lists(NAMES, min_size=1, max_size=4),
    limits=st.lists(LIMITS, min_size=4, max_size=4),
    keys=st.lists(KEYS, min_size=4, max_size=4, unique=True),
    data=st.data(),
)
def test_what_is_written_is_read(
    names: list[str], limits: list[int | None], keys: list[str], data: Any
) -> None:
    by_name = dict(zip(dict.fromkeys(names), limits, strict=False))
    text, expected = "", []
    for name, key in zip(names, keys, strict=False):
        limit = by_name[name]
        text += f"{name}={key}" if limit is None else f"{name}:{limit}={key}"
        text += data.draw(st.sampled_from([",", "\n", " , ", "\r\n"]))
        expected.append(ApiKey(name, digest_of(key), limit))
    assert parse_api_keys(text) == tuple(expected)


@pytest.mark.parser
@given(st.text(max_size=60) | st.text("ab=:,\n #0", max_size=60))
def test_any_text_is_a_list_of_keys_or_refused(text: str) -> None:
    try:
        keys = parse_api_keys(text)
    except ValueError:
        return
    assert keys
    assert all(key.limit is None or key.limit >= 1 for key in keys)


def test_without_the_setting_there_are_no_keys() -> None:
    assert ServeSettings().api_keys == ()
