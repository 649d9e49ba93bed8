"""Made-up results, from a seeded generator with the noise that a test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bench.harness.result_file import (
    BenchResult,
    Ceilings,
    Code,
    Conditions,
    Environment,
    Flops,
    MeasuredScenario,
    RequestSample,
    Session,
    Side,
    Workload,
)

STEPS = 6
START_NS = 1_790_000_000_000_000_000
VERSIONS = {"torch": "2.13.0", "diffusers": "0.42.1"}
CPU = Environment(
    device="cpu", cpu="AMD EPYC", cores=2, memory_bytes=24 << 30, platform="Linux", python="3.11.9"
)
GPU = replace(CPU, device="cuda", gpu="NVIDIA H200", driver="570.1", cuda="13.0")


def request(index: int, step_ms: float, *, jitter: Sequence[float] = ()) -> RequestSample:
    """One request in round `index` whose steady steps have the median `step_ms`."""
    steps = [step_ms * (1 + part) for part in (jitter or (0,) * (STEPS - 1))]
    first = step_ms * 1.2
    denoise = first + sum(steps)
    stages = {"queue": 0.1, "text_encode": 2.0, "denoise": denoise, "vae_decode": step_ms * 1.5}
    return RequestSample(
        round=index,
        started_ns=START_NS + index * 1_000_000_000,
        total_ms=sum(stages.values()) + 0.5,
        first_step_ms=first,
        steps_ms=tuple(steps),
        gpu_queue_ms=(0.0,) + (2.0,) * (STEPS - 1),
        stages_ms=stages,
        cpu_ms=denoise * 1.1,
    )


def scenario(
    name: str, step_ms: Sequence[float], side: Side = "head", **fields: object
) -> MeasuredScenario:
    """A scenario with one request a round, whose median steps are `step_ms`."""
    known: dict[str, object] = {
        "what": f"the scenario {name}",
        "dtype": "float32",
        "flops": Flops(10**9, 2 * 10**10, 3 * 10**10),
        "peak_memory_bytes": 500 << 20,
        "error_vs_fp32": 1e-5,
        "warmups": (request(0, step_ms[0] * 3),),
        "requests": tuple(request(index, value) for index, value in enumerate(step_ms)),
    }
    return MeasuredScenario(name=name, side=side, **(known | fields))  # type: ignore[arg-type]


def result(*scenarios: MeasuredScenario, environment: Environment = CPU) -> BenchResult:
    """A result with these scenarios, in one session."""
    sides = {s.side: None for s in scenarios}
    rounds = 1 + max(r.round for s in scenarios for r in s.requests)
    commits: dict[Side, str] = {"base": "a" * 40, "head": "b" * 40}
    return BenchResult(
        command="python -m bench run",
        workload=Workload(model="demo", shape="128x128", steps=STEPS, guidance=True),
        environment=environment,
        code=tuple(Code(side, commits[side], False, VERSIONS) for side in sides),
        sessions=(
            Session(
                first_round=0,
                rounds=rounds,
                start=Conditions(at_ns=START_NS, load_average=0.3),
                end=Conditions(at_ns=START_NS + rounds * 1_000_000_000, load_average=0.9),
                ceilings=Ceilings({"float32": 1.5}, 20.0),
            ),
        ),
        scenarios=scenarios,
        price_per_hour=2.5,
    )


def noisy(level: float, count: int, noise: float, seed: int) -> list[float]:
    """`count` values around `level`, with normal noise of `noise` times the level."""
    return list(level * np.exp(np.random.default_rng(seed).normal(0, noise, count)))
