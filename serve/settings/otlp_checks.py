"""Whether HTTP can carry what the settings name: URLs, proxies, headers, and files of certificates.

The HTTP client would find out at every export, with a message that quotes the value.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from opentelemetry.util.re import parse_env_headers

from serve.errors import ConfigurationError

_OWN_HEADERS = frozenset(
    {"connection", "content-encoding", "content-length", "content-type", "host"}
    | {"transfer-encoding", "te", "upgrade"}
)
"""Headers that the exporter and its HTTP client write: another value breaks every export."""


def is_http_url(url: str) -> bool:
    """Whether a URL has a host, a port that exists, and a user name and password that fit into a
    header; judged by the HTTP client that the exporter uses."""
    from requests import PreparedRequest, RequestException

    if not re.fullmatch(r"https?://[!-~]+", url):
        return False
    try:
        parts = urlsplit(url)
        PreparedRequest().prepare_url(url, None)
        host = parts.hostname or ""
        host.encode("idna")  # as the client does before it connects
        return bool(host) and parts.port != 0 and _fits_userinfo(parts.netloc)
    except (ValueError, RequestException):
        return False


def is_proxy(url: str) -> bool:
    """Whether a proxy's URL, with or without a scheme, can be used."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme.lower() not in (
        "http",
        "https",
        "socks4",
        "socks4a",
        "socks5",
        "socks5h",
    ):
        return False
    return is_http_url("http://" + (rest if separator else url))


def _fits_userinfo(netloc: str) -> bool:
    return re.fullmatch(r"[ -~]*", unquote(netloc.rpartition("@")[0])) is not None


def refuse_unsendable_headers(variable: str, raw: str) -> None:
    """Refuse headers that HTTP cannot carry once their percent-encoding is undone.

    Raises:
        ConfigurationError: names the variable and the header, and never the value.
    """
    for name, value in parse_env_headers(raw, liberal=True).items():
        shown = shown_header_name(name, value)
        if not re.fullmatch(r"[-!#$%&'*+.^_`|~0-9a-z]+", name):
            fault = f"the name of {shown} has a character that HTTP does not allow in one"
        elif not re.fullmatch(r"[\t -~]*", value):
            fault = (
                f"the value of {shown}, percent-decoded, has a line break or another character "
                "that HTTP does not carry: visible ASCII characters and spaces are allowed. Its "
                "value is not shown"
            )
        elif name in _OWN_HEADERS:
            fault = f"{name} is written by the exporter: any other header is allowed"
        else:
            continue
        raise ConfigurationError(f"{variable} is not allowed as it is: {fault}.")


def shown_header_name(name: str, value: str) -> str:
    """A header's name, unless it may be a key in the name's place."""
    if value.strip("=") and re.fullmatch(r"[a-z]+([-_]([a-z]+|[a-z0-9]{1,3}))*", name):
        return name
    return "a header (its name is not shown, it may be the key)"


def refuse_unusable_certificates(files: Mapping[str, str | None]) -> None:
    """Read the files of certificates and keys, as the HTTP client will.

    Args:
        files: the paths by the names of their variables; None: not set.

    Raises:
        ConfigurationError: a file is missing or holds something else.
    """
    for signal in ("", "TRACES_", "METRICS_"):
        start, general = f"OTEL_EXPORTER_OTLP_{signal}", "OTEL_EXPORTER_OTLP_"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority = files[f"{start}CERTIFICATE"]
        try:
            if authority is not None:
                context.load_verify_locations(authority)
        except (OSError, ValueError):
            raise ConfigurationError(
                f"{start}CERTIFICATE={authority!r} is not allowed. Allowed: a PEM file with the "
                "endpoint's certificate authority."
            ) from None
        own, key = files[f"{start}CLIENT_CERTIFICATE"], files[f"{start}CLIENT_KEY"]
        if own is None and key is None:
            continue
        own, key = (
            own or files[f"{general}CLIENT_CERTIFICATE"],
            key or files[f"{general}CLIENT_KEY"],
        )
        if own is None:
            raise ConfigurationError(
                f"{start}CLIENT_KEY needs its certificate: set {start}CLIENT_CERTIFICATE."
            )
        try:
            # Without a password here, OpenSSL would ask for it at the terminal.
            context.load_cert_chain(own, key, password="")
        except (OSError, ValueError):
            raise ConfigurationError(
                f"{start}CLIENT_CERTIFICATE={own!r} is not allowed as it is. Allowed: a PEM file "
                "with this client's certificate, with its unencrypted key there or in the file of "
                f"{start}CLIENT_KEY."
            ) from None
