"""Every parser of what an operator writes: any text is a setting or the documented error, in one
line and without what is secret."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from opentelemetry.sdk.resources import OTELResourceDetector

from kernels_warmup.shapes import CompiledShape
from metrics import buckets
from serve.errors import ConfigurationError, ModelError
from serve.model.hub import first_line
from serve.model.loras import sources
from serve.settings import ServeSettings, environment_name, load_settings
from serve.settings.fields import LORA_NAME, LoraSource, parse_loras
from serve.settings.otel_variables import RESTRICTED, refuse, without_effect
from serve.settings.telemetry import resource_attributes

pytestmark = pytest.mark.parser

SECRET = "Qx7vLm2RtZ9k"

# What an environment variable can hold.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
PARTS = st.sampled_from(
    [
        *(
            "1024x1024",
            "64x64",
            "63x64",
            "0",
            "5",
            "-1",
            "1e999",
            "nan",
            "inf",
            "true",
            "demo",
            "auto",
        ),
        *(
            ",",
            ", ",
            "=",
            "x",
            "@",
            "/",
            ":",
            "%",
            "%0A",
            "http://",
            "https://",
            "host",
            ":443",
            "[::1]",
        ),
        *(
            "ink=demo:ink",
            "a=b",
            "Authorization=",
            "999",
            "{trace_id}",
            "?key=",
            "#",
            "..",
            "~",
            "*",
        ),
        *(
            "euler",
            "otlp",
            "none",
            "console",
            "gzip",
            "traceidratio",
            "²",
            "١",
            "\n",
            " ",
            "a" * 300,
        ),
    ]
)
VALUES = TEXT | st.lists(PARTS, max_size=6).map("".join)
NAMES = [environment_name(field) for field in ServeSettings.model_fields]
SECRETS = (
    "SDXL_ADMIN_TOKEN",
    "SDXL_API_KEYS",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
    "HF_TOKEN",
    "FAL_KEY",
    "HTTPS_PROXY",
)


def load(name: str, value: str) -> ServeSettings | str:
    """The settings with one variable, or the sentence that refuses it."""
    with pytest.MonkeyPatch.context() as patch:
        for each in list(os.environ):
            if each.startswith(("SDXL_", "OTEL_")):
                patch.delenv(each)
        patch.setenv(name, value)
        try:
            return load_settings()
        except ConfigurationError as error:
            return str(error)


@given(name=st.sampled_from(NAMES), value=VALUES)
def test_any_value_of_any_setting_is_read_or_refused_in_one_line(name: str, value: str) -> None:
    result = load(name, value)
    if isinstance(result, str):
        assert name in result
        assert "\n" not in result
    else:
        assert isinstance(result, ServeSettings)


@given(name=st.sampled_from(SECRETS), before=VALUES, after=VALUES)
def test_no_refusal_shows_a_secret(name: str, before: str, after: str) -> None:
    result = load(name, before + SECRET + after)
    if isinstance(result, ServeSettings):
        assume(not any(SECRET in key.name for key in result.api_keys))  # names are no secrets
    assert SECRET not in (result if isinstance(result, str) else repr(result))


@given(
    name=st.sampled_from(
        [
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
            "SDXL_GATEWAY_TARGET",
            "SDXL_TRACE_URL",
        ]
    ),
    place=st.sampled_from(["http://me:{}@host/", "http://host/?key={}", "http://{}@host:99999/"]),
    after=VALUES,
)
def test_no_refusal_of_a_url_shows_its_password(name: str, place: str, after: str) -> None:
    result = load(name, place.format(SECRET) + after)
    assert SECRET not in (result if isinstance(result, str) else repr(result))


# Single parsers


@given(VALUES)
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        shape = CompiledShape.parse(text)
        assert CompiledShape.parse(str(shape)) == shape
        assert 64 <= shape.width <= 2048


@given(st.integers(0, 3000), st.integers(0, 3000), st.sampled_from("xX×"))
def test_a_size_is_allowed_exactly_by_its_sides(width: int, height: int, times: str) -> None:
    allowed = all(64 <= side <= 2048 and side % 8 == 0 for side in (width, height))
    try:
        shape = CompiledShape.parse(f"{width}{times}{height}")
    except ValueError:
        assert not allowed
    else:
        assert allowed
        assert (shape.width, shape.height) == (width, height)


@given(st.lists(st.floats() | VALUES, max_size=8).map(lambda parts: ",".join(map(str, parts))))
def test_any_bounds_are_ascending_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        bounds = buckets.parse(text)
        assert list(bounds) == sorted(set(bounds))
        assert buckets.parse(",".join(map(repr, bounds))) == bounds


@given(VALUES)
def test_any_text_is_a_list_of_loras_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        loras = parse_loras(text)
        assert parse_loras(",".join(f"{each.name}={each.source}" for each in loras)) == loras


@given(
    st.lists(
        st.tuples(st.from_regex(LORA_NAME, fullmatch=True), st.sampled_from(["a/b@1", "demo:ink"])),
        min_size=1,
        max_size=4,
        unique_by=lambda pair: pair[0],
    )
)
def test_a_list_of_loras_is_what_was_written(pairs: list[tuple[str, str]]) -> None:
    text = " , ".join(f"{name} = {source}" for name, source in pairs)
    assert parse_loras(text) == tuple(LoraSource(*pair) for pair in pairs)


@given(VALUES)
def test_any_source_of_a_lora_is_a_file_below_it_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """With a hub that has nothing, and from an empty folder."""
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_download", _no_download)
        os.chdir(tmp_path_factory.getbasetemp())
        try:
            found = sources.find_file("ink", text)
        except ModelError as error:
            assert str(error).startswith("SDXL_LORAS: ink")
        else:
            # The shipped one, or a file that is named in full.
            assert found.suffix == ".safetensors" or found == Path(text).expanduser()
        finally:
            os.chdir(before)


def _no_download(name: str, repository: str, *_: Any) -> Path:
    assert ".." not in repository.split("/")
    raise ModelError(f"SDXL_LORAS: {name}: {repository} is not there")


@given(VALUES)
@example("x=1,x=2,x=1")
def test_any_resource_attributes_are_read_as_the_sdk_reads_them(text: str) -> None:
    try:
        ours = resource_attributes(text)
    except ValueError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", text)
        sdk = dict(OTELResourceDetector().detect().attributes)
    assert ours == sdk


@given(
    st.dictionaries(
        st.sampled_from([*RESTRICTED, "OTEL_NONSENSE", "otel_config_file"]) | TEXT,
        VALUES,
        max_size=3,
    )
)
def test_any_standard_variables_are_honoured_refused_or_without_effect(
    environment: dict[str, str],
) -> None:
    try:
        refuse(environment, NAMES)
    except ConfigurationError as error:
        assert "\n" not in str(error)
    for name, reason in without_effect(environment, NAMES):
        assert name in environment
        assert reason


@given(
    VALUES,
    st.sampled_from(
        ["http://{}:pw@h/x", "https://me:{}@h/", "https://cdn/f?sig={}", "see https://h?{}"]
    ),
    VALUES,
)
def test_a_librarys_message_is_shown_without_the_secrets_of_its_urls(
    before: str, url: str, after: str
) -> None:
    assert SECRET not in first_line(OSError(f"{before} {url.format(SECRET)} {after}"))
