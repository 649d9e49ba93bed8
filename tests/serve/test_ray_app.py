"""The Ray Serve application's options, and what of Ray's follows from our settings.

Ray is imported in a process of its own: this one's packages are without it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.settings import ServeSettings, environment_name
from tests.support.processes import ROOT, clean_environment

RAY = ROOT / ".ray"
DEPLOY = ROOT / "docs" / "deploy" / "ray"

with_ray = pytest.mark.skipif(
    not (RAY / ".installed").exists() and os.environ.get("CI") != "true",
    reason="Ray is not installed (make ray-env)",
)

SCRIPT = """
import json, os, sys, yaml
from types import SimpleNamespace
import ray
from ray.serve.schema import ServeDeploySchema
from serve.errors import ConfigurationError
from serve.ray_app import Sdxl, app, read_options, target_ongoing_requests

def refusal(**arguments):
    try:
        return read_options(arguments) and None
    except ConfigurationError as error:
        return str(error)

def config(**arguments):
    made = app(arguments)._bound_deployment
    return made._deployment_config.model_dump(mode="json") | {"actor": made.ray_actor_options}

def fails_its_check(healthy):
    replica = Sdxl.__new__(Sdxl)
    replica.app = SimpleNamespace(runtime=SimpleNamespace(healthy=healthy))
    try:
        replica.check_health()
    except RuntimeError:
        return True
    return False

file = yaml.safe_load(open(sys.argv[1]))
ServeDeploySchema.model_validate(file)
(application,) = file["applications"]

def gpus():
    ray.cluster_resources = lambda: {"CPU": 8.0, "GPU": 2.0}
    def each(device):
        os.environ["SDXL_DEVICE"] = device
        return config()["actor"]["num_gpus"]
    return {device: each(device) for device in ("cpu", "cuda", "auto")}

print(json.dumps({
    "targets": [target_ongoing_requests(b, t, w) for b, t, w in json.loads(sys.argv[2])],
    "refusals": [
        refusal(replicas=0), refusal(max_replcas=2), refusal(replicas=3, max_replicas=2),
        refusal(wait_seconds="soon"), refusal(),
    ],
    "fixed": config(replicas="2"),
    "scaled": config(replicas=1, max_replicas=4, run_seconds=2, wait_seconds=4),
    "shipped": config(**application["args"]),
    "fails_its_check": [fails_its_check(True), fails_its_check(False)],
    "gpus": gpus(),
}))
"""

TARGETS = [(1, 1.0, 1.0), (1, 0.5, 1.0), (4, 1.0, 1.0)]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env=clean_environment(environment),
        check=False,
    )


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    path = os.pathsep.join(filter(None, (str(RAY), os.environ.get("PYTHONPATH"))))
    done = run(
        "-c", SCRIPT, str(DEPLOY / "serve.yaml"), json.dumps(TARGETS),
        PYTHONPATH=path, SDXL_DEVICE="cpu", SDXL_MAX_WAITING="10", SDXL_DEADLINE_SECONDS="20",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def waiting_on_average(utilisation: float, arrivals: int = 200_000) -> float:
    """How many runs a request waits for, simulated: random arrivals, runs of length 1."""
    draw = random.Random(1)
    wait = total = 0.0
    for _ in range(arrivals):
        wait = max(0.0, wait + 1.0 - draw.expovariate(utilisation))
        total += wait
    return total / arrivals


@with_ray
def test_a_replica_at_its_target_makes_requests_wait_as_long_as_they_may(
    found: dict[str, Any],
) -> None:
    for (batch, run_seconds, wait_seconds), target in zip(TARGETS, found["targets"], strict=True):
        waits = wait_seconds / run_seconds
        utilisation = target / batch / (1 + waits)
        assert waiting_on_average(utilisation) == pytest.approx(waits, rel=0.1)


@with_ray
def test_a_wrong_option_is_named(found: dict[str, Any]) -> None:
    *refused, allowed = found["refusals"]
    names = ("replicas", "max_replcas", "max_replicas=2", "wait_seconds")
    assert all(text.startswith(name) for text, name in zip(refused, names, strict=True))
    assert allowed is None


@with_ray
def test_rays_options_follow_from_the_settings(found: dict[str, Any]) -> None:
    fixed, scaled = found["fixed"], found["scaled"]
    assert (fixed["num_replicas"], fixed["autoscaling_config"]) == (2, None)
    assert fixed["actor"] == {"num_cpus": 1.0, "num_gpus": 0}
    # Our own queue is full before Ray's limit is reached.
    assert fixed["max_ongoing_requests"] > 10 + 2
    # The deadline, 5 s for the answer and 3 s for the spans fit in.
    assert fixed["graceful_shutdown_timeout_s"] >= 20 + 5 + 3
    scaling = scaled["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 4)
    assert scaling["target_ongoing_requests"] == pytest.approx(0.8 * 3)
    assert found["shipped"]["autoscaling_config"]["max_replicas"] == 4


@with_ray
def test_each_replica_has_a_gpu_where_there_are_some(found: dict[str, Any]) -> None:
    assert found["gpus"] == {"cpu": 0, "cuda": 1, "auto": 1}


@with_ray
def test_ray_replaces_a_replica_that_is_unhealthy(found: dict[str, Any]) -> None:
    assert found["fails_its_check"] == [False, True]


def test_the_shipped_files_agree_and_name_settings_that_exist() -> None:
    file = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    kubernetes = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    assert yaml.safe_load(kubernetes["spec"]["serveConfigV2"]) == file
    [application] = file["applications"]
    known = {environment_name(name) for name in ServeSettings.model_fields}
    assert set(application["runtime_env"]["env_vars"]) <= known
    worker = kubernetes["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    [port] = worker["containers"][0]["ports"]
    assert port["containerPort"] == application["args"]["metrics_port"]
    assert worker["terminationGracePeriodSeconds"] >= ServeSettings().deadline_seconds + 10
    version = kubernetes["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"\nray=={version}\n" in (ROOT / "requirements-ray.lock").read_text()


def test_without_ray_the_command_says_what_to_install(tmp_path: Path) -> None:
    done = run("-m", "serve", "ray", "--replicas", "2", SDXL_DEVICE="cpu")
    assert done.returncode == 2
    assert "stepspan[ray,model]" in done.stderr
