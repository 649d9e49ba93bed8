"""Tracing backends as data: their OTLP/HTTP endpoints, keys, limits and error responses.

The facts are from the backends' own documentation, November 2026. A remark about a key never
contains any part of it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class KeyRemark:
    """A remark about a key's form. `certain`: the key cannot work; else it only looks unusual."""

    text: str
    certain: bool = True


@dataclass(frozen=True, slots=True)
class Region:
    """The OTLP host of one region of a backend; `*` in it is a placeholder for a zone."""

    name: str
    host: str


@dataclass(frozen=True, slots=True)
class Backend:
    """One backend.

    Attributes:
        domains: its own domains. A host in one that is no region's host accepts no OTLP.
        path: the part of the URL between the host and `/v1/traces`.
        port: the port in its documentation's URLs.
        ports: all ports that accept OTLP/HTTP.
        header: the name of the header with the key.
        key: the value of that header, as the documentation calls it.
        remark: checks a decoded key, given the region's name and the names of all headers.
        wanted: optional headers, each with its value and what is missing without it.
        max_bytes: the largest export that it accepts.
        delta_metrics: whether it accepts pushed metrics as deltas only.
        refusals: the meaning of its error statuses.
    """

    name: str
    domains: tuple[str, ...]
    regions: tuple[Region, ...]
    header: str
    key: str
    remark: Callable[[str, str, frozenset[str]], KeyRemark | None]
    path: str = ""
    port: int = 443
    ports: frozenset[int] = frozenset({443})
    wanted: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    max_bytes: int | None = None
    delta_metrics: bool = False
    refusals: Mapping[int, str] = field(default_factory=dict)

    def region_of(self, host: str) -> Region | None:
        return next((region for region in self.regions if fnmatchcase(host, region.host)), None)

    def owns(self, host: str) -> bool:
        return any(host == domain or host.endswith("." + domain) for domain in self.domains)

    def base_url(self, host: str) -> str:
        """The value of `OTEL_EXPORTER_OTLP_ENDPOINT` for one of its hosts."""
        port = "" if self.port == 443 else f":{self.port}"
        return f"https://{host.replace('*', '<zone>')}{port}{self.path}"

    def header_form(self) -> str:
        """The value of `OTEL_EXPORTER_OTLP_HEADERS`."""
        return f"{self.header}={self.key}"


def backend_of(host: str) -> Backend | None:
    """The backend that a host belongs to."""
    return next((backend for backend in BACKENDS if backend.owns(host)), None)


def key_owner(header: str) -> Backend | None:
    """The backend whose key a header of that name holds."""
    return next((backend for backend in BACKENDS if backend.header == header), None)


def endpoints_of(backend: Backend) -> str:
    """The OTLP endpoints of a backend as a text, one for each region."""
    first: dict[str, str] = {}
    for region in backend.regions:  # a region's newest name comes first
        first.setdefault(region.name, backend.base_url(region.host))
    return ", ".join(f"{url} ({name})" if name else url for name, url in first.items())


def _new_relic_key(key: str, region: str, _others: frozenset[str]) -> KeyRemark | None:
    if key.startswith("NRAK-"):
        return KeyRemark("is a user key; spans need an ingest license key")
    if key.startswith("eu01xx") and region not in ("", "EU"):
        return KeyRemark(f"is of the EU region and the endpoint of {region}")
    if region == "EU" and not key.startswith("eu01xx"):
        return KeyRemark("is not of the EU region, whose license keys begin with eu01xx")
    if len(key) != 40:
        return KeyRemark(f"has {len(key)} characters; a license key has 40", certain=False)
    return None


def _datadog_key(key: str, _region: str, _others: frozenset[str]) -> KeyRemark | None:
    if re.fullmatch(r"[0-9a-f]{40}", key):
        return KeyRemark("has the form of an application key; spans need an API key")
    if len(key) != 32:
        return KeyRemark(f"has {len(key)} characters; an API key has 32", certain=False)
    return None


def _honeycomb_key(key: str, _region: str, others: frozenset[str]) -> KeyRemark | None:
    if re.match(r"hc[a-z]mk_", key):
        return KeyRemark("is a management key; spans need an ingest key")
    if re.fullmatch(r"[0-9a-f]{32}", key) and "x-honeycomb-dataset" not in others:
        return KeyRemark(
            "is a Honeycomb Classic key, which needs x-honeycomb-dataset=<dataset> beside it"
        )
    return None


def _grafana_key(key: str, _region: str, _others: frozenset[str]) -> KeyRemark | None:
    scheme, _, credentials = key.partition(" ")
    if scheme.lower() != "basic" or not credentials:
        return KeyRemark("is not of the form `Basic ` and base64 of `instance id:token`")
    try:
        user, colon, token = base64.b64decode(credentials, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return KeyRemark("is not base64 behind `Basic `")
    if not colon or not user.isdigit():
        return KeyRemark("does not begin with the stack's instance id, which is a number")
    if token.startswith("glsa_"):
        return KeyRemark("holds a service account token; spans need an access policy token")
    if not token.startswith(("glc_", "eyJ")):
        return KeyRemark("holds a token unlike Grafana Cloud's, which begin with glc_", False)
    return None


_NEW_RELIC_REFUSAL = "the key is no ingest license key of this region's account"

NEW_RELIC = Backend(
    name="New Relic",
    domains=("nr-data.net", "newrelic.com"),
    regions=(
        Region("US", "otlp.nr-data.net"),
        Region("EU", "otlp.eu01.nr-data.net"),
        Region("Japan", "otlp.jp.nr-data.net"),
        Region("US FedRAMP", "gov-otlp.nr-data.net"),
    ),
    port=4318,
    ports=frozenset({443, 4317, 4318}),
    header="api-key",
    key="<ingest license key>",
    remark=_new_relic_key,
    max_bytes=1_000_000,
    refusals={401: _NEW_RELIC_REFUSAL, 403: _NEW_RELIC_REFUSAL},
)

DATADOG = Backend(
    name="Datadog",
    domains=("datadoghq.com", "datadoghq.eu", "ddog-gov.com"),
    regions=(
        Region("US1", "otlp.datadoghq.com"),
        Region("EU", "otlp.datadoghq.eu"),
        Region("US3", "otlp.us3.datadoghq.com"),
        Region("US5", "otlp.us5.datadoghq.com"),
        Region("AP1", "otlp.ap1.datadoghq.com"),
        Region("AP2", "otlp.ap2.datadoghq.com"),
        # The older names of the trace intake.
        Region("US1", "trace.agent.datadoghq.com"),
        Region("EU", "trace.agent.datadoghq.eu"),
        Region("US3", "trace.agent.us3.datadoghq.com"),
        Region("US5", "trace.agent.us5.datadoghq.com"),
        Region("AP1", "trace.agent.ap1.datadoghq.com"),
        Region("AP2", "trace.agent.ap2.datadoghq.com"),
    ),
    header="dd-api-key",
    key="<API key>",
    remark=_datadog_key,
    wanted={"compute_stats": ("true", "no trace metrics (hits, errors, latency) are computed")},
    max_bytes=3_200_000,
    delta_metrics=True,
    refusals={
        401: "the API key is wrong",
        403: "the endpoint is not of the key's site, the key is wrong, or the organisation is not "
        "admitted to the OTLP trace intake; the site is in the address of Datadog's web page",
    },
)

GRAFANA = Backend(
    name="Grafana Cloud",
    domains=("grafana.net", "grafana.com"),
    regions=(Region("", "otlp-gateway-*.grafana.net"),),
    path="/otlp",
    header="authorization",
    key="Basic%20<base64 of instance id:token>",
    remark=_grafana_key,
    refusals={
        401: "instance id and token do not belong together, or the stack is in another zone",
        403: "the token's access policy lacks the scope traces:write",
        404: "the path is wrong: the gateway takes OTLP below /otlp",
        530: "there is no such zone; the stack's page at grafana.com names it",
    },
)

HONEYCOMB = Backend(
    name="Honeycomb",
    domains=("honeycomb.io",),
    regions=(Region("US", "api.honeycomb.io"), Region("EU", "api.eu1.honeycomb.io")),
    header="x-honeycomb-team",
    key="<ingest key>",
    remark=_honeycomb_key,
    refusals={
        401: "the key is unknown in this region; US and EU know only their own",
        403: "the key may not send events or create the dataset",
    },
)

BACKENDS = (NEW_RELIC, DATADOG, GRAFANA, HONEYCOMB)
