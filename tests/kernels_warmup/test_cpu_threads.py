"""The number of CPU threads: the cores really given, in time for torch; the user's is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from kernels_warmup import cpu_threads
from kernels_warmup.cpu_threads import choose_cpu_threads, cores_given, cpu_quota
from tests.support.processes import ROOT, clean_environment


def tree(root: Path, files: Mapping[str, str]) -> Path:
    """Files under `root`, by path."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        # Version 2: in a container the group is mounted at the top.
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        # A parent's limit holds for its children.
        (
            {
                "proc/self/cgroup": "0::/pod/app",
                "sys/fs/cgroup/pod/app/cpu.max": "max 100000",
                "sys/fs/cgroup/pod/cpu.max": "400000 100000",
            },
            4.0,
        ),
        (
            {
                "proc/self/cgroup": "0::/pod/app",
                "sys/fs/cgroup/pod/app/cpu.max": "200000 100000",
                "sys/fs/cgroup/pod/cpu.max": "400000 100000",
            },
            2.0,
        ),
        # The path is the host's, which this container does not see.
        ({"proc/self/cgroup": "0::/host/pod", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
        # Version 1, with its controllers mounted together or alone.
        (
            {
                "proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/docker/x\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/docker/x",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        # The quota of another controller's group is none.
        (
            {
                "proc/self/cgroup": "3:cpuset:/x",
                "sys/fs/cgroup/cpuset/x/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpuset/x/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_quota_of_control_groups(
    tmp_path: Path, files: Mapping[str, str], quota: float | None
) -> None:
    assert cpu_quota(tree(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("quota", "cores"), [("max", 4), ("150000", 1), ("50000", 1), ("250000", 2), ("900000", 4)]
)
def test_cores_are_the_affinitys_within_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(cpu_threads, "cpus_allowed", lambda: {2, 3, 8, 9})
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{quota} 100000"}
    assert cores_given(tree(tmp_path, files)) == cores


def test_hyperthreads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_threads, "cpus_allowed", lambda: {0, 1, 2, 3})
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {topology.format(cpu): text for cpu, text in siblings.items()}
    assert cores_given(tree(tmp_path, files)) == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_a_narrowed_affinity_counts() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        "from kernels_warmup.cpu_threads import cores_given; print(cores_given())"
    )
    assert python(code) == "1"


def test_the_users_number_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "cores_given", lambda: 6)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment = {name: "3"}
        chosen = choose_cpu_threads(environment)
        assert environment == {name: "3"}
        assert chosen.threads is None
        assert chosen.set_by_user == {name: "3"}
        assert chosen.waiting_is_ours


@pytest.mark.parametrize("name", [*cpu_threads.WAITING, *cpu_threads.PLACES])
def test_the_users_waiting_and_places_are_kept(name: str) -> None:
    environment = {name: "1"}
    chosen = choose_cpu_threads(environment)
    assert not chosen.waiting_is_ours
    assert chosen.set_by_user == {name: "1"}
    assert environment[name] == "1"
    assert environment["OMP_NUM_THREADS"] == str(cores_given())


def test_a_child_chooses_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its parent chose is not the user's choice; what the user sets over it is."""
    environment: dict[str, str] = {}
    monkeypatch.setattr(cpu_threads, "cores_given", lambda: 6)
    assert choose_cpu_threads(environment).threads == 6
    monkeypatch.setattr(cpu_threads, "cores_given", lambda: 2)
    chosen = choose_cpu_threads(environment)
    assert (chosen.threads, chosen.set_by_user) == (2, {})
    assert environment["OMP_NUM_THREADS"] == "2"
    environment["OMP_NUM_THREADS"] = "1"
    assert choose_cpu_threads(environment).set_by_user == {"OMP_NUM_THREADS": "1"}


CHANGED = "import kernels_warmup.cpu_threads as c; c.cores_given = lambda: 1\n"
THREADS = "\nimport torch; print(torch.get_num_threads())"


@pytest.mark.skipif(cores_given() < 2, reason="torch has one thread here by itself")
@pytest.mark.parametrize(
    "front_door",
    [
        "import serve.engine.build as r, serve.settings as s; r.build_runtime(s.load_settings())",
        "from bench.__main__ import main\nmain(['show', 'no-such-file.json'])",
    ],
)
def test_torch_computes_with_the_chosen_number(front_door: str) -> None:
    """torch by itself computes with a thread for each core, of which there are more here."""
    assert python(CHANGED + front_door + THREADS) == "1"


@pytest.mark.slow
@pytest.mark.skipif(cores_given() < 2, reason="torch has one thread here by itself")
def test_torch_computes_with_the_users_number() -> None:
    front_door = "from bench.__main__ import main\nmain(['show', 'no-such-file.json'])"
    assert python(CHANGED + front_door + THREADS, OMP_NUM_THREADS="2") == "2"


def python(code: str, **environment: str) -> str:
    """The last line that a fresh process prints; without the OpenMP variables of this one."""
    names = (*cpu_threads.THREADS, *cpu_threads.WAITING, *cpu_threads.PLACES)
    inherited = {name: value for name, value in clean_environment().items() if name not in names}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    )
    return ended.stdout.strip().splitlines()[-1]
