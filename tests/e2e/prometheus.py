"""Debian's Prometheus on loopback with the shipped rules. It scrapes a running service, and holds
made-up samples of a service on a GPU and of fal's endpoint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.processes import free_port

MONITORING = Path(str(files("metrics") / "monitoring"))

RECORDED_RULE = re.compile(r"sdxl:[\w:]+(\{[^}]*\})?")


@dataclass(frozen=True)
class Expression:
    """A query of the shipped dashboard or rules, and where it is."""

    where: str
    text: str

    def filled(self, rate_interval: str, rules: Mapping[str, str] | None = None) -> str:
        """The query with values for the dashboard's variables.

        Args:
            rules: expressions that replace the names of recording rules.
        """
        text = self.text
        if rules is not None:
            text = RECORDED_RULE.sub(lambda m: f"({rules[m[0].split('{')[0]]})", text)
        values = {"$__rate_interval": rate_interval, "$job": "sdxl"}
        for name in ("$instance", "$shape", "$application"):
            values[name] = ".*"
        for name, value in values.items():
            text = text.replace(name, value)
        return text


def panels() -> list[Expression]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return [
        Expression(f"{panel['title']} {target['refId']}", target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


def rules(kind: str) -> dict[str, str]:
    """Expressions of the rules by name; `kind` is `record` or `alert`."""
    groups = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    return {rule[kind]: rule["expr"] for group in groups for rule in group["rules"] if kind in rule}


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, queried over its API."""

    client: httpx.Client

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self.client.get(f"/api/v1/{path}", params=parameters)
        body = answer.json()
        assert body["status"] == "success", (path, parameters, body)
        return body["data"]

    def values(self, expression: str, at: float | None = None) -> list[float]:
        """The value of every series of an instant query."""
        moment = {} if at is None else {"time": at}
        data = self.get("query", query=expression, **moment)
        if data["resultType"] == "scalar":
            return [float(data["result"][1])]
        return [float(series["value"][1]) for series in data["result"]]

    def exemplars(self, series: str, since: float) -> list[dict[str, str]]:
        """Labels of every exemplar of a series."""
        found = self.get("query_exemplars", query=series, start=since, end=time.time() + 1)
        return [exemplar["labels"] for one in found for exemplar in one["exemplars"]]


@contextmanager
def prometheus(target: str | Path, folder: Path, recorded: Path) -> Iterator[Prometheus]:
    """Run one with the shipped `prometheus.yml`, but with this target and a shorter interval.

    Args:
        target: host and port of the service to scrape, or the folder of files that name them.
        recorded: OpenMetrics with timestamps, readable from the start.
    """
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [job] = config["scrape_configs"]
    if isinstance(target, Path):
        del job["static_configs"]
        job["file_sd_configs"] = [{"files": [f"{target}/*.json"]}]
    else:
        job["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(MONITORING / "rules.yml", folder)
    data = folder / "data"
    subprocess.run(
        ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet", recorded, data],
        check=True,
        capture_output=True,
    )
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={data}",
                "--storage.tsdb.retention.time=30d",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        with httpx.Client(base_url=url, timeout=30) as client:
            while True:
                try:
                    if client.get("/-/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                said = (folder / "log").read_text()
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.05)
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(30)
