"""The Kubernetes files agree with the code, the schemas of several versions, and our rules."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from metrics.catalogue import GenerationMetrics
from serve.settings import ServeSettings, environment_name, load_settings
from tests.deploy.files import END_SECONDS, KUBERNETES, manifest, tool
from tests.deploy.prometheus_rule import RULES, WRITTEN, prometheus_rule
from tests.support.processes import ROOT

VERSIONS = ("1.29", "1.31", "1.34", "1.37")
CUSTOM = [
    KUBERNETES / "prometheus" / "podmonitor.yaml",
    KUBERNETES / "prometheus" / "rules.yaml",
    KUBERNETES / "keda" / "autoscaler.yaml",
]

DEPLOYMENT: dict[str, Any] = manifest(KUBERNETES / "base" / "deployment.yaml")
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]


def literals(overlay: str) -> dict[str, str]:
    [generated] = manifest(KUBERNETES / overlay / "kustomization.yaml")["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generated["literals"])


def resources() -> list[Path]:
    """Every file that is a whole resource: not the kustomizations, and not the patch."""
    return [
        path
        for path in sorted(KUBERNETES.glob("*/*.yaml"))
        if path.name not in ("kustomization.yaml", "gpu.yaml")
    ]


@pytest.mark.parametrize("overlay", ["base", "cpu-demo"])
def test_the_settings_are_allowed(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (literals("base") | literals(overlay)).items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.deadline_seconds == ServeSettings.model_fields["deadline_seconds"].default


def test_every_variable_is_one_that_the_service_reads() -> None:
    read = {environment_name(field) for field in ServeSettings.model_fields} | {"HF_TOKEN"}
    of_the_pod = {"POD_NAME", "NODE_NAME"}  # for OTEL_RESOURCE_ATTRIBUTES
    names = [variable["name"] for variable in CONTAINER["env"]]
    assert set(names) - of_the_pod <= read
    assert len(names) == len(set(names))
    secrets = [variable["valueFrom"]["secretKeyRef"] for variable in CONTAINER["env"]
               if "secretKeyRef" in variable.get("valueFrom", {})]  # fmt: skip
    assert len(secrets) >= 3
    assert all(secret["optional"] is True for secret in secrets)


def test_no_service_link_can_be_taken_for_a_setting() -> None:
    assert POD["enableServiceLinks"] is False


def test_the_probes_ask_for_paths_that_answer() -> None:
    # One start that may take long; the others are as quick as fal's check of the same path.
    fal = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fal"]["apps"]["sdxl"]
    start = CONTAINER["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] == fal["startup_timeout"]
    assert DEPLOYMENT["spec"]["progressDeadlineSeconds"] > fal["startup_timeout"]
    alive = CONTAINER["livenessProbe"]
    assert alive["httpGet"]["path"] == fal["health_check"]["path"] == "/health"
    assert alive["timeoutSeconds"] == fal["health_check"]["timeout_seconds"]
    assert alive["failureThreshold"] == fal["health_check"]["failure_threshold"]
    for probe in ("startupProbe", "readinessProbe"):
        assert CONTAINER[probe]["httpGet"]["path"] == "/ready"
    ports = {port["name"] for port in CONTAINER["ports"]}
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    assert {CONTAINER[probe]["httpGet"]["port"] for probe in probes} <= ports
    [service_port] = manifest(KUBERNETES / "base" / "service.yaml")["spec"]["ports"]
    assert service_port["targetPort"] in ports


def test_a_pod_may_end_in_its_own_time() -> None:
    command, seconds = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert POD["terminationGracePeriodSeconds"] > float(seconds) + END_SECONDS


def test_nothing_in_a_pod_is_privileged_and_only_its_volumes_can_be_written() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    for container in (*POD["containers"], *POD["initContainers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_service_gets_folders_of_its_user_alone() -> None:
    [init] = POD["initContainers"]
    *command, script = init["command"]
    assert command == ["sh", "-c"]
    made = script.removeprefix("mkdir -p -m 0700 ").split()
    roots = {mount["name"]: mount["mountPath"] for mount in init["volumeMounts"]}
    assert made == [
        f"{roots[mount['name']]}/{mount['subPath']}" for mount in CONTAINER["volumeMounts"]
    ]


def names_in(queries: str) -> set[str]:
    return {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bsdxl_\w+", queries)
    }


def test_the_autoscaler_reads_metrics_that_exist(metrics: GenerationMetrics) -> None:
    served = {
        name
        for family in metrics.registry.collect()
        for name in (family.name, *(sample.name for sample in family.samples))
    }
    scaled = manifest(KUBERNETES / "keda" / "autoscaler.yaml")["spec"]
    queries = [trigger["metadata"]["query"] for trigger in scaled["triggers"]]
    assert {"sdxl_requests_waiting", "sdxl_queue_duration_seconds"} <= names_in("".join(queries))
    assert names_in("".join(queries)) <= served
    [monitor_job] = [
        relabel["replacement"]
        for relabel in manifest(CUSTOM[0])["spec"]["podMetricsEndpoints"][0]["relabelings"]
        if relabel["targetLabel"] == "job"
    ]
    [job] = manifest(ROOT / "metrics" / "monitoring" / "prometheus.yml")["scrape_configs"]
    assert monitor_job == job["job_name"]
    assert all(f'{{job="{job["job_name"]}"}}' in query for query in queries)
    assert scaled["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    assert "replicas" not in DEPLOYMENT["spec"]


@pytest.fixture
def metrics() -> GenerationMetrics:
    return GenerationMetrics(
        CollectorRegistry(), endpoints=("/",), outcomes=("ok",), error_types=("internal",),
        build={"version": "0", "python": "3", "torch": "2", "diffusers": "0"},
    )  # fmt: skip


def test_prometheus_scrapes_what_is_served() -> None:
    [endpoint] = manifest(CUSTOM[0])["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["port"] in {port["name"] for port in CONTAINER["ports"]}


def test_the_rules_are_ours() -> None:
    assert WRITTEN.read_text() == prometheus_rule()
    assert yaml.safe_load(prometheus_rule())["spec"] == yaml.safe_load(RULES.read_text())


def test_nobody_but_those_named_is_let_in() -> None:
    policy = manifest(KUBERNETES / "base" / "network.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert all(rule["from"] for rule in policy["ingress"])
    endpoint = literals("base")["OTEL_EXPORTER_OTLP_ENDPOINT"]
    port = int(endpoint.rpartition(":")[2])
    assert any({"port": port} in rule["ports"] for rule in policy["egress"])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_resources_fit_kubernetes(version: str) -> None:
    core = [path for path in resources() if path not in CUSTOM]
    assert len(core) == 5
    found = tool("kubernetes-validate", "--strict", "-k", version, *core)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (found.stdout + found.stderr).count(" passed for resource ") == len(core)


def test_the_custom_resources_fit_their_definitions(tmp_path: Path) -> None:
    script = ROOT / "tests" / "deploy" / "custom_resources.py"
    wrong = manifest(CUSTOM[0])
    wrong["spec"]["podMetricsEndpoints"][0]["pathh"] = "/metrics"
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    # It ends at the first fault, and only the last file has one.
    found = tool("python", script, *CUSTOM, tmp_path / "wrong.yaml")
    assert found.stderr.strip() == (
        f"{tmp_path / 'wrong.yaml'}: spec.podMetricsEndpoints[0].pathh unknown"
    )


def test_everything_selects_the_pods_by_their_labels() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    base = KUBERNETES / "base"
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        manifest(base / "service.yaml")["spec"]["selector"],
        manifest(base / "disruption.yaml")["spec"]["selector"]["matchLabels"],
        manifest(base / "network.yaml")["spec"]["podSelector"]["matchLabels"],
        manifest(CUSTOM[0])["spec"]["selector"]["matchLabels"],
    ]
    assert selectors == [labels] * len(selectors)


@pytest.mark.parametrize("overlay", ["gpu", "cpu-demo"])
def test_the_overlays_can_be_built_and_fit_kubernetes(overlay: str, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES / overlay], capture_output=True, text=True, check=False
    )
    assert (built.returncode, built.stderr) == (0, "")
    documents = {each["kind"]: each for each in yaml.safe_load_all(built.stdout)}
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    [image] = {each["image"] for each in (*pod["containers"], *pod["initContainers"])}
    limits = container["resources"]["limits"]
    assert image.endswith(":cuda" if overlay == "gpu" else "stepspan:cpu")
    assert limits.get("nvidia.com/gpu") == (1 if overlay == "gpu" else None)
    custom = {"ScaledObject", "PodMonitor", "PrometheusRule"}
    assert custom & set(documents) == (custom if overlay == "gpu" else set())
    core = [each for kind, each in documents.items() if kind not in custom]
    (tmp_path / "core.yaml").write_text(yaml.safe_dump_all(core))
    found = tool("kubernetes-validate", "--strict", "-k", VERSIONS[-1], tmp_path / "core.yaml")
    assert (found.stdout + found.stderr).count(" passed for resource ") == len(core)
