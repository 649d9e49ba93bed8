"""A real nginx on loopback with the shipped configuration, in front of running servers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.processes import ROOT, free_port

SHIPPED = ROOT / "docs" / "deploy" / "nginx" / "stepspan.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

MAIN = """\
{user}
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/errors warn;
events {{}}
http {{
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxied;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {shipped}
}}
"""

_LOGGED = re.compile(r"upstream (.*): ([-\d, ]+), trace")


@dataclass(frozen=True)
class Nginx:
    """A running one: its URL and its access log."""

    url: str
    log: Path

    def attempts(self) -> list[list[tuple[int, int]]]:
        """Of every logged request that was sent to a server: each attempt's port and status."""
        found = []
        for line in self.log.read_text().splitlines():
            match = _LOGGED.search(line)
            assert match is not None, line
            if match[1] != "-":
                ports = [int(each.rpartition(":")[2]) for each in match[1].split(", ")]
                statuses = [int(each) if each != "-" else 0 for each in match[2].split(", ")]
                found.append(list(zip(ports, statuses, strict=True)))
        return found


def configuration(ports: Sequence[int], port: int, log: Path) -> str:
    """The shipped file with other ports and another log. Nothing else of it changes."""
    text = SHIPPED.read_text()
    servers = "\n".join(f"    server 127.0.0.1:{each} max_fails=0;" for each in ports)
    text, count = re.subn(
        r"(?m)(^    server 127\.0\.0\.1:\d+ max_fails=0;\n?)+", servers + "\n", text
    )
    assert count == 1
    for shipped, here in (
        ("listen 127.0.0.1:8000;", f"listen 127.0.0.1:{port};"),
        ("/var/log/nginx/stepspan.log", str(log)),
    ):
        assert shipped in text
        text = text.replace(shipped, here)
    return text


@contextmanager
def nginx(ports: Sequence[int], folder: Path) -> Iterator[Nginx]:
    """Run one in front of the servers at `ports` of loopback until the block ends."""
    assert NGINX is not None
    port, log = free_port(), folder / "log"
    # As root its worker would become another user, who may not enter the folder.
    user = "user root;" if os.geteuid() == 0 else ""
    shipped = configuration(ports, port, log)
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, shipped=shipped, user=user))
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(url + "/metrics", timeout=5)  # answered by nginx itself
                break
            except httpx.TransportError:
                assert process.poll() is None, (folder / "output").read_text()
                assert time.monotonic() < deadline, (folder / "output").read_text()
                time.sleep(0.05)
        yield Nginx(url, log)
    finally:
        process.terminate()
        process.wait(20)
