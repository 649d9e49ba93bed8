"""The README and the pages of docs/ agree with the code, and their links have targets."""

from __future__ import annotations

import re
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from metrics.tracing import HONEYCOMB_SAMPLE_RATE, PROBABILITY
from serve.errors import OTHER_ERRORS, REQUEST_ERRORS, RequestError
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


def test_every_failure_is_documented_with_its_status_and_no_other() -> None:
    section = (DOCS / "http.md").read_text().split("\n## Failures\n")[1]
    documented = re.findall(r"^\|[^|]+\| (\d{3}) \| `(\w+)` \|$", section, re.MULTILINE)
    errors = (*REQUEST_ERRORS, RequestError, *OTHER_ERRORS)
    assert documented == [(str(error.status), error.error_type) for error in errors]


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
