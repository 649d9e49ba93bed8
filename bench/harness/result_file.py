"""The result file of the bench: what was measured, raw, and where, as one JSON document.

A file holds every sample and nothing that was made out of them: medians, ratios and utilisation are
worked out again by whoever reads it. The one exception is the block `figures` of each scenario, for
people and `jq`; reading ignores it. A digest over the content shows when a file was edited by hand.

    {"format": "stepspan-bench", "schema_version": 1, "digest": "sha256:...", "result": {...}}

Durations are milliseconds, moments Unix nanoseconds. Nothing here measures or judges.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bench.errors import ResultFileError

FORMAT = "stepspan-bench"
SCHEMA_VERSION = 1

Side = Literal["base", "head"]
"""Which commit a sample is of. A run of one commit has the side `head` only."""


_CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)

Duration = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]


# Samples -----------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_CLOSED)
class RequestSample:
    """One request as it was measured."""

    round: Annotated[int, Field(ge=0)]
    """Which pass over the scenarios it belongs to, numbered through the file: samples of one round
    were taken one after the other, and a run that is resumed goes on numbering. Samples of
    different scenarios or sides that share a round are interleaved."""
    started_ns: Annotated[int, Field(ge=0)]
    total_ms: Duration
    """End to end, as its caller sees it."""
    first_step_ms: Duration
    """Step 0, which also fills the launch queue and the text buffers."""
    steps_ms: Annotated[tuple[Duration, ...], Field(min_length=1)]
    """Steps 1 and up, the steady state."""
    gpu_queue_ms: tuple[NotNegative, ...] = Field(
        default=(), validation_alias=AliasChoices("gpu_queue_ms", "leads_ms")
    )
    """How long each step, step 0 included, waited in the GPU's queue; empty where the clock is the
    host's. Files up to 2026-11-25 call it `leads_ms`."""
    stages_ms: dict[str, NotNegative] = Field(default_factory=dict)
    """By stage: `queue`, `text_encode`, `denoise`, `vae_decode`, `image_encode`, ..."""
    cpu_ms: NotNegative | None = None
    """CPU time the process took for it, all threads."""

    def __post_init__(self) -> None:
        if self.gpu_queue_ms and len(self.gpu_queue_ms) != 1 + len(self.steps_ms):
            raise ValueError(
                f"gpu_queue_ms has {len(self.gpu_queue_ms)} values "
                f"for {1 + len(self.steps_ms)} steps"
            )

    @property
    def step_ms(self) -> float:
        """The median of its steady steps: the one figure a request contributes to a verdict."""
        return statistics.median(self.steps_ms)


@dataclass(frozen=True, config=_CLOSED)
class Flops:
    """Nominal floating-point operations of one run: all of its images together."""

    text_encode: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(gt=0)]
    vae_decode: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_CLOSED)
class MeasuredScenario:
    """One scenario on one side, with every sample that was taken of it."""

    name: Name
    side: Side
    what: str
    """What it does, as a person reads it in a table."""
    dtype: Name
    """Of the UNet: `bfloat16`, `float16`, `float32`, or a quantisation, `fp8`, `int8`."""
    requests: Annotated[tuple[RequestSample, ...], Field(min_length=1)]
    warmups: tuple[RequestSample, ...] = ()
    """Taken before the first round; never part of a figure."""
    images: Annotated[int, Field(ge=1)] = 1
    """Images a request, drawn in one batch."""
    steps: Annotated[int, Field(ge=2)] | None = None
    """Where they are not the workload's."""
    settings: dict[str, str] = Field(default_factory=dict)
    """What makes it this scenario: `compile`, `attention`, `quantize`, ..."""
    calibration: bool = False
    """Runs no code of ours, so that two files in which it differs are of two different states of
    the machine."""
    lossy: bool = False
    """Changes what is drawn by more than rounding."""
    prepare_seconds: NotNegative | None = None
    """Compilation and first run."""
    peak_memory_bytes: Annotated[int, Field(ge=0)] | None = None
    flops: Flops | None = None
    error_vs_fp32: NotNegative | None = None
    """Relative error of one UNet forward against float32 on the same inputs."""

    @property
    def step_ms(self) -> float:
        """Median over requests of their median steady step."""
        return statistics.median(request.step_ms for request in self.requests)

    @property
    def request_ms(self) -> float:
        """Median over requests of their end-to-end time."""
        return statistics.median(request.total_ms for request in self.requests)

    @property
    def images_per_second(self) -> float:
        """One request after the other."""
        return 1000 * self.images / self.request_ms

    def stage_ms(self, stage: str) -> float | None:
        """Median of one stage; None where no request had it."""
        values = [r.stages_ms[stage] for r in self.requests if stage in r.stages_ms]
        return statistics.median(values) if values else None

    def mfu(self, ceilings: Ceilings | None) -> float | None:
        """Model FLOPs utilisation of a step: nominal FLOPs over what the measured rate of matrix
        products in its dtype would have done in that time. None where either is not known."""
        rate = None if ceilings is None else ceilings.matmul_tflops.get(self.dtype)
        if rate is None or self.flops is None:
            return None
        return self.flops.step / (self.step_ms / 1000 * rate * 1e12)

    def cost_per_thousand_images(self, price_per_hour: float | None) -> float | None:
        """In the currency of the price; None without one."""
        if price_per_hour is None:
            return None
        return price_per_hour / 3600 * 1000 / self.images_per_second


@dataclass(frozen=True, config=_CLOSED)
class NotRun:
    """A scenario that was asked for and could not be measured here, and why."""

    name: Name
    reason: Name
    side: Side | None = None
    """None: neither side."""
    failed: bool = False
    """It was tried and failed. False: this machine lacks what it needs, or there was no time."""

    @property
    def why(self) -> str:
        """The reason, and whether it is a failure, for people."""
        return f"FAILED: {self.reason}" if self.failed else self.reason


# Where -------------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_CLOSED)
class Conditions:
    """The state of the machine at one moment; None is not known."""

    at_ns: int
    sm_clock_mhz: NotNegative | None = None
    memory_clock_mhz: NotNegative | None = None
    power_watts: NotNegative | None = None
    power_limit_watts: NotNegative | None = None
    temperature_celsius: float | None = None
    throttle_reasons: tuple[str, ...] = ()
    load_average: NotNegative | None = None
    """Of the host, over one minute."""


@dataclass(frozen=True, config=_CLOSED)
class Ceilings:
    """What the device reached in this session with nothing in its way, sustained."""

    matmul_tflops: dict[str, Duration]
    """A large matrix product, by dtype."""
    copy_gb_per_second: Duration
    """Device memory to device memory, bytes read plus bytes written."""


@dataclass(frozen=True, config=_CLOSED)
class Code:
    """What ran on one side."""

    side: Side
    commit: str | None
    """None: not in a git checkout."""
    dirty: bool
    """Files differed from the commit."""
    versions: dict[str, str]
    """Of `torch`, `diffusers` and whatever else decides the speed."""
    source: str | None = None
    """A digest of the measured packages' files, which also names code outside a git checkout."""


@dataclass(frozen=True, config=_CLOSED)
class Session:
    """One call of the bench; a resumed run has several."""

    first_round: Annotated[int, Field(ge=0)]
    rounds: Annotated[int, Field(ge=1)]
    start: Conditions
    end: Conditions | None = None
    """None: interrupted."""
    ceilings: Ceilings | None = None
    code: tuple[Code, ...] = ()
    """What ran, where that is not the file's `code`: the code was changed before a later call."""


@dataclass(frozen=True, config=_CLOSED)
class Environment:
    """The machine, which does not change between sessions; None is not known or not there."""

    device: Literal["cpu", "cuda"]
    cpu: Name
    cores: Annotated[int, Field(ge=1)]
    """That the process may use."""
    memory_bytes: Annotated[int, Field(ge=0)]
    platform: str
    python: Name
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None


@dataclass(frozen=True, config=_CLOSED)
class Workload:
    """What every request asked for."""

    model: Name
    shape: Annotated[str, Field(pattern=r"^\d+x\d+$")]
    """WIDTHxHEIGHT in pixels."""
    steps: Annotated[int, Field(ge=2)]
    """At least two: the first is not steady."""
    guidance: bool


# The whole ---------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_CLOSED)
class BenchResult:
    """Everything one run of the bench has to tell."""

    command: str
    """How to run it again, without paths of the machine."""
    workload: Workload
    environment: Environment
    code: Annotated[tuple[Code, ...], Field(min_length=1, max_length=2)]
    sessions: Annotated[tuple[Session, ...], Field(min_length=1)]
    scenarios: Annotated[tuple[MeasuredScenario, ...], Field(min_length=1)]
    """In the order of the stack: the baseline first, what ships last."""
    not_run: tuple[NotRun, ...] = ()
    partial: bool = False
    """Interrupted: what was measured until then is here."""
    price_per_hour: Duration | None = None
    """Of the machine, for the cost of images."""

    def __post_init__(self) -> None:
        sides = [code.side for code in self.code]
        if len(set(sides)) != len(sides):
            raise ValueError(f"code names the side {sides[0]} twice")
        rounds: set[int] = set()
        for session in self.sessions:
            numbers = range(session.first_round, session.first_round + session.rounds)
            if not rounds.isdisjoint(numbers):
                raise ValueError("two sessions share a round")
            rounds.update(numbers)
        seen: set[tuple[str, str]] = set()
        for scenario in self.scenarios:
            key = (scenario.name, scenario.side)
            if key in seen:
                raise ValueError(f"the scenario {scenario.name} is there twice")
            seen.add(key)
            if scenario.side not in sides:
                raise ValueError(f"the scenario {scenario.name} is of a side without code")
            for request in scenario.requests:
                if request.round not in rounds:
                    raise ValueError(
                        f"a request of {scenario.name} is of round {request.round}, which no "
                        f"session had"
                    )
                steps = scenario.steps or self.workload.steps
                if 1 + len(request.steps_ms) != steps:
                    raise ValueError(
                        f"a request of {scenario.name} has {1 + len(request.steps_ms)} steps "
                        f"instead of {steps}"
                    )

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(code.side for code in self.code)

    def of_side(self, side: Side) -> dict[str, MeasuredScenario]:
        """That side's scenarios by name, in the order of the stack."""
        return {s.name: s for s in self.scenarios if s.side == side}

    def code_of(self, side: Side) -> Code:
        return next(code for code in self.code if code.side == side)

    @property
    def ceilings(self) -> Ceilings | None:
        """The best of all sessions: a ceiling that was reached once was there all along."""
        measured = [s.ceilings for s in self.sessions if s.ceilings is not None]
        if not measured:
            return None
        rates: dict[str, float] = {}
        for ceilings in measured:
            for dtype, rate in ceilings.matmul_tflops.items():
                rates[dtype] = max(rate, rates.get(dtype, 0))
        return Ceilings(rates, max(ceilings.copy_gb_per_second for ceilings in measured))

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """The file's content, checked. Raises ResultFileError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ResultFileError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ResultFileError(f"{path} is not a text file") from error
        return cls.parse(text, name=str(path))

    @classmethod
    def parse(cls, text: str, *, name: str = "the result") -> Self:
        """A file's text as a result; `name` is what errors call it. Raises ResultFileError."""
        document = _load(text, name)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ResultFileError(f"{name} is not a result of this bench: its format is not named")
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ResultFileError(
                f"{name} has schema version {version!r}; this bench reads version {SCHEMA_VERSION}"
            )
        content = document.get("result")
        if not isinstance(content, dict):
            raise ResultFileError(f"{name} has no result in it")
        canonical = _canonical(content)
        if document.get("digest") != _digest(canonical):
            raise ResultFileError(
                f"{name} was changed after it was written: its content does not match its digest; "
                f"measure again"
            )
        scenarios = content.get("scenarios")
        for scenario in scenarios if isinstance(scenarios, list) else ():
            if isinstance(scenario, dict):
                scenario.pop("figures", None)
        try:
            return TypeAdapter(cls).validate_json(_canonical(content), strict=True)
        except ValidationError as error:
            raise ResultFileError(f"{name} is not valid: {_first_fault(error)}") from error

    def to_json(self) -> str:
        """The file's text, digest included."""
        content = TypeAdapter(type(self)).dump_python(self, mode="json")
        for scenario, written in zip(self.scenarios, content["scenarios"], strict=True):
            written["figures"] = self._figures(scenario)
        document = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "digest": _digest(_canonical(content)),
            "result": content,
        }
        return _laid_out(document)

    def write(self, path: Path | str) -> None:
        """Replace the file in one go: an interrupted write leaves the one before. Raises
        ResultFileError."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(self.to_json(), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise ResultFileError(f"{path} cannot be written: {error.strerror}") from error

    def _figures(self, scenario: MeasuredScenario) -> dict[str, float | None]:
        return {
            "step_ms": scenario.step_ms,
            "request_ms": scenario.request_ms,
            "images_per_second": scenario.images_per_second,
            "mfu": scenario.mfu(self.ceilings),
            "cost_per_thousand_images": scenario.cost_per_thousand_images(self.price_per_hour),
        }


# Text --------------------------------------------------------------------------------------------


def _laid_out(document: dict[str, Any]) -> str:
    """Indented, with each request on a line of its own."""
    lines: dict[str, str] = {}
    digest = document["digest"]  # in no text of the document but its own

    def line(request: Any) -> str:
        key = f"{digest} {len(lines)}"
        lines[f'"{key}"'] = json.dumps(request, allow_nan=False, ensure_ascii=False)
        return key

    for scenario in document["result"]["scenarios"]:
        for samples in ("requests", "warmups"):
            scenario[samples] = [line(request) for request in scenario[samples]]
    pretty = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    return re.sub(rf'"{digest} \d+"', lambda match: lines[match[0]], pretty) + "\n"


def _load(text: str, name: str) -> Any:
    def refuse(constant: str) -> None:
        raise ResultFileError(f"{name} holds {constant}, which is not a measurement")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ResultFileError(
            f"{name} is not complete JSON (line {error.lineno}, column {error.colno}): truncated, "
            f"or not a result of this bench"
        ) from error
    except RecursionError as error:
        raise ResultFileError(f"{name} is nested too deeply to be a result") from error


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _digest(canonical: str) -> str:
    return "sha256:" + hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"]) or "all of it"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{place} is missing"
    if fault["type"] == "unexpected_keyword_argument":
        return f"{place} is not a field of schema version {SCHEMA_VERSION}"
    return f"{place}: {fault['msg']}"
