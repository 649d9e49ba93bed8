"""The README and the pages of docs/ agree with the code, and their links have targets."""

from __future__ import annotations

import asyncio
import json
import re
from random import Random

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

import serve.errors
from kernels_warmup.cache.compile_cache import RESULTS
from metrics.families.process import PUSH_RESULTS, SPAN_RESULTS
from metrics.families.requests import BUDGET_RESULTS, CANCELLED_DURING
from metrics.records import Estimate
from metrics.tracing import HONEYCOMB_SAMPLE_RATE, PROBABILITY, drawn_identity
from serve.engine.call import Call
from serve.engine.readiness import Readiness
from serve.errors import (
    OTHER_ERRORS,
    OUTCOMES,
    REQUEST_ERRORS,
    InternalError,
    RequestError,
    UnusablePicture,
)
from serve.http.openai.schema import ImageGenerationRequest
from serve.http.server_sent_events import StreamEvents
from serve.schema import ImageToImageRequest, TextToImageRequest, TextToImageResponse
from serve.settings import ServeSettings, environment_name
from tests.e2e.transcript import README, in_readme, record, shape
from tests.metrics.recorded import declared_service, observe_some
from tests.metrics.test_spans import emitted
from tests.metrics.timings import requests_with_every_attribute
from tests.support.processes import ROOT

pytestmark = pytest.mark.docs

DOCS = ROOT / "docs"
PAGES = (
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench/results/notes.md",
    *sorted(DOCS.glob("*.md")),
)


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_the_transcript_is_what_a_request_gives() -> None:
    assert shape(in_readme()) == shape(record())


def test_every_setting_is_documented_and_no_other() -> None:
    page = (DOCS / "settings.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", rows))
    ours = {environment_name(field) for field in ServeSettings.model_fields}
    assert ours <= named
    assert {name for name in named if name.startswith("SDXL_")} <= ours


def test_every_default_is_documented() -> None:
    """Where there is one. What `auto` means is in words, and so is when tracing is on."""
    page = (DOCS / "settings.md").read_text()
    defaults = dict(re.findall(r"^\| (`[A-Z].*?) \| .* \| (.*) \|$", page, re.MULTILINE))
    checked = 0
    for field, info in ServeSettings.model_fields.items():
        name, default = environment_name(field), info.default
        if default in (None, (), {}, "auto") or name in ("ENABLE_TRACING", "OTEL_SDK_DISABLED"):
            continue
        text = f"{default:g}" if isinstance(default, int | float) else str(default)
        if isinstance(default, bool):
            text = str(default).lower()
        [documented] = [cell for names, cell in defaults.items() if f"`{name}`" in names]
        assert text in re.findall(r"[\w.]+", documented), (name, default, documented)
        checked += 1
    assert checked > 20


def test_every_metric_is_documented_with_its_labels_and_no_other() -> None:
    registry = CollectorRegistry()
    observe_some(declared_service(registry), Random(0))
    exposed = {}
    for family in registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        exposed[family.name + suffix] = labels
    table = (DOCS / "metrics.md").read_text().split("| metric | |")[1].split("\n\n")[0]
    documented = {
        name: set(labels.split(",")) if labels else set()
        for name, labels in re.findall(r"`(sdxl_[a-z_]+)(?:\{([a-z_,]+)\})?`", table)
    }
    assert documented == exposed


def test_label_values_are_documented() -> None:
    page = (DOCS / "metrics.md").read_text()
    for metric, values in (
        ("sdxl_request_duration_seconds", OUTCOMES),
        ("sdxl_cancelled_total", CANCELLED_DURING),
        ("sdxl_request_budget_total", BUDGET_RESULTS),
        ("sdxl_compile_cache_total", RESULTS),
        ("sdxl_spans_total", SPAN_RESULTS),
        ("sdxl_otlp_pushes_total", PUSH_RESULTS),
    ):
        [meaning] = re.findall(rf"^\|[^|]*`{metric}{{[^|]*\|(.*)\|$", page, re.MULTILINE)
        assert set(values) <= set(re.findall(r"`(\w+)`", meaning)), metric


def test_every_attribute_of_a_span_is_documented_and_no_other() -> None:
    found: dict[str, set[str]] = {}
    for request in requests_with_every_attribute():
        for span in emitted(request):
            found.setdefault(span.name, set()).update(span.attributes or {})
    of_stages = {"inference.clock"}
    for name in ("text_encode", "vae_decode"):
        assert found[name] == of_stages
    found["denoise"] -= of_stages
    section = (DOCS / "tracing.md").read_text().split("\n## Attributes\n")[1].split("\n## ")[0]
    documented: dict[str, set[str]] = {}
    for spans, attributes in re.findall(r"^\|([^|]*)\|([^|]*)\|", section, re.MULTILINE):
        for span in re.findall(r"`([\w-]+)`", spans) or ["every span"]:
            names = re.findall(r"`([\w.]+)`", attributes)
            documented.setdefault(span, set()).update(names)
    assert documented.pop("every span") == {PROBABILITY, HONEYCOMB_SAMPLE_RATE}
    documented.pop("warmup")  # the start-up gives them
    assert documented == {span: found[span] for span in documented}
    assert set(documented) == {span for span in found if found[span] - of_stages}


def test_every_field_of_a_request_and_a_response_is_documented_and_no_other() -> None:
    page = (DOCS / "http.md").read_text()
    of_text = set(TextToImageRequest.model_fields)
    for title, fields in (
        ("Request", of_text),
        ("Response", set(TextToImageResponse.model_fields)),
        ("Image to image", set(ImageToImageRequest.model_fields) - of_text),
    ):
        section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        first_cells = "".join(re.findall(r"^\|([^|]*)\|", section, re.MULTILINE))
        assert set(re.findall(r"`(\w+)`", first_cells)) == fields


def test_every_field_of_readiness_is_documented_and_no_other() -> None:
    section = (DOCS / "http.md").read_text().split("\n## Readiness\n")[1].split("\n## ")[0]
    first_cells = "".join(re.findall(r"^\|([^|]*)\|", section, re.MULTILINE))
    assert re.findall(r"`(\w+)`", first_cells) == list(Readiness().as_json())


def test_every_event_is_documented_with_its_data_and_no_other() -> None:
    call = Call("/stream", "POST", drawn_identity(), estimate=Estimate(0, 1.0))
    events = StreamEvents(call)
    white = np.full((8, 8, 3), 255, np.uint8)
    sent = [events.queued(0), asyncio.run(events.step(0, 1.0, white))]
    data = [json.loads(line.removeprefix("data: ")) for line in map(_second_line, sent)]
    fields = {each.pop("type"): set(each) for each in data}
    section = (DOCS / "http.md").read_text().split("\n## Events\n")[1].split("\n## ")[0]
    documented = {
        name: set(re.findall(r"`(\w+)`", text))
        for name, text in re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    }
    assert documented == {**fields, "image": set(), "error": set()}


def _second_line(event: bytes) -> str:
    return event.decode().split("\n")[1]


def test_every_field_of_openais_request_is_documented_and_no_other() -> None:
    page = (DOCS / "clients.md").read_text()
    section = page.split("\n## OpenAI's client\n")[1].split("\n## ")[0]
    openais = "".join(re.findall(r"^\|([^|]*)\|", section, re.MULTILINE))
    ours = section.split("These fields are this service's own")[1].split(".\n")[0]
    documented = set(re.findall(r"`(\w+)`", openais + ours)) - {"extra_body"}
    assert documented == set(ImageGenerationRequest.model_fields)


def test_every_failure_is_documented_with_its_status_and_no_other() -> None:
    section = (DOCS / "http.md").read_text().split("\n## Failures\n")[1]
    documented = re.findall(r"^\|[^|]+\| (\d{3}) \| `(\w+)` \|$", section, re.MULTILINE)
    errors = (*REQUEST_ERRORS, RequestError, *OTHER_ERRORS)
    assert documented == [(str(error.status), error.error_type) for error in errors]


def test_the_tree_of_errors_has_every_error_with_its_status() -> None:
    in_tree = dict(re.findall(r"── (\w+) +(\d{3})", serve.errors.__doc__ or ""))
    errors = (*REQUEST_ERRORS, *OTHER_ERRORS, InternalError, UnusablePicture)
    assert in_tree == {error.__name__: str(error.status) for error in errors}


def test_the_figures_in_the_readme_are_rows_of_the_generated_tables() -> None:
    figures = README.read_text().split("\n## Figures\n")[1].split("\n## ")[0]
    rows = [line for line in figures.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    assert set(rows) <= set((DOCS / "performance.md").read_text().splitlines())


def test_every_internal_link_leads_to_a_file_and_a_heading() -> None:
    broken = []
    links = 0
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            links += 1
            name, _, heading = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (heading and heading not in anchors(target.read_text())):
                broken.append(f"{page.name}: {link}")
    assert links > 50
    assert not broken


def test_every_path_of_the_code_exists() -> None:
    """Paths are from the root, or in a page about them from one of the packages."""
    packages = (ROOT, *(ROOT / name for name in ("metrics", "kernels_warmup", "serve", "bench")))
    folders = {path.name for package in packages for path in package.iterdir() if path.is_dir()}
    missing = []
    paths = 0
    for page in PAGES:
        for path in re.findall(r"`([a-z_]+/[a-z_/]*(?:\.\w+)?)`", page.read_text()):
            if path.split("/")[0] not in folders or path == "http/protobuf":  # a protocol
                continue
            paths += 1
            files = (package / f"{path}{suffix}" for package in packages for suffix in ("", ".py"))
            if not any(file.exists() for file in files):
                missing.append(f"{page.name}: {path}")
    assert paths > 30
    assert not missing


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_test_that_the_reliability_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "reliability.md").read_text()))
    sources = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = {name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.M)}
    assert len(named) > 20
    assert named - defined == set()
