"""compose.yaml and the files that it mounts agree with each other and with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serve.settings import load_settings
from tests.deploy.files import COMPOSE, DEPLOY, END_SECONDS, instructions, manifest, tool
from tests.support.processes import ROOT

SERVICES: dict[str, Any] = manifest(COMPOSE)["services"]
FILES = DEPLOY / "compose"


def mounted(service: str) -> dict[str, str]:
    """The service's files by their path in its container; each is mounted to be read only."""
    found = {}
    for volume in SERVICES[service].get("volumes", []):
        source, target, *mode = volume.split(":")
        if source.startswith("./"):
            assert mode == ["ro"], volume
            found[target] = source.removeprefix("./")
    return found


def seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+)s", duration)
    assert match is not None
    return float(match[1])


def test_compose_accepts_it_alone_and_with_the_gpu() -> None:
    for files in (["compose.yaml"], ["compose.yaml", "docs/deploy/compose/gpu.yaml"]):
        found = tool("docker-compose", *[part for f in files for part in ("-f", f)], "config", "-q")
        assert (found.returncode, found.stderr) == (0, "")


def test_everything_mounted_exists_and_everything_shipped_is_mounted() -> None:
    files = {source for service in SERVICES for source in mounted(service).values()}
    assert all((ROOT / file).is_file() for file in files)
    shipped = {f"docs/deploy/compose/{path.name}" for path in FILES.iterdir()}
    assert shipped - files == {"docs/deploy/compose/gpu.yaml"}


def test_only_this_machine_reaches_the_ports() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_image_is_an_exact_version() -> None:
    for name, service in SERVICES.items():
        assert name == "stepspan" or re.search(r":v?\d+\.\d+\.\d+$", service["image"])


def test_the_services_settings_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICES["stepspan"]["environment"].items():
        monkeypatch.setenv(name, value or "")
    settings = load_settings()
    assert settings.otlp_endpoint == "http://collector:4318"


def test_it_may_end_in_its_own_time() -> None:
    assert seconds(SERVICES["stepspan"]["stop_grace_period"]) > END_SECONDS


def test_the_variants_are_the_dockerfiles() -> None:
    stages = [arguments for name, arguments in instructions() if name == "FROM"]
    gpu = manifest(FILES / "gpu.yaml")["services"]["stepspan"]
    for service in (SERVICES["stepspan"], gpu):
        variant = service["build"]["args"]["VARIANT"]
        assert any(stage.endswith(f" AS base-{variant}") for stage in stages)
        assert service["image"] == f"stepspan:{variant}"


def test_prometheus_scrapes_the_service_with_our_rules_and_keeps_exemplars() -> None:
    config = manifest(FILES / "prometheus.yml")
    shipped = manifest(ROOT / "metrics" / "monitoring" / "prometheus.yml")
    [job], [shipped_job] = config["scrape_configs"], shipped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["stepspan:8080"]}]
    assert {**job, "static_configs": None} == {**shipped_job, "static_configs": None}
    assert config["global"] == shipped["global"]
    files = mounted("prometheus")
    [rules] = config["rule_files"]
    assert files["/etc/prometheus/" + rules] == "metrics/monitoring/rules.yml"
    flags = dict(flag.split("=", 1) for flag in SERVICES["prometheus"]["command"])
    assert files[flags["--config.file"]] == "docs/deploy/compose/prometheus.yml"
    assert flags["--enable-feature"] == "exemplar-storage"


def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("Debian's prometheus package is not installed (apt-get install prometheus)")
    for target, file in mounted("prometheus").items():
        shutil.copy(ROOT / file, tmp_path / Path(target).name)
    found = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_spans_pass_through_the_collector_undecided() -> None:
    config = manifest(FILES / "collector.yml")
    [flag] = SERVICES["collector"]["command"]
    assert mounted("collector")[flag.removeprefix("--config=")].endswith("/collector.yml")
    assert config["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(":4318")
    [(name, pipeline)] = config["service"]["pipelines"].items()
    assert name == "traces"
    # Every part of the pipeline is configured, and none is configured in vain.
    for kind in ("receivers", "processors", "exporters"):
        assert pipeline[kind] == list(config[kind])
    assert not [part for part in pipeline["processors"] if "sampl" in part]
    host, _ = config["exporters"]["otlp"]["endpoint"].split(":")
    assert host in SERVICES


def test_grafana_has_the_dashboard_and_links_exemplars_to_traces() -> None:
    files = mounted("grafana")
    sources = manifest(FILES / "grafana-datasources.yml")["datasources"]
    by_type = {source["type"]: source for source in sources}
    for source in sources:
        host, port = source["url"].removeprefix("http://").split(":")
        assert any(each.endswith(f":{port}") for each in SERVICES[host]["ports"])
    # The dashboard takes the default source.
    assert by_type["prometheus"]["isDefault"] is True
    [link] = by_type["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert link == {"name": "trace_id", "datasourceUid": by_type["jaeger"]["uid"]}
    [provider] = manifest(FILES / "grafana-dashboards.yml")["providers"]
    [dashboard] = [path for path, file in files.items() if file.endswith("/dashboard.json")]
    assert dashboard.startswith(provider["options"]["path"] + "/")
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
