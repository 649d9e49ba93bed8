"""Who may use the service: callers with a key, and operators.

    path                                       with `SDXL_API_KEYS`
    /health, /ready, the playground's files    open
    /metrics                                   for operators
    /debug/...                                 for operators, as without keys; its endpoints check
    every other, unknown paths too             for callers with a key

An operator has `SDXL_ADMIN_TOKEN`, or is on this machine. Without `SDXL_API_KEYS` nothing is
checked here. fal checks its callers by itself, before a request reaches an app.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import Scope

from serve.engine.call import Call
from serve.errors import KeyLimitReached, Unauthorized
from serve.http.service import Service
from serve.settings.api_keys import ApiKey, digest_of, is_same, matching

OPEN_PATHS = ("/health", "/ready")
PAGE_FILES = "/playground/"
"""The prefix of the paths of the playground's files; the page itself is at `/`."""
METRICS = "/metrics"
DEBUG = "/debug/"

_SCHEMES = ("bearer", "key")
"""OpenAI's clients send `Authorization: Bearer KEY`, fal's `Authorization: Key KEY`."""

# Headers by which a proxy, a tunnel or a CDN names itself or its client. Nothing on this machine
# itself sends one.
_FORWARDED_BY = "x-forwarded"
_FORWARDING_HEADERS = frozenset(
    (
        "forwarded",
        "forwarded-for",
        "via",
        "x-real-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-original-forwarded-for",
        "x-envoy-external-address",
        "x-amzn-trace-id",
        "x-azure-clientip",
        "true-client-ip",
        "fastly-client-ip",
        "fly-client-ip",
        "cf-connecting-ip",
        "cf-ray",
        "cdn-loop",
    )
)
# What `Connection` may name. A proxy drops every header that it names, and some (Apache before
# 2.4.54) drop so also those by which they name their client.
_CONNECTION_OPTIONS = frozenset(("close", "keep-alive", "upgrade", "http2-settings", "te", ""))
# Headers by which a browser names the page that a request comes from.
_PAGE_HEADERS = frozenset(("origin", "sec-fetch-site"))
# A name or an address, and a port. In another form readers of URLs find different names:
# `localhost:evil.test` is `localhost` to Python.
_HOST = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")


class Authentication:
    """Checks the key of each request, and counts those in progress by the name of their key."""

    def __init__(self) -> None:
        self._in_progress: Counter[str] = Counter()

    def check(self, service: Service | None, call: Call, scope: Scope) -> ApiKey | None:
        """The caller's key, which `call` then names; None where none is needed.

        Raises:
            Unauthorized: the path needs a key, and the request has none of them.
        """
        keys = () if service is None else service.settings.api_keys
        if service is None or not keys or is_open(call.endpoint, call.method):
            return None
        if call.endpoint == METRICS:
            if not is_operator(scope, service.settings.admin_token):
                raise Unauthorized(
                    "Only an operator may read the metrics: with SDXL_ADMIN_TOKEN as the key, or "
                    "from this machine."
                )
            return None
        for given in given_keys(Headers(scope=scope)):
            if (key := matching(keys, given)) is not None:
                call.api_key = key.name
                return key
        raise Unauthorized

    @contextmanager
    def admitted(self, service: Service, call: Call, scope: Scope) -> Iterator[None]:
        """Check the key of a request that generates, which is in progress during the block.

        Raises:
            Unauthorized: it has none of the keys.
            KeyLimitReached: as many requests with its name are in progress as may be.
        """
        key = self.check(service, call, scope)
        if key is None:
            yield
            return
        if key.limit is not None and self._in_progress[key.name] >= key.limit:
            raise KeyLimitReached(key.limit)
        self._in_progress[key.name] += 1
        service.metrics.set_key_in_flight(key.name, self._in_progress[key.name])
        try:
            yield
        finally:
            self._in_progress[key.name] -= 1
            service.metrics.set_key_in_flight(key.name, self._in_progress[key.name])


def is_open(path: str, method: str) -> bool:
    """Whether a path needs no caller's key. `/debug/...` has a rule of its own."""
    page = method in ("GET", "HEAD") and (path == "/" or path.startswith(PAGE_FILES))
    return page or path in OPEN_PATHS or path.startswith(DEBUG)


def given_keys(headers: Headers) -> Iterator[str]:
    """The keys that a request has. A header that is there twice gives none."""
    authorizations = headers.getlist("authorization")
    if len(authorizations) == 1:
        scheme, _, key = authorizations[0].strip().partition(" ")
        if scheme.lower() in _SCHEMES and key.strip():
            yield key.strip()
    own = headers.getlist("x-api-key")
    if len(own) == 1 and own[0].strip():
        yield own[0].strip()


def is_operator(scope: Scope, token: SecretStr | None) -> bool:
    """Whether a request has the admin token, or comes from this machine directly.

    A request that a proxy on this machine forwards, or that a page in a browser on it makes, comes
    from elsewhere.
    """
    headers = Headers(scope=scope)
    if token is not None:
        digest = digest_of(token.get_secret_value())
        if any(is_same(given, digest) for given in given_keys(headers)):
            return True
    return _is_direct(scope, headers)


def numeric_address(text: str) -> IPv4Address | IPv6Address:
    """An address without its scope; one of IPv4 that is written as IPv6 is the one of IPv4.

    Raises:
        ValueError: `text` is a name, or nothing.
    """
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own. False for a name."""
    try:
        return numeric_address(host).is_loopback
    except ValueError:
        return False


def _is_direct(scope: Scope, headers: Headers) -> bool:
    names = set(headers.keys())
    if names & (_FORWARDING_HEADERS | _PAGE_HEADERS):
        return False
    if any(name.startswith(_FORWARDED_BY) for name in names):
        return False
    options = ",".join(headers.getlist("connection")).lower().split(",")
    if not {option.strip() for option in options} <= _CONNECTION_OPTIONS:
        return False
    client = scope.get("client")
    if client is None or not is_loopback(client[0]):
        return False
    # A page whose name leads to this machine is, to its browser, a page of this server; only the
    # Host header has the name (DNS rebinding).
    return all(_names_this_machine(host) for host in headers.getlist("host"))


def _names_this_machine(host: str) -> bool:
    parts = _HOST.fullmatch(host)
    return parts is not None and (
        parts[1].lower() == "localhost" or is_loopback(parts[1].strip("[]"))
    )
