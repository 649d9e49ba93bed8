"""The result file of the bench: every sample, and where it was measured, as one JSON document.

A file holds no derived figures: its readers compute medians, ratios and utilisation from the
samples. The exception is the block `figures` of each scenario, for people and `jq`, which is
ignored when the file is read. A digest over the content shows whether a file was edited by hand.

    {"format": "stepspan-bench", "schema_version": 1, "digest": "sha256:...", "result": {...}}

Durations are in milliseconds, times in Unix nanoseconds. Nothing here measures or judges.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bench.errors import ResultFileError

FORMAT = "stepspan-bench"
SCHEMA_VERSION = 1

Side = Literal["base", "head"]
"""The commit that a sample belongs to. A run of one commit has only the side `head`."""


_CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)

Duration = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]


# Samples -----------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_CLOSED)
class RequestSample:
    """The measurements of one request."""

    round: Annotated[int, Field(ge=0)]
    """The pass over the scenarios, numbered through the file and across resumed runs. Samples of
    one round were taken one after the other, so its scenarios and sides are interleaved."""
    started_ns: Annotated[int, Field(ge=0)]
    total_ms: Duration
    """End to end, as the caller sees it."""
    first_step_ms: Duration
    """Step 0, which also fills the launch queue and the text buffers."""
    steps_ms: Annotated[tuple[Duration, ...], Field(min_length=1)]
    """Steps 1 and up, which are steady."""
    gpu_queue_ms: tuple[NotNegative, ...] = Field(
        default=(), validation_alias=AliasChoices("gpu_queue_ms", "leads_ms")
    )
    """How long each step, step 0 included, waited in the GPU's queue; empty if the clock is the
    host's. Files up to 2026-11-25 call it `leads_ms`."""
    stages_ms: dict[str, NotNegative] = Field(default_factory=dict)
    """By stage: `queue`, `text_encode`, `denoise`, `vae_decode`, `image_encode`, ..."""
    cpu_ms: NotNegative | None = None
    """CPU time of the process, in all threads."""

    def __post_init__(self) -> None:
        if self.gpu_queue_ms and len(self.gpu_queue_ms) != 1 + len(self.steps_ms):
            raise ValueError(
                f"gpu_queue_ms has {len(self.gpu_queue_ms)} values "
                f"for {1 + len(self.steps_ms)} steps"
            )

    @property
    def step_ms(self) -> float:
        """The median of its steady steps, which is its one figure in a verdict."""
        return statistics.median(self.steps_ms)


@dataclass(frozen=True, config=_CLOSED)
class Flops:
    """Nominal floating-point operations of one run, for all of its images."""

    text_encode: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(gt=0)]
    vae_decode: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_CLOSED)
class MeasuredScenario:
    """One scenario on one side, with every sample of it."""

    name: Name
    side: Side
    what: str
    """A description for people."""
    dtype: Name
    """Of the UNet: `bfloat16`, `float16`, `float32`, or a quantization, `fp8`, `int8`."""
    requests: Annotated[tuple[RequestSample, ...], Field(min_length=1)]
    warmups: tuple[RequestSample, ...] = ()
    """Measured before the first round; never part of a figure."""
    images: Annotated[int, Field(ge=1)] = 1
    """Images a request, drawn in one batch."""
    steps: Annotated[int, Field(ge=2)] | None = None
    """If they differ from the workload's."""
    settings: dict[str, str] = Field(default_factory=dict)
    """The settings that define it: `compile`, `attention`, `quantize`, ..."""
    calibration: bool = False
    """Runs no code of this project. If it differs between two files, the machine was in two
    different states."""
    lossy: bool = False
    """Changes the image by more than rounding."""
    prepare_seconds: NotNegative | None = None
    """Compilation and first run."""
    peak_memory_bytes: Annotated[int, Field(ge=0)] | None = None
    flops: Flops | None = None
    error_vs_fp32: NotNegative | None = None
    """Relative error of one UNet forward pass against float32 on the same inputs."""

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
        """Images a second with one request at a time."""
        return 1000 * self.images / self.request_ms

    def stage_ms(self, stage: str) -> float | None:
        """Median of one stage; None if no request had it."""
        values = [r.stages_ms[stage] for r in self.requests if stage in r.stages_ms]
        return statistics.median(values) if values else None

    def mfu(self, ceilings: Ceilings | None) -> float | None:
        """Model FLOPs utilisation of a step: its nominal FLOPs over the FLOPs that matrix products
        in its dtype do in that time. None if either is unknown."""
        rate = None if ceilings is None else ceilings.matmul_tflops.get(self.dtype)
        if rate is None or self.flops is None:
            return None
        return self.flops.step / (self.step_ms / 1000 * rate * 1e12)

    def cost_per_thousand_images(self, price_per_hour: float | None) -> float | None:
        """In the currency of the price; None without a price."""
        if price_per_hour is None:
            return None
        return price_per_hour / 3600 * 1000 / self.images_per_second


@dataclass(frozen=True, config=_CLOSED)
class NotRun:
    """A scenario that was selected but could not be measured, and why."""

    name: Name
    reason: Name
    side: Side | None = None
    """None: all sides."""
    failed: bool = False
    """Whether it was tried and failed. If not, the machine lacks what it needs, or time was up."""

    @property
    def why(self) -> str:
        """The reason for people, marked if it is a failure."""
        return f"FAILED: {self.reason}" if self.failed else self.reason


# Where -------------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_CLOSED)
class Conditions:
    """The state of the machine at one time; None is unknown."""

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
    """The sustained rates that the device reached in this session."""

    matmul_tflops: dict[str, Duration]
    """Of a large matrix product, by dtype."""
    copy_gb_per_second: Duration
    """Of a copy within device memory; bytes read plus bytes written."""


@dataclass(frozen=True, config=_CLOSED)
class Code:
    """The code of one side."""

    side: Side
    commit: str | None
    """None: not a git checkout."""
    dirty: bool
    """Whether files differed from the commit."""
    versions: dict[str, str]
    """Of `torch`, `diffusers` and other libraries that decide the speed."""
    source: str | None = None
    """A digest of the measured packages' files, to identify code outside a git checkout."""

    @property
    def revision(self) -> str:
        """The commit for people, marked if files differed from it."""
        commit = (self.commit or "no commit")[:12]
        return f"{commit} with changes" if self.dirty else commit


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
    """The code of this session, if it differs from the file's `code`."""

    def has(self, number: int) -> bool:
        """Whether the round of this number was in this session."""
        return self.first_round <= number < self.first_round + self.rounds


@dataclass(frozen=True, config=_CLOSED)
class Environment:
    """The machine, which is the same in all sessions; None is unknown or absent."""

    device: Literal["cpu", "cuda"]
    cpu: Name
    cores: Annotated[int, Field(ge=1)]
    """Cores that the process may use."""
    memory_bytes: Annotated[int, Field(ge=0)]
    platform: str
    python: Name
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None


@dataclass(frozen=True, config=_CLOSED)
class Workload:
    """The model and the parameters of every request."""

    model: Name
    shape: Annotated[str, Field(pattern=r"^\d+x\d+$")]
    """WIDTHxHEIGHT in pixels."""
    steps: Annotated[int, Field(ge=2)]
    """At least two, because the first is not steady."""
    guidance: bool


# The whole ---------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_CLOSED)
class BenchResult:
    """The content of a result file."""

    command: str
    """The command that repeats the run, without paths of the machine."""
    workload: Workload
    environment: Environment
    code: Annotated[tuple[Code, ...], Field(min_length=1, max_length=2)]
    sessions: Annotated[tuple[Session, ...], Field(min_length=1)]
    scenarios: Annotated[tuple[MeasuredScenario, ...], Field(min_length=1)]
    """In the order of SCENARIOS: the baseline first, the default last."""
    not_run: tuple[NotRun, ...] = ()
    partial: bool = False
    """Whether the run was interrupted; the file holds its samples up to then."""
    price_per_hour: Duration | None = None
    """The price of the machine, for the cost of images."""

    def __post_init__(self) -> None:
        sides = [code.side for code in self.code]
        if len(set(sides)) != len(sides):
            raise ValueError(f"code names the side {sides[0]} twice")
        # Compared by their ends: a damaged file may have a session of 10^12 rounds.
        rounds = sorted(
            (session.first_round, session.first_round + session.rounds) for session in self.sessions
        )
        if any(end > start for (_, end), (start, _) in pairwise(rounds)):
            raise ValueError("two sessions share a round")
        seen: set[tuple[str, str]] = set()
        for scenario in self.scenarios:
            key = (scenario.name, scenario.side)
            if key in seen:
                raise ValueError(f"the scenario {scenario.name} is there twice")
            seen.add(key)
            if scenario.side not in sides:
                raise ValueError(f"the scenario {scenario.name} is of a side without code")
            for request in scenario.requests:
                if not any(session.has(request.round) for session in self.sessions):
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
        """The scenarios of a side by name, in the file's order."""
        return {s.name: s for s in self.scenarios if s.side == side}

    def code_in(self, session: Session) -> tuple[Code, ...]:
        """The code of each side in a session."""
        return session.code or self.code

    @property
    def ceilings(self) -> Ceilings | None:
        """The best of all sessions."""
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
        """Read and validate a file. Raises ResultFileError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ResultFileError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ResultFileError(f"{path} is not a text file") from error
        return cls.parse(text, name=str(path))

    @classmethod
    def parse(cls, text: str, *, name: str = "the result") -> Self:
        """Parse and validate a file's text; errors call it `name`. Raises ResultFileError."""
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
        """The file's text, with its digest."""
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
        """Replace the file at once, so that an interrupted write leaves the old one.

        Raises:
            ResultFileError: the file cannot be written.
        """
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
    """Indented JSON, with each request on a line of its own."""
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
