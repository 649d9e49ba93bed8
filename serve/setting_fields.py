"""Types and fields that several settings share, such as those of OTLP for spans and for metrics."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_settings import NoDecode

from metrics import buckets

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
BucketBounds = Annotated[tuple[float, ...] | None, NoDecode]


def _between_0_and_1(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError("out of range")
    return value


Ratio = Annotated[float, AfterValidator(_between_0_and_1)]


def bucket_bounds_field(unit: str) -> Any:
    description = (
        f"a comma-separated list of 1 to {buckets.MOST_BOUNDS} positive numbers of {unit}, each "
        "above the last"
    )
    return Field(default=None, description=description)


def otlp_url_field(variable: str, description: str) -> Any:
    return Field(
        default=None,
        validation_alias=variable,
        pattern=r"^https?://[^\s]+$",
        description=f"an http:// or https:// URL{description}",
    )


def otlp_headers_field(variable: str) -> Any:
    return Field(
        default=None,
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


def doctor_field(variable: str) -> Any:
    """A variable that OpenTelemetry or its HTTP client reads, and only `serve doctor` checks."""
    return Field(default=None, validation_alias=variable, description="any text")
