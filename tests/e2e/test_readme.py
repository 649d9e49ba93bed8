"""The README shows what is: its transcript, its table of settings and its table of metrics."""

from __future__ import annotations

import re
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from serve.settings import ServeSettings, environment_name
from tests.e2e.transcript import README, in_readme, record, shape
from tests.metrics.recorded import declared_service, observe_some


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_the_transcript_is_what_a_request_gives() -> None:
    assert shape(in_readme()) == shape(record())


def test_every_setting_is_in_the_readme_and_no_other() -> None:
    table = README.read_text().split("## Settings")[1].split("\n## ")[0]
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", table))
    ours = {environment_name(field) for field in ServeSettings.model_fields}
    assert ours <= named
    assert {name for name in named if name.startswith("SDXL_")} <= ours


def test_every_metric_is_in_the_readme_with_its_labels_and_no_other() -> None:
    registry = CollectorRegistry()
    observe_some(declared_service(registry), Random(0))
    told = {}
    for family in registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        told[family.name + suffix] = labels
    table = README.read_text().split("| metric | |")[1].split("\n\n")[0]
    written = {
        name: set(labels.split(",")) if labels else set()
        for name, labels in re.findall(r"`(sdxl_[a-z_]+)(?:\{([a-z_,]+)\})?`", table)
    }
    assert written == told
