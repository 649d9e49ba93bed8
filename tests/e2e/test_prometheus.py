"""The shipped monitoring files with Debian's Prometheus and a running service."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment
from tests.e2e.prometheus import MONITORING, Expression, Prometheus, panels, prometheus, rules
from tests.metrics import recorded
from tests.support.forked import self_hosted
from tests.support.otlp_endpoint import OtlpEndpoint
from tests.support.processes import ROOT, ServerProcess, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

if shutil.which("prometheus") is None or shutil.which("promtool") is None:
    if os.environ.get("CI") == "true":
        raise RuntimeError("CI must have Debian's prometheus package; .ci/run installs it")
    pytest.skip(
        "Debian's prometheus package is not installed (apt-get install prometheus)",
        allow_module_level=True,
    )

# Metrics that a service on a CPU does not have, or not yet.
NOT_LIVE = re.compile(r"sdxl_gpu_|_step_gpu_queue_|fal_app_|mean1d_past|offset 1h|compile_cache")

# Histograms and counters that name a trace.
WITH_EXEMPLARS = (
    "sdxl_request_duration_seconds_bucket",
    "sdxl_queue_duration_seconds_bucket",
    "sdxl_stage_duration_seconds_bucket",
    "sdxl_denoise_step_duration_seconds_bucket",
    "sdxl_image_bytes_bucket",
    "sdxl_request_budget_total",
)

KEY = "Wm4tZc8NvR2qLx6Y"

# The recorded samples end so long ago that Prometheus has closed their blocks.
RECORDED_END = int(time.time()) // 3600 * 3600 - 12 * 3600
RECORDED_MINUTES = 150


@pytest.fixture(scope="module")
def service(otlp: OtlpEndpoint) -> Iterator[ServerProcess]:
    settings = environment(
        otlp,
        SDXL_OTLP_METRICS="true",
        OTEL_METRIC_EXPORT_INTERVAL="1000",
        # A machine without a GPU has no rated peak; this one's does not matter.
        SDXL_PEAK_TFLOPS="1",
        SDXL_LORAS="night=demo:night",
        SDXL_API_KEYS=f"alice={KEY}",
    )
    with self_hosted(settings) as process:
        process.wait_until_ready(START_SECONDS)
        yield process


@pytest.fixture(scope="module")
def running(
    service: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the service before, during and after a little load."""
    folder = tmp_path_factory.mktemp("prometheus")
    recorded.write(folder / "recorded.txt", RECORDED_END, RECORDED_MINUTES)
    target = service.url.removeprefix("http://")
    keyed = {"x-api-key": KEY}
    with prometheus(target, folder, folder / "recorded.txt") as running:
        wait_until(lambda: running.values('up{job="sdxl"}') == [1.0])
        for fields in (body(), body(guidance_scale=0.0), body(width=160, height=96), {}):
            httpx.post(service.url, json=fields, timeout=ANSWER_SECONDS, headers=keyed)
        httpx.post(service.url + "/stream", json=body(), timeout=ANSWER_SECONDS, headers=keyed)
        wait_until(lambda: running.values('sdxl_images_total{job="sdxl"}') == [4.0])
        yield running


def has_data(running: Prometheus, query: str, at: float | None = None) -> bool:
    return any(math.isfinite(value) for value in running.values(query, at))


def test_every_live_panel_and_rule_returns_data(running: Prometheus) -> None:
    queries = {panel.where: panel.filled("30s") for panel in panels()}
    queries |= {name: name for name in rules("record") if "mean1d_past" not in name}
    queries = {where: query for where, query in queries.items() if not NOT_LIVE.search(query)}
    assert len(queries) > 60
    empty = set(queries)
    deadline = time.monotonic() + 60
    while empty and time.monotonic() < deadline:
        empty = {where for where in empty if not has_data(running, queries[where])}
        time.sleep(0.5)
    assert not empty


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel.where)
def test_every_panel_returns_data_over_recorded_samples(
    running: Prometheus, panel: Expression
) -> None:
    query = panel.filled("5m", rules("record"))
    assert has_data(running, query, RECORDED_END), query


def test_every_recording_rule_returns_data_over_recorded_samples(running: Prometheus) -> None:
    recording = rules("record").items()
    assert not [name for name, query in recording if not has_data(running, query, RECORDED_END)]


def test_recorded_rules_give_the_figures_of_the_samples(running: Prometheus) -> None:
    expressions = rules("record")

    def at_the_end(name: str) -> float:
        [value] = running.values(expressions[name], RECORDED_END)
        return value

    # Twenty images a minute of 20 steps; nominal FLOPs over the peak of an H100.
    flops = 20 / 60 * (0.22 + 20 * 13.52 + 10.47) * 1e12
    assert at_the_end("sdxl:mfu_wall:ratio_rate5m") == pytest.approx(flops / 989e12, rel=0.01)
    seconds_in_runs = 20 / 60 * (20 * 0.030 + 0.008)
    assert at_the_end("sdxl:mfu:ratio_rate5m") == pytest.approx(
        flops / 989e12 / seconds_in_runs, rel=0.02
    )
    for name in ("mean10m", "mean1d_past"):
        step = at_the_end(f"sdxl:denoise_step_duration_seconds:{name}")
        assert step == pytest.approx(0.030, rel=0.01)
    assert at_the_end("sdxl:request_errors:ratio_rate1h") == pytest.approx(1 / 21, rel=0.02)
    # From 0.8 to 3.2 s evenly, where 3 are allowed.
    assert at_the_end("sdxl:request_budget:over_ratio_rate1h") == pytest.approx(1 / 12, rel=0.2)


def test_every_rule_is_evaluated_and_none_fires_on_a_healthy_service(running: Prometheus) -> None:
    def health() -> dict[str, str]:
        groups = running.get("rules")["groups"]
        return {
            rule["name"]: rule["health"] + rule.get("lastError", "")
            for group in groups
            for rule in group["rules"]
        }

    wait_until(lambda: "unknown" not in health().values())
    assert set(health().values()) == {"ok"}
    assert set(health()) == set(rules("record")) | set(rules("alert"))
    alerts = running.get("alerts")["alerts"]
    assert [alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"] == []


@pytest.mark.parametrize("series", WITH_EXEMPLARS)
def test_exemplars_name_traces_that_the_backend_received(
    running: Prometheus, otlp: OtlpEndpoint, series: str
) -> None:
    since = time.time() - 600
    wait_until(lambda: running.exemplars(series, since))
    for labels in running.exemplars(series, since):
        spans = otlp.wait_for_trace(labels["trace_id"])
        assert labels["span_id"] in {span.span_id for span in spans}


def test_the_same_metrics_are_pushed_with_exemplars(
    running: Prometheus, otlp: OtlpEndpoint
) -> None:
    wait_until(lambda: otlp.wait_for_points("sdxl_images")[-1].value == 4)
    steps = [
        point
        for point in otlp.wait_for_points("sdxl_denoise_step_duration_seconds")
        if point.exemplars
    ]
    assert steps
    trace_id, span_id, _ = steps[-1].exemplars[0]
    assert span_id in {span.span_id for span in otlp.wait_for_trace(trace_id)}
    scraped = running.values('sum(sdxl_denoise_step_duration_seconds_count{job="sdxl"})')
    last = otlp.pushes[-1]
    pushed = sum(p.count for p in last if p.name == "sdxl_denoise_step_duration_seconds")
    assert [pushed] == scraped
    assert last[0].resource["service.name"] == "stepspan"
    assert last[0].resource["service.instance.id"] == steps[0].resource["service.instance.id"]


def promtool(*arguments: object, text: str | None = None) -> str:
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        cwd=MONITORING,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_names_units_and_help_are_as_prometheus_wants_them(service: ServerProcess) -> None:
    live = httpx.get(service.url + "/metrics", timeout=30).text
    assert "sdxl_images_total" in live
    assert promtool("check", "metrics", text=live) == ""
    assert promtool("check", "metrics", text=recorded.exposition()) == ""


def test_rules_are_valid_and_each_alert_fires_and_does_not() -> None:
    promtool("check", "rules", "rules.yml")
    promtool("test", "rules", "rules_test.yml")
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    for alert in rules("alert"):
        fired = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert}
        assert fired == {True, False}, alert


@pytest.mark.parametrize("name", ["prometheus.yml", "fal.yml"])
def test_scrape_configs_are_valid(name: str) -> None:
    promtool("check", "config", "--syntax-only", name)


@pytest.mark.docs
def test_every_alert_has_a_summary_and_a_runbook_link() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    paragraphs = dict(re.findall(r"^### (\w+)\n\n(.+?)(?=\n#|\Z)", runbook, re.M | re.S))
    groups = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    for alert in alerts:
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in ("page", "ticket")
        expected = f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["annotations"]["runbook"] == expected
        assert len(paragraphs[alert["alert"]]) > 150
    assert set(paragraphs) == {alert["alert"] for alert in alerts}


def test_every_metric_that_is_named_exists(running: Prometheus) -> None:
    """Every metric in the dashboard, the rules and the runbook is exposed."""
    exposed = set(running.get("label/__name__/values"))
    texts = [
        path.read_text()
        for path in (
            MONITORING / "dashboard.json",
            MONITORING / "rules.yml",
            ROOT / "docs" / "runbook.md",
        )
    ]
    named = set(re.findall(r"\b(?:sdxl|fal_app)_[a-z0-9_]+", "\n".join(texts)))
    assert len(named) > 40
    assert not named - exposed


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__rate_interval", "__all"}
    assert used == variables
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    with_exemplars = [
        target
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        if target.get("exemplar")
    ]
    assert len(with_exemplars) >= 5


def test_monitoring_ships_with_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert '"metrics" = ["monitoring/*"]' in project
    shipped = {path.name for path in Path(MONITORING).iterdir() if path.is_file()}
    assert shipped == {"dashboard.json", "fal.yml", "prometheus.yml", "rules.yml", "rules_test.yml"}


def test_the_last_values_are_pushed_at_the_end(service: ServerProcess, otlp: OtlpEndpoint) -> None:
    """The last test of this file: it ends the service."""
    assert service.terminate() < 15
    [ready] = [point for point in otlp.pushes[-1] if point.name == "sdxl_ready"]
    assert ready.value == 0
    [images] = [point for point in otlp.pushes[-1] if point.name == "sdxl_images"]
    assert images.value == 4
