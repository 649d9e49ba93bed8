"""Who is an operator, with any client and headers. Single cases: test_authentication.py."""

from __future__ import annotations

import re
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from serve.http.authentication import is_loopback, is_operator

pytestmark = pytest.mark.parser

AWAY = "192.0.2.7"
HOSTS = st.sampled_from(
    [
        *("localhost", "LOCALHOST", "127.0.0.1", "127.1", "[::1]", "::1", "[::ffff:127.0.0.1]"),
        *("evil.test", "192.0.2.7", "[fe80::1%lo]", "0", "2130706433", "0x7f.1"),
        *(
            ".",
            ":",
            ":8080",
            ":x",
            "@",
            "/",
            "?",
            "#",
            "[",
            "]",
            "%",
            "\\",
            " ",
            "\t",
            "\xa0",
            "\xff",
        ),
    ]
)
CLIENTS = st.sampled_from(["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "::1%lo"])
ELSEWHERE = st.sampled_from([AWAY, "::ffff:192.0.2.7", "fe80::1%lo", "localhost", "", "0", "::"])
FORWARDING = st.sampled_from(
    ["forwarded", "x-forwarded-for", "X-Forwarded-Anything", "Via", "x-real-ip", "Origin", "cf-ray"]
)


def is_here(client: str, *headers: tuple[str, str]) -> bool:
    """Whether a request is an operator's without a token."""
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return is_operator({"type": "http", "headers": raw, "client": (client, 1)}, None)


@given(st.lists(HOSTS, max_size=4).map("".join) | st.text(st.characters(max_codepoint=255)))
def test_any_host_is_read_and_no_other_name_is_this_machine(host: str) -> None:
    if is_here("127.0.0.1", ("host", host)):
        assert re.fullmatch(
            r"(localhost|127\.[0-9.]+|\[(127[0-9.]+|::1|::ffff:127[0-9.]+)\])(:[0-9]*)?",
            host,
            re.IGNORECASE,
        )


@given(
    st.from_regex(r"[a-z0-9-]{1,12}(\.[a-z0-9-]{1,12}){0,3}", fullmatch=True),
    st.none() | st.integers(0, 65535),
)
def test_a_name_is_this_machine_exactly_if_it_is_localhost(name: str, port: int | None) -> None:
    host = name if port is None else f"{name}:{port}"
    address = re.fullmatch(r"127(\.(0|[1-9][0-9]?|1[0-9]{2}|2[0-4][0-9]|25[0-5])){3}", name)
    assert is_here("127.0.0.1", ("host", host)) == (name == "localhost" or address is not None)


@given(st.integers(0, 2**24 - 1), st.none() | st.integers(0, 65535))
def test_every_loopback_address_is_this_machine(low: int, port: int | None) -> None:
    address = str(IPv4Address(127 * 2**24 + low))
    host = address if port is None else f"{address}:{port}"
    assert is_here(address, ("host", host))
    assert is_here(address, ("host", host.replace(address, f"[::ffff:{address}]")))


@given(
    CLIENTS | ELSEWHERE | st.text(max_size=20),
    st.lists(
        st.tuples(FORWARDING | st.just("x-new"), st.text("a1.,:\xff", max_size=9)), max_size=3
    ),
)
def test_any_client_with_any_headers_is_here_only_directly(
    client: str, headers: list[tuple[str, str]]
) -> None:
    here = is_here(client, *headers)
    if any(name != "x-new" for name, _ in headers) or not is_loopback(client):
        assert not here
    else:
        assert here


@given(ELSEWHERE)
def test_what_is_not_a_loopback_address_is_elsewhere(client: str) -> None:
    assert not is_here(client)


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=16, max_size=40))
def test_only_the_whole_token_makes_an_operator(token: str) -> None:
    def admitted(given_token: str) -> bool:
        raw = [(b"x-api-key", given_token.encode())]
        scope = {"type": "http", "headers": raw, "client": (AWAY, 1)}
        return is_operator(scope, SecretStr(token))

    assert admitted(token)
    assert not admitted(token[:-1])
    assert not admitted(token + token[-1])
    assert not admitted(token.swapcase()) or token.swapcase() == token
