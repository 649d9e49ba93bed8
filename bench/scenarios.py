"""What the bench can time, as data: the baseline that everyone knows, then one change at a time.

The first two run no code of this project's, so they also say whether two files were measured on a
machine in the same state. Each of the others is served by `serve`'s own runtime and names what
makes it differ: from the one before it in the stack of lossless changes, else from what it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.errors import BenchError

Way = Literal["documented", "diffusers", "served"]
"""Who runs a request: fal's documented example, a plain diffusers call, our runtime."""


@dataclass(frozen=True)
class Scenario:
    """One row. What it needs beyond a model is in its fields, so that whoever prepares it can say
    why it cannot run here."""

    name: str
    what: str
    way: Way = "served"
    dtype: str = "auto"
    """As SDXL_DTYPE; `half` is float16 on CUDA and float32 on a CPU."""
    compile: str = "off"
    """As SDXL_COMPILE, for the mode's own recipe."""
    recipe: Mapping[str, str | bool] | None = None
    """Fields of `compile.Recipe` that differ from doing nothing; None: the mode's recipe."""
    decoder: Mapping[str, str | bool] | None = None
    """The same for the VAE's decoder, where it differs from the UNet's."""
    attention: str = "auto"
    quantize: str = "none"
    images: int = 1
    """Images a request, in one run."""
    cuda_only: bool = False
    """Means nothing on a CPU."""
    lossy: bool = False
    prepare_seconds: tuple[float, float] = (10, 20)
    """To load, compile and warm it, at most, on one H100-class GPU at 1024x1024 and for the demo
    model on two CPU cores: what cannot fit into a time limit is not started. What compiles the same
    as a scenario before it finds that in the compiler's cache."""

    @property
    def calibration(self) -> bool:
        """Runs no code of ours."""
        return self.way != "served"

    @property
    def settings(self) -> dict[str, str]:
        """What makes it this scenario, for the result file."""
        told = {
            "way": self.way,
            "compile": self.compile,
            "attention": self.attention,
            "quantize": self.quantize,
            "images": str(self.images),
        }
        fields = {name: str(value).lower() for name, value in (self.recipe or {}).items()}
        told |= {f"recipe.{name}": value for name, value in fields.items()}
        fields = {name: str(value).lower() for name, value in (self.decoder or {}).items()}
        return told | {f"decoder.{name}": value for name, value in fields.items()}


# The stack of lossless changes, as fields of a recipe that starts as doing nothing. On CUDA the
# graph comes first: launched from Python, a step is bound by the host and hides what others buy.
_GRAPH: dict[str, str | bool] = {"replay": "captured"}
_LAST = _GRAPH | {"channels_last": True}
_FUSED = _LAST | {"fuse_qkv": True}
_TEXT = _FUSED | {"text_once": True}
_VAE = _TEXT | {"vae_attention": True}
_WHOLE = _VAE | {"scope": "whole"}


def _attention(name: str) -> Scenario:
    return Scenario(
        f"attention-{name}",
        f"vae-attention's, with {name} attention",
        recipe=_VAE,
        attention=name,
        cuda_only=name != "math",
    )


def _beside(name: str, what: str, **fields: str | bool) -> Scenario:
    """`compiled` with these fields of its recipe changed; its UNet and decoder compile anew."""
    return Scenario(name, f"compiled's, {what}", recipe=_WHOLE | fields, prepare_seconds=(100, 150))


def _batch(images: int) -> Scenario:
    return Scenario(
        f"batch-{images}",
        f"what ships, {images} images a run",
        compile="auto",
        images=images,
        prepare_seconds=(240, 20 + 8 * images),
    )


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "documented",
        "fal's documented example: fp16, eager, one diffusers call, PNG",
        way="documented",
        dtype="half",
    ),
    Scenario("diffusers", "a plain diffusers call, no upload", way="diffusers", dtype="half"),
    Scenario("served", "the same model through our runtime, nothing changed", dtype="half"),
    Scenario("bf16", "+ bfloat16", dtype="bfloat16"),
    Scenario("graph", "+ one captured CUDA graph", recipe=_GRAPH, cuda_only=True),
    Scenario("channels-last", "+ channels_last convolutions", recipe=_LAST),
    Scenario("fused-qkv", "+ fused QKV", recipe=_FUSED),
    Scenario("text-once", "+ the prompt's keys and values once a run", recipe=_TEXT),
    Scenario("vae-attention", "+ the VAE's attention in the model's type", recipe=_VAE),
    *(_attention(name) for name in ("cudnn", "flash", "xformers", "math")),
    Scenario(
        "vae-compiled",
        "vae-attention's, the VAE decoder alone compiled",
        recipe=_VAE,
        decoder=_WHOLE,
        prepare_seconds=(60, 60),
    ),
    Scenario(
        "regional",
        "+ compiled block by block",
        compile="regional",
        prepare_seconds=(90, 100),
    ),
    Scenario(
        "compiled",
        "+ compiled whole",
        compile="default",
        prepare_seconds=(240, 150),
    ),
    _beside("group-norm", "group norms along the channels", group_norm=True),
    _beside("upsample-phases", "upsampling before its image, by phases", upsample="phases"),
    _beside("upsample-transposed", "the same, by a transposed product", upsample="transposed"),
    _beside("zero-text", "no text attended to where it is zero", zero_text=True),
    _beside("time-once", "the step's embedding projected once a step", time_once=True),
    Scenario(
        "launched",
        "compiled whole, launched kernel by kernel",
        recipe=_WHOLE | {"replay": "none"},
        cuda_only=True,
        prepare_seconds=(120, 0),
    ),
    Scenario(
        "trees",
        "compiled whole, inductor's own graph trees",
        recipe=_WHOLE | {"replay": "trees"},
        cuda_only=True,
        prepare_seconds=(150, 0),
    ),
    Scenario(
        "max",
        "+ every product and kernel tuned",
        compile="max",
        cuda_only=True,
        prepare_seconds=(400, 0),
    ),
    Scenario(
        "int8",
        "lossy: int8 linears, otherwise as it ships",
        compile="auto",
        quantize="int8",
        lossy=True,
        prepare_seconds=(300, 40),
    ),
    Scenario(
        "fp8",
        "lossy: fp8 linears, otherwise as it ships",
        compile="auto",
        quantize="fp8",
        lossy=True,
        prepare_seconds=(300, 40),
    ),
    *(_batch(images) for images in (2, 4, 8)),
    Scenario("default", "what ships", compile="auto", prepare_seconds=(120, 20)),
)
"""In the order of the stack: the baseline first, what ships last."""

BASELINE = SCENARIOS[0]
_BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def chosen(names: Sequence[str] | None) -> list[Scenario]:
    """The scenarios of these names in the stack's order; all without a name.

    Raises:
        BenchError: there is none of that name.
    """
    if not names:
        return list(SCENARIOS)
    for name in names:
        if name not in _BY_NAME:
            allowed = ", ".join(_BY_NAME)
            raise BenchError(f"there is no scenario {name!r}; one of {allowed} is allowed")
    return [scenario for scenario in SCENARIOS if scenario.name in names]
