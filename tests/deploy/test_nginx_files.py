"""nginx's configuration and the systemd unit agree with the code; test_nginx.py runs them."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from serve.http.request_body import MAX_PICTURE_BODY_BYTES
from serve.server import GRACE_SECONDS
from serve.settings import ServeSettings, environment_name
from tests.deploy.files import DEPLOY, END_SECONDS
from tests.deploy.nginx import MAIN, NGINX, SHIPPED, configuration
from tests.support.processes import ROOT, free_port

UNIT = DEPLOY / "nginx" / "stepspan@.service"


def default(field: str) -> float:
    return float(ServeSettings.model_fields[field].default)


def directive(name: str) -> str:
    [value] = re.findall(rf"(?m)^ *{name} ([^;]+);", SHIPPED.read_text())
    return str(value)


def unit() -> dict[str, list[str]]:
    """The values of each name of the section Service."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().partition("[Service]")[2].partition("[Install]")[0].splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_nginx_accepts_the_configuration(tmp_path: Path) -> None:
    if NGINX is None:
        if os.environ.get("CI") == "true":
            raise RuntimeError("CI must have Debian's nginx package; .ci/run installs it")
        pytest.skip("nginx is not installed (apt-get install nginx)")
    shipped = configuration([free_port(), free_port()], free_port(), tmp_path / "log")
    file = tmp_path / "nginx.conf"
    file.write_text(MAIN.format(folder=tmp_path, shipped=shipped, user=""))
    checked = subprocess.run(
        [NGINX, "-t", "-p", tmp_path, "-c", file], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr, checked.stderr


def test_its_limits_are_outside_the_servers() -> None:
    [kept] = re.findall(r"(?m)^    keepalive_timeout (\d+)s;", SHIPPED.read_text())
    assert float(kept) < default("keep_alive_seconds")
    assert int(directive("client_max_body_size").removesuffix("m")) << 20 > MAX_PICTURE_BODY_BYTES
    silence = float(directive("proxy_read_timeout").removesuffix("s"))
    assert silence > default("deadline_seconds") + GRACE_SECONDS


def test_the_unit_runs_the_installed_command_on_the_ports_that_nginx_names() -> None:
    [command] = unit()["ExecStart"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    match = re.fullmatch(r"/bin/sh -c 'exec (\S+) --port \$\(\((\d+) \+ %i\)\)'", command)
    assert match is not None
    assert Path(match[1]).name in scripts
    ports = [int(port) for port in re.findall(r"server 127\.0\.0\.1:(\d+) ", SHIPPED.read_text())]
    assert ports == [int(match[2]) + gpu for gpu in range(len(ports))]
    assert len(ports) > 1


def test_a_process_may_end_in_its_own_time() -> None:
    assert float(unit()["TimeoutStopSec"][0]) > END_SECONDS


def test_its_variables_are_read_and_what_is_kept_is_in_its_folder() -> None:
    variables = dict(each.split("=", 1) for each in unit()["Environment"])
    read = {environment_name(field) for field in ServeSettings.model_fields}
    assert set(variables) - read == {"CUDA_VISIBLE_DEVICES", "HF_HOME"}
    assert variables["CUDA_VISIBLE_DEVICES"] == "%i"
    [folder] = unit()["CacheDirectory"]
    for name in ("HF_HOME", "SDXL_CACHE_DIR"):
        assert variables[name].startswith(f"/var/cache/{folder}/")
    assert unit()["CacheDirectoryMode"] == ["0700"]
