"""The Dockerfile agrees with the code and with the other deployments."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from tests.deploy.files import COMPOSE, KUBERNETES, instructions, manifest, tool
from tests.support.processes import ROOT


def last(name: str) -> str:
    return [arguments for each, arguments in instructions() if each == name][-1]


def test_its_command_is_the_installed_one_without_a_shell() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    # Lists, not lines for a shell: a shell would not pass SIGTERM on.
    [command] = json.loads(last("ENTRYPOINT"))
    assert command in scripts
    assert json.loads(last("CMD"))[:2] == ["--host", "0.0.0.0"]
    assert last("STOPSIGNAL") == "SIGTERM"


def test_every_deployment_has_its_port_user_and_folder() -> None:
    port = json.loads(last("CMD"))[-1]
    assert last("EXPOSE") == port
    assert f"127.0.0.1:{port}/health" in last("HEALTHCHECK")
    user, group = last("USER").split(":")
    [folder] = json.loads(last("VOLUME"))

    pod = manifest(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert [each["containerPort"] for each in container["ports"]] == [int(port)]
    security = pod["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (int(user), int(group))
    assert security["fsGroup"] == int(group)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"cache": folder, "scratch": "/tmp"}

    service = manifest(COMPOSE)["services"]["stepspan"]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert service["volumes"] == [f"cache:{folder}"]
    assert service["tmpfs"] == ["/tmp:exec"]  # compiled code is loaded from there


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_its_health_is_asked_without_a_proxy(status: int, healthy: bool) -> None:
    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    _, _, command = last("HEALTHCHECK").partition("CMD ")
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        python, *arguments = json.loads(command.replace(":8080", f":{server.server_port}"))
        assert python == "python"
        # Nothing listens there.
        proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
        checked = subprocess.run(
            [sys.executable, *arguments], env=os.environ | proxy, capture_output=True, check=False
        )
        server.shutdown()
    assert (checked.returncode == 0) == healthy


def test_what_is_kept_is_in_the_folder_that_is_kept() -> None:
    [folder] = json.loads(last("VOLUME"))
    variables = dict(re.findall(r"(\w+)=(\S+)", last("ENV")))
    for name in ("HF_HOME", "SDXL_CACHE_DIR"):
        assert variables[name].startswith(folder + "/")
    assert last("WORKDIR") == folder


def test_the_build_sees_what_it_copies_and_what_the_wheel_ships() -> None:
    admitted = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied: set[str] = set()
    for name, arguments in instructions():
        if name == "COPY" and "--from" not in arguments:
            copied |= set(shlex.split(arguments)[:-1])
    assert copied == admitted
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {package.split(".")[0] for package in setuptools["packages"]} <= copied


def test_the_bases_are_exact_versions() -> None:
    [image] = [
        arguments.split("=", 1)[1]
        for name, arguments in instructions()
        if name == "ARG" and arguments.startswith("PYTHON_IMAGE=")
    ]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", image)
    stages = {arguments.split(" AS ")[0] for name, arguments in instructions() if name == "FROM"}
    assert stages == {"${PYTHON_IMAGE}", "base-${VARIANT}"}


def test_the_linter_finds_nothing() -> None:
    found = tool("hadolint", "Dockerfile")
    assert found.returncode == 0, found.stdout
