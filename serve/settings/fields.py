"""Kinds of fields that settings have more than once: their types and what each allows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from metrics import buckets

TRUE_OR_FALSE = "true or false"

MOST = 2**31 - 1
"""The largest whole number that the OpenTelemetry specification asks an SDK to accept."""

# NAME=VALUE, NAME=VALUE. The exporter skips what does not match with a warning that quotes it, so
# it is refused here.
_HEADER = r"""[ \t]*[-!#-'*+.0-9A-Z^-z|~]+[ \t]*=[ !#-+\--:<-\[\]-~\t]*"""
_HEADERS = rf"^{_HEADER}(,{_HEADER})*,?\s*$"

SamplerName = Literal[
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
]
"""Standard samplers of the OpenTelemetry specification."""

Compression = Literal["none", "gzip", "deflate"]


def _between_0_and_1(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError("out of range")
    return value


Ratio = Annotated[float, AfterValidator(_between_0_and_1)]


def _digits(value: Any) -> Any:
    # The SDK reads some of them too, when it is imported, and does not take 5.0 or 1_000 for one.
    if isinstance(value, str) and not re.fullmatch(r"\s*-?[0-9]{1,30}\s*", value):
        raise ValueError("not a whole number")
    return value


WholeNumber = Annotated[int, BeforeValidator(_digits)]


# Kinds of fields that occur more than once


def seconds_field(default: float) -> Any:
    return Field(
        default=default,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="a number of seconds up to 3600, above 0",
    )


# repr=False: a printed settings object, as in a traceback, shows no key.


def otlp_url_field(variable: str, description: str) -> Any:
    return Field(
        default=None,
        repr=False,
        validation_alias=variable,
        description=f"an http:// or https:// URL with a host{description}",
    )


def otlp_headers_field(variable: str) -> Any:
    return Field(
        default=None,
        repr=False,
        validation_alias=variable,
        pattern=_HEADERS,
        description="a comma-separated list of NAME=VALUE, values percent-encoded",
    )


def otlp_compression_field(variable: str) -> Any:
    return Field(default=None, validation_alias=variable, description="none, gzip or deflate")


def otlp_timeout_field(variable: str) -> Any:
    # The Python SDK reads seconds, the specification says milliseconds: 10000 would be nearly three
    # hours.
    return Field(
        default=None,
        validation_alias=variable,
        gt=0,
        le=300,
        description="a number of seconds up to 300, above 0 (not milliseconds)",
    )


def pem_file_field(variable: str, content: str) -> Any:
    return Field(default=None, validation_alias=variable, description=f"a PEM file with {content}")


def limit_field(variable: str) -> Any:
    return Field(
        default=None,
        validation_alias=variable,
        ge=0,
        le=MOST,
        description=f"a whole number from 0 to {MOST}",
    )


def milliseconds_field(variable: str) -> Any:
    return Field(
        default=None,
        validation_alias=variable,
        ge=1,
        le=3_600_000,
        description="a whole number of milliseconds from 1 to 3600000",
    )


@dataclass(frozen=True)
class LoraSource:
    """What requests call a LoRA, and where its file is (`serve.model.loras.sources`)."""

    name: str
    source: str


LORA_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def stays_inside(path: str) -> bool:
    """Whether a revision, or the path of a file in a repository, leads to no other folder.

    The hub's library joins both with the folder of its cache.
    """
    return not path.startswith("/") and "\\" not in path and ".." not in path.split("/")


def parse_loras(value: Any) -> Any:
    """`NAME=SOURCE,...`. A name stands once: it is how a request chooses."""
    if not isinstance(value, str):
        return value
    found: dict[str, LoraSource] = {}
    for part in value.split(","):
        name, equals, source = (each.strip() for each in part.partition("="))
        if not equals or not source or not re.fullmatch(LORA_NAME, name) or name in found:
            raise ValueError("not a list of names and sources")
        found[name] = LoraSource(name, source)
    return tuple(found.values())


LoraSources = Annotated[tuple[LoraSource, ...], BeforeValidator(parse_loras), NoDecode]


BucketBounds = Annotated[tuple[float, ...] | None, NoDecode]


def bucket_bounds_field(unit: str) -> Any:
    description = (
        f"a comma-separated list of 1 to {buckets.MOST_BOUNDS} positive numbers of {unit}, each "
        "above the last"
    )
    return Field(default=None, description=description)
