"""Two replicas on Ray Serve: killed, updated, scaled, compiled, and seen by Prometheus.

`pytest -s` prints what is measured.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment
from tests.e2e.prometheus import panels, prometheus
from tests.e2e.ray_service import (
    RayService,
    Replica,
    end_all,
    load,
    processes_of,
    ray_environment,
    ray_service,
    require_ray,
    wait_for_text,
)
from tests.metrics import recorded
from tests.support.otlp_endpoint import otlp_endpoint
from tests.support.processes import ROOT, free_port, running, self_hosted, wait_until

require_ray()

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

SERVED = 'sdxl_request_duration_seconds_count{endpoint="/",outcome="ok"}'


@pytest.fixture(scope="module")
def two() -> Iterator[RayService]:
    settings = {
        "SDXL_LORAS": "night=demo:night,dusk=demo:night",
        "SDXL_OTLP_METRICS": "true",
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        "SDXL_PEAK_TFLOPS": "1",
    }
    with ray_service("--replicas", "2", **settings) as service:
        yield service


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_one_prometheus_sees_every_replica(two: RayService, tmp_path: Path) -> None:
    """It finds them by their files, and the dashboard shows them together and apart."""
    from tests.e2e.test_prometheus import NOT_LIVE, RECORDED_END, has_data

    recorded.write(tmp_path / "recorded.txt", RECORDED_END, 2)
    with prometheus(two.targets, tmp_path, tmp_path / "recorded.txt") as running_:
        wait_until(lambda: running_.values('up{job="sdxl"}') == [1.0, 1.0], START_SECONDS)
        since = time.time()
        sent = 12
        with ThreadPoolExecutor(4) as clients:
            fields = [{"loras": [{"path": "night"}]}, {}, {"guidance_scale": 0.0}]
            answers = list(clients.map(lambda n: two.post(**fields[n % 3]), range(sent)))
        assert {answer.status_code for answer in answers} == {200}
        httpx.post(two.url + "/stream", json={"prompt": "x", "num_inference_steps": 2}, timeout=60)
        total = sum(r.value("sdxl_images_total") for r in two.replicas())
        wait_until(lambda: running_.values("sum(sdxl_images_total)") == [total], 60)
        assert len(running_.values("sum by (replica) (sdxl_images_total) > 0")) == 2
        assert len(running_.values("count by (instance, replica) (sdxl_ready)")) == 2

        queries = {panel.where: panel.filled("30s") for panel in panels()}
        # The replicas have no API keys, and so no series of them.
        live = {name: q for name, q in queries.items() if "api_key" not in q}
        empty = {name for name, query in live.items() if not NOT_LIVE.search(query)}
        assert len(empty) >= 60

        def all_have_data() -> bool:
            empty.difference_update([n for n in empty if has_data(running_, queries[n])])
            return not empty

        wait_until(all_have_data, 90)
        found = running_.get(
            "query_exemplars",
            query="sdxl_request_duration_seconds_bucket",
            start=since,
            end=time.time() + 1,
        )
        by_replica: dict[str, set[str]] = {}
        for series in found:
            ids = {exemplar["labels"]["trace_id"] for exemplar in series["exemplars"]}
            by_replica.setdefault(series["seriesLabels"]["replica"], set()).update(ids)
        assert set(by_replica) == {replica.name for replica in two.replicas()}
        assert set().union(*by_replica.values()) & {a.headers["x-trace-id"] for a in answers}
    # By push, the same id tells them apart.
    pushed = two.otlp.wait_for_points("sdxl_ready")
    assert {point.resource["service.instance.id"] for point in pushed} == set(by_replica)


def swaps(service: RayService) -> float:
    name = 'sdxl_stage_duration_seconds_count{stage="lora_swap"}'
    return sum(replica.value(name) for replica in service.replicas())


def test_requests_land_where_their_lora_is_in_use(two: RayService) -> None:
    """With the header that names it; without, they go anywhere and the weights change often."""

    def send(count: int, routed: bool) -> float:
        before = swaps(two)

        def client(lora: str) -> None:
            headers = {"serve-multiplexed-model-id": lora} if routed else {}
            for _ in range(count):
                answer = two.post(headers, loras=[{"path": lora}])
                assert answer.status_code == 200

        with ThreadPoolExecutor(4) as clients:
            list(clients.map(client, ("night", "dusk") * 2))
        return swaps(two) - before

    free, routed = send(15, routed=False), send(15, routed=True)
    print(f"\nof 60 requests of two LoRAs, {free:.0f} changed the weights; routed, {routed:.0f}")
    assert routed <= 6
    assert free > 2 * routed


def test_a_replica_that_is_killed_loses_only_what_it_had(two: RayService) -> None:
    before = two.replicas()
    answers: dict[int, httpx.Response] = {}

    def busy() -> list[Replica]:
        return [r for r in before if r.value("sdxl_requests_in_flight") > 0]

    def send(number: int) -> None:
        answers[number] = two.post(num_inference_steps=100)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(2)]
    for number, thread in enumerate(threads):
        thread.start()  # the second goes to the replica that is idle
        wait_until(lambda wanted=number + 1: len(busy()) == wanted, 30)
        if number == 0:
            [survivor] = busy()
    [victim] = [replica for replica in busy() if replica != survivor]
    with load(two.url, 2) as others:
        time.sleep(0.5)
        os.kill(victim.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        wait_until(lambda: len(two.replicas()) == 2, START_SECONDS)
        time.sleep(2)
    print(f"\nthe killed one's caller: {answers[1].status_code} {answers[1].text!r}")
    print(f"others: {dict(others.statuses)} {[a for a in others.answers if a[2] != 200]}")
    assert answers[0].status_code == 200
    assert answers[1].status_code == 500
    # Of two clients at most the two requests that it held at that moment.
    assert set(others.statuses) <= {200, 500}
    assert others.statuses[500] <= 2
    assert others.statuses[200] > 0
    assert {r.name for r in two.replicas()} & {r.name for r in before} == {survivor.name}


def test_a_rolling_update_under_load_fails_no_request(two: RayService) -> None:
    wait_until(lambda: len(two.replicas()) == 2, START_SECONDS)
    before = {replica.name for replica in two.replicas()}
    update = f"""
from ray import serve
from serve.ray_app import APPLICATION, app
serve.run(app({{"replicas": 2, "metrics_targets": {str(two.targets)!r}}}), name=APPLICATION)
"""
    with load(two.url, 4) as clients:
        start = time.monotonic()
        two.run_driver(update)
        seconds = time.monotonic() - start
        wait_until(lambda: {r.name for r in two.replicas()}.isdisjoint(before), START_SECONDS)
        time.sleep(2)
    slowest = max(taken for _, taken, _, _ in clients.answers)
    print(
        f"\nupdated in {seconds:.0f} s: {dict(clients.statuses)}, the slowest {slowest:.1f} s",
        [answer for answer in clients.answers if answer[2] != 200][:5],
    )
    assert set(clients.statuses) == {200}
    assert len(two.replicas()) == 2


def test_replicas_follow_a_ramp_and_fail_no_request() -> None:
    arguments = ("--replicas", "1", "--max-replicas", "2", "--upscale-seconds", "3")
    with ray_service(*arguments, "--downscale-seconds", "5", SDXL_MAX_BATCH="1") as service:
        with load(service.url, 1, num_inference_steps=10) as low:  # the target is 2
            time.sleep(15)
            assert len(service.replicas()) == 1
            start = time.monotonic()
            with load(service.url, 5, num_inference_steps=10) as high:
                wait_until(lambda: len(service.replicas()) == 2, START_SECONDS)
                wait_until(
                    lambda: all(r.value(SERVED) > 0 for r in service.replicas()), START_SECONDS
                )
                up = time.monotonic() - start
            start = time.monotonic()
            wait_until(lambda: len(service.replicas()) == 1, START_SECONDS)
            down = time.monotonic() - start
            time.sleep(3)
        print(f"\nup after {up:.0f} s, down after {down:.0f} s: {low.statuses + high.statuses}")
        assert set(low.statuses) == set(high.statuses) == {200}


def test_two_replicas_serve_more_than_one() -> None:
    """Where the machine has a core for each; the requests are divided in any case."""
    idle = os.getloadavg()[0] < 0.5 and len(os.sched_getaffinity(0)) >= 2
    rates = {}
    for replicas in (1, 2):
        with ray_service("--replicas", str(replicas), SDXL_MAX_BATCH="1") as service:
            with load(service.url, 4, num_inference_steps=20) as clients:
                time.sleep(5)
                since = time.monotonic()
                time.sleep(30)
                until = time.monotonic()
            rates[replicas] = clients.rate(since, until)
            shares = [replica.value(SERVED) for replica in service.replicas()]
            assert set(clients.statuses) == {200}
            assert len(shares) == replicas
            assert min(shares) > 0.3 * sum(shares)
    print(f"\nimages a second: {rates[1]:.2f} from one replica, {rates[2]:.2f} from two")
    assert not idle or rates[2] > 1.2 * rates[1]


def test_rays_proxy_costs_milliseconds() -> None:
    """What a client waits beyond the stages of the response, in turns with `python -m serve`."""
    beyond: dict[str, list[float]] = {"python -m serve": [], "python -m serve ray": []}
    with (
        ray_service("--replicas", "1", SDXL_SHAPES="128x128") as service,
        otlp_endpoint() as otlp,
        self_hosted(environment(otlp, SDXL_SHAPES="128x128")) as plain,
        httpx.Client(timeout=ANSWER_SECONDS) as client,
    ):
        plain.wait_until_ready(START_SECONDS)
        for _ in range(100):
            for name, url in zip(beyond, (plain.url, service.url), strict=True):
                start = time.perf_counter()
                answer = client.post(url, json=body(num_inference_steps=1))
                milliseconds = (time.perf_counter() - start) * 1e3
                timings = answer.json()["timings"]
                stages = [v for k, v in timings.items() if k.endswith("_ms") and k != "steps_ms"]
                beyond[name].append(milliseconds - sum(filter(None, stages)))
    medians = {name: statistics.median(values) for name, values in beyond.items()}
    print("\nbeyond the stages:", {name: f"{value:.1f} ms" for name, value in medians.items()})
    assert medians["python -m serve"] < medians["python -m serve ray"] < 100


def test_the_second_replica_starts_from_the_first_ones_kernels(tmp_path: Path) -> None:
    settings = {
        "SDXL_COMPILE": "regional",
        "SDXL_SHAPES": "128x128",
        "SDXL_MAX_BATCH": "1",
        "SDXL_CACHE_DIR": str(tmp_path / "kept"),
    }
    arguments = ("--replicas", "1", "--max-replicas", "2", "--upscale-seconds", "3")
    with ray_service(*arguments, start_seconds=1000, **settings) as service:
        [first] = service.replicas()
        with load(service.url, 6):
            wait_until(lambda: len(service.replicas()) == 2, 600)
            [second] = [r for r in service.replicas() if r.name != first.name]
            wait_until(lambda: second.value("sdxl_ready") == 1.0, 600)
        cache = "sdxl_compile_cache_total"
        assert first.value(cache + '{result="miss"}') == 1
        assert second.value(cache + '{result="hit"}') == 1
        seconds = [
            r.value('sdxl_warmup_duration_seconds{phase="compile"}') for r in (first, second)
        ]
        print(f"\ncompiled in {seconds[0]:.0f} s, from the cache in {seconds[1]:.0f} s")
        assert seconds[1] < seconds[0] / 2


def test_with_rays_own_tracing_its_spans_are_between_the_callers_and_ours() -> None:
    tracing = {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": (
            "ray.serve._private.tracing_utils:default_tracing_exporter"
        ),
        "RAY_SERVE_TRACING_SAMPLING_RATIO": "1.0",
    }
    with ray_service("--replicas", "1", SDXL_SHAPES="128x128", **tracing) as service:
        trace_id, caller = "ab" * 16, "cd" * 8
        service.post({"traceparent": f"00-{trace_id}-{caller}-01"})
        spans = service.otlp.wait_for_trace(trace_id)
        [root] = [span for span in spans if span.name == "text-to-image"]
        parents: dict[str, str] = {}

        def written() -> bool:
            """Ray has written its spans, as indented JSON one after the other."""
            text = "".join(f.read_text() for f in service.logs() if "tracing" in f.name)
            ids = re.findall(r'"span_id": "0x(\w+)".*?"parent_id": "0x(\w+)"', text, re.DOTALL)
            parents.update(ids)
            return caller in parents.values() and root.parent_span_id in parents

        wait_until(written, 30)
        span = root.parent_span_id
        while span in parents:
            span = parents[span]
        assert span == caller


@pytest.mark.parametrize("end", ["a model that is not there", "SIGTERM"])
def test_a_start_that_does_not_succeed(end: str, tmp_path: Path) -> None:
    """Status 1 and the reason, or 0; and no process is left."""
    temporary = tempfile.mkdtemp(prefix="ray-")
    with otlp_endpoint() as otlp:
        settings = {"SDXL_MODEL": str(tmp_path)} if end != "SIGTERM" else {}
        variables = environment(otlp, **settings) | ray_environment(temporary)
        command = [sys.executable, "-m", "serve", "ray", "--port", "0"]
        try:
            with running(command, "", variables, ROOT) as process:
                if end == "SIGTERM":
                    wait_for_text(process, "start-up: load_model", START_SECONDS)
                    process.process.terminate()
                process.process.wait(START_SECONDS)
                assert process.process.returncode == (0 if end == "SIGTERM" else 1)
                if end != "SIGTERM":
                    assert str(tmp_path) in process.output()
            wait_until(lambda: not processes_of(temporary), 30)
        finally:
            end_all(temporary)
            shutil.rmtree(temporary, ignore_errors=True)


CONFIGURATION = ROOT / "docs" / "deploy" / "ray" / "serve.yaml"


@contextmanager
def configured(tmp_path: Path, **arguments: Any) -> Iterator[tuple[str, Any, Any]]:
    """`serve run` with the shipped file, changed for this machine: its URL, process and spans."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    port = free_port()
    configuration["http_options"] |= {"host": "127.0.0.1", "port": port}
    [application] = configuration["applications"]
    application["args"] |= arguments | {"metrics_port": 0, "metrics_targets": str(tmp_path / "t")}
    application["runtime_env"]["env_vars"] |= {
        "SDXL_CACHE_DIR": str(tmp_path / "kept"),
        "SDXL_STEPS": "3",
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(configuration))
    temporary = tempfile.mkdtemp(prefix="ray-")
    with otlp_endpoint() as otlp:
        variables = environment(otlp) | ray_environment(temporary)
        command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file)]
        url = f"http://127.0.0.1:{port}"
        try:
            with running(command, url, variables, ROOT) as process:
                process.wait_until_ready(START_SECONDS)
                yield url, process, otlp
        finally:
            end_all(temporary)
            shutil.rmtree(temporary, ignore_errors=True)


def test_the_shipped_configuration_serves(tmp_path: Path) -> None:
    """By Ray's own command: the settings come from the file, and spans arrive at the end."""
    with configured(tmp_path) as (url, process, otlp):
        answer = httpx.post(url, json={"prompt": "a red circle"}, timeout=ANSWER_SECONDS)
        assert answer.status_code == 200
        assert len(answer.json()["timings"]["steps_ms"]) == 3
        process.process.send_signal(signal.SIGINT)
        process.process.wait(90)
        otlp.wait_for_trace(answer.headers["x-trace-id"])
        assert list((tmp_path / "t").iterdir()) == []
