"""`bench peers`: what it refuses, how it interleaves, what it reports, and real peers."""

from __future__ import annotations

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from bench.__main__ import main
from bench.errors import BenchError
from bench.harness.work import PROMPT
from bench.peers import environments, throughput
from bench.peers.drawing import Drawing, PeerSettings, Pipeline
from bench.peers.servers import BENTOML, DOCUMENTED, LITSERVE, OURS, PEERS, serving
from bench.service import processes
from kernels_warmup.cpu_threads import INHERITED, THREADS, choose_cpu_threads

SETTINGS = PeerSettings("demo", "auto", "64x64", max_batch=4, longest_wait_seconds=600)
STEPS = 2


def is_built(name: str) -> bool:
    try:
        return bool(environments.pythonpath(name))
    except BenchError:
        return False


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not is_built(name), reason=f"needs the environment of {name}: make peers-env"
    )


# The command line --------------------------------------------------------------------------------


def no_measurement(*_: object) -> throughput.Rates:
    raise AssertionError("servers were started")


@pytest.mark.parametrize("option", ["--clients=0", "--clients=1,0", "--blocks=0", "--requests=0"])
def test_numbers_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peers", option]) == 2
    assert "1 and more are allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--max-batch=1", "--max-batch"),
        ("--dtype=int8", "--dtype"),
        ("--shape=64", "--shape"),
        ("--shape=65x64", "--shape"),
        ("--threads=0", "--threads"),
        ("--threads=many", "--threads"),
    ],
)
def test_what_is_not_allowed_is_said_before_any_work(
    option: str, named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "measure", no_measurement)
    assert main(["peers", option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize(
    "option",
    [
        "--peers=triton",
        "--peers=",
        "--clients=four",
        "--clients=1,",
        "--out=/nowhere/result.json",
    ],
)
def test_wrong_lists_and_files_are_wrong_usage(option: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["peers", option])
    assert stop.value.code == 2


@pytest.mark.parametrize("name", [BENTOML, LITSERVE])
@pytest.mark.parametrize("stamp", [None, "bentoml==1.0.0\n"])
def test_a_peer_that_is_not_installed_says_how_to_install_it(
    name: str,
    stamp: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(throughput, "measure", no_measurement)
    if stamp is not None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "installed.txt").write_text(stamp)
    assert main(["peers", "--peers", f"documented,{name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert "make peers-env" in line


@pytest.mark.parametrize(
    ("given", "variable", "threads"),
    [(None, "3", 3), ("2", "3", 2), ("own", "3", None)],
)
def test_threads_are_the_same_for_all_servers_unless_each_has_its_own(
    given: str | None, variable: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert throughput._threads(given) == threads


@pytest.mark.parametrize("name", [OURS, DOCUMENTED])
@pytest.mark.parametrize(("threads", "variable"), [(None, None), (2, "2")])
def test_a_server_that_chooses_its_threads_is_started_without_a_number(
    name: str, threads: int | None, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments_seen: list[Mapping[str, str]] = []

    def launched(_command: object, environment: Mapping[str, str], _cwd: object) -> None:
        environments_seen.append(environment)
        raise BenchError("not started")

    # As `python -m bench` sets it for itself.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for variable_name in (*THREADS, INHERITED):
        os.environ.pop(variable_name, None)
    choose_cpu_threads(os.environ)
    monkeypatch.setattr(processes, "launched", launched)
    with pytest.raises(BenchError), serving(name, SETTINGS, 1, threads):
        pass
    (environment,) = environments_seen
    assert environment.get("OMP_NUM_THREADS") == variable


def test_pins_are_exact() -> None:
    for name, path in environments.PINS.items():
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert all(line.count("==") == 1 and " " not in line for line in lines)
        assert environments.version(name).count(".") == 2


# Blocks and ratios -------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(OURS, DOCUMENTED), (OURS, *PEERS)])
def test_each_server_is_equally_often_at_each_place(names: tuple[str, ...]) -> None:
    orders = [throughput.order(names, block) for block in range(2 * len(names))]
    assert all(sorted(each) == sorted(names) for each in orders)
    for place in range(len(names)):
        assert set(Counter(each[place] for each in orders).values()) == {2}


def plan(**more: object) -> throughput.Plan:
    fields: dict[str, object] = {
        "peers": (DOCUMENTED,), "clients": (1, 4), "blocks": 2, "requests": None, "steps": 2,
        "threads": 1,
    }  # fmt: skip
    return throughput.Plan(**(fields | more))  # type: ignore[arg-type]


def test_a_block_has_two_rounds_of_all_clients() -> None:
    assert [plan().requests_with(clients) for clients in (1, 4, 16)] == [4, 8, 32]
    assert plan(requests=5).requests_with(16) == 5


def test_the_result_has_a_ratio_for_each_peer_and_number_of_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {
        1: {OURS: [2.0, 3.0, 4.0], DOCUMENTED: [2.0, 3.0, 4.0]},
        16: {OURS: [2.0, 3.0, 8.0], DOCUMENTED: [1.0, 1.0, 2.0]},
    }
    monkeypatch.setattr(throughput, "measure", lambda *_: rates)
    out = tmp_path / "peers.json"
    assert main(["peers", "--clients", "16,1", "--blocks", "3", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert list(written["clients"]) == ["1", "16"]
    assert written["clients"]["1"]["ours_over"][DOCUMENTED]["point"] == 1
    # The ratios of the blocks are 2, 3 and 4.
    assert written["clients"]["16"]["ours_over"][DOCUMENTED] == {"point": 3, "low": 2, "high": 4}
    assert written["clients"]["16"]["images_per_second"] == rates[16]
    assert written["clients"]["16"]["requests_a_block"] == 32
    assert written["peers"] == {DOCUMENTED: None}
    assert {"commit", "environment", "load_average", "max_batch", "threads"} <= set(written)
    assert "3.000 (2.000 to 4.000)" in capsys.readouterr().out


class FakeServer:
    """Counts the requests, and refuses a seed."""

    name = "fake"

    def __init__(self, refused: int | None = None) -> None:
        self.refused, self.seeds, self.connections = refused, Counter[object](), 0

    def connect(self) -> FakeServer:
        self.connections += 1
        return self

    def close(self) -> None:
        self.connections -= 1

    def draw(self, _: object, drawing: dict[str, object]) -> None:
        self.seeds[drawing["seed"]] += 1
        if drawing["seed"] == self.refused:
            raise BenchError("fake answered 503")


def test_a_block_sends_every_seed_once_and_closes_its_connections() -> None:
    server = FakeServer()
    assert throughput.load(server, 3, 10, STEPS) > 0  # type: ignore[arg-type]
    assert server.seeds == Counter(range(10))
    assert server.connections == 0


def test_a_refused_request_ends_the_measurement() -> None:
    with pytest.raises(BenchError, match="503"):
        throughput.load(FakeServer(refused=4), 3, 1000, STEPS)  # type: ignore[arg-type]


# Drawing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(SETTINGS, SETTINGS.dtype)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=int)


def decoded(answer: dict[str, dict[str, str]]) -> np.ndarray:
    encoded = answer["image"]["url"].removeprefix("data:image/png;base64,")
    return pixels(Image.open(io.BytesIO(base64.b64decode(encoded))))


def assert_same(image: np.ndarray, other: np.ndarray) -> None:
    """A batch is computed in another order than one image, which may round a pixel."""
    assert image.shape == other.shape
    assert np.abs(image - other).max() <= 1


def test_a_batch_draws_each_seed_as_it_is_drawn_alone(pipeline: Pipeline) -> None:
    steps = (2, 3, 2)
    drawings = [
        Drawing(prompt=PROMPT, num_inference_steps=steps[seed], seed=seed) for seed in range(3)
    ]
    together = [pixels(image) for image in pipeline.draw(drawings)]
    for drawing, image in zip(drawings, together, strict=True):
        assert_same(image, pixels(pipeline.draw([drawing])[0]))
    assert np.abs(together[0] - together[2]).max() > 10  # the seed matters


def test_settings_go_through_the_environment() -> None:
    assert PeerSettings.from_environment(SETTINGS.to_environment()) == SETTINGS


# Real servers ------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name)) for name in (BENTOML, LITSERVE)]
)
def test_a_peer_draws_what_the_pipeline_draws(name: str, pipeline: Pipeline) -> None:
    """Four requests at once and a pause between two: each image is that of its seed."""
    drawings = [Drawing(prompt=PROMPT, num_inference_steps=STEPS, seed=seed) for seed in range(4)]
    with serving(name, SETTINGS, 4, threads=1) as server:
        processes = server._processes()

        def ask(drawing: Drawing) -> np.ndarray:
            connection = server.connect()
            try:
                return decoded(server.draw(connection, drawing.model_dump()))
            finally:
                connection.close()

        server.pause()
        server.resume()
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(ask, drawings))
    assert psutil.wait_procs(processes, timeout=1)[1] == []
    for drawing, image in zip(drawings, answers, strict=True):
        assert_same(image, pixels(pipeline.draw([drawing])[0]))


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name)) for name in (BENTOML, LITSERVE)]
)
@pytest.mark.slow
def test_a_peer_that_cannot_load_the_model_says_so(name: str) -> None:
    settings = PeerSettings("/no/model", "auto", "", max_batch=4, longest_wait_seconds=600)
    with pytest.raises(BenchError, match="ModelError"), serving(name, settings, 1, threads=1):
        raise AssertionError("it is ready")


@pytest.mark.slow
@pytest.mark.e2e
@needs(BENTOML)
@needs(LITSERVE)
def test_all_servers_at_several_numbers_of_clients(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    command = ["peers", "--clients", "1,4", "--peers", ",".join(PEERS), "--blocks", "2"]
    command += ["--steps", "2", "--shape", "64x64", "--threads", "1"]
    assert main([*command, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["clients"]
    assert set(found) == {"1", "4"}
    for clients in found.values():
        assert set(clients["images_per_second"]) == {OURS, *PEERS}
        assert all(
            len(rates) == 2 and min(rates) > 0 for rates in clients["images_per_second"].values()
        )
        assert all(0.05 < ratio["point"] < 20 for ratio in clients["ours_over"].values())
