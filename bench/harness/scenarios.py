"""What the bench can time, as data: the baseline that everyone knows, then one change at a time.

The first two run no code of this project's, so they also say whether two files were measured on a
machine in the same state. Each of the others is served by `serve`'s own runtime and names what
makes it differ: from the one before it in the stack of lossless changes, else from what it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.errors import BenchError

Way = Literal["documented", "diffusers", "served"]
"""Who runs a request: fal's documented example, a plain diffusers call, our runtime."""

Fields = Mapping[str, str | bool | Mapping[str, str | bool | int]]
"""Of `recipes.Recipe`; the one that holds more than a word is inductor's `options`."""


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
    recipe: Fields | None = None
    """Fields of `recipes.Recipe` that differ from doing nothing; None: the mode's recipe."""
    decoder: Fields | None = None
    """The same for the VAE's decoder, where it differs from the UNet's."""
    attention: str = "auto"
    quantize: str = "none"
    images: int = 1
    """Images a request, in one run."""
    steps: int | None = None
    """Denoising steps a request, where they are no choice; None: as the run asks for."""
    cuda_only: bool = False
    """Means nothing on a CPU."""
    cpu_only: bool = False
    """Says nothing about a GPU."""
    lossy: bool = False
    prepare_seconds: tuple[float, float] = (10, 20)
    """To load, compile and warm the one kind of run that is timed, at most: on one H100-class GPU
    at 1024x1024, and for the demo model on two CPU cores. A scenario that would not be ready within
    a time limit is not started. Code that an earlier scenario compiled is found in the compiler's
    cache."""

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
        if self.steps is not None:
            told["steps"] = str(self.steps)
        return told | _told("recipe", self.recipe) | _told("decoder", self.decoder)


def _told(name: str, fields: Mapping[str, Any] | None) -> dict[str, str]:
    """Recipe fields by their full name, options one by one."""
    told: dict[str, str] = {}
    for field, value in (fields or {}).items():
        if isinstance(value, Mapping):
            told |= _told(f"{name}.{field}", value)
        else:
            told[f"{name}.{field}"] = str(value).lower()
    return told


# The stack of lossless changes, as fields of a recipe that starts as doing nothing. On CUDA the
# graph comes first: launched from Python, a step is bound by the host and hides what others buy.
_GRAPH: dict[str, str | bool | Mapping[str, str | bool | int]] = {"replay": "captured"}
_LAST = _GRAPH | {"channels_last": True}
_FUSED = _LAST | {"fuse_qkv": True}
_TEXT = _FUSED | {"text_once": True}
_VAE = _TEXT | {"vae_attention": True}
_WHOLE = _VAE | {"scope": "whole"}

KERNELS = ("layer_norm", "residual_products", "self_attention", "cross_attention", "geglu")
"""Fields of a recipe that do nothing where `kernels_warmup.triton` cannot run."""

# Ways that no GPU has measured yet, each by itself on what `compiled` does, and all at once.
_UNMEASURED: dict[str, Any] = {
    "group_norm": True,
    # By phases a decode alone is 8% further from float32 than eager bfloat16 (notes.md).
    "upsample": "transposed",
    "zero_text": True,
    "time_once": True,
    "text_encoders": True,
    **dict.fromkeys(KERNELS, True),
}
_ALL = _WHOLE | _UNMEASURED


def _attention(name: str) -> Scenario:
    return Scenario(
        f"attention-{name}",
        f"vae-attention's, with {name} attention",
        recipe=_VAE,
        attention=name,
        cuda_only=name != "math",
    )


def _beside(name: str, what: str, *, cuda_only: bool = False, **fields: Any) -> Scenario:
    """`compiled` with these fields of its recipe changed; its UNet and decoder compile anew."""
    return Scenario(
        name,
        f"compiled's, {what}",
        recipe=_WHOLE | fields,
        cuda_only=cuda_only,
        prepare_seconds=(100, 150),
    )


def _all_but(field: str) -> Scenario:
    """`all-lossless` without one of its ways, so that a bad one cannot hide the others."""
    left_out = {field} | ({"residual_products"} if field == "layer_norm" else set())
    recipe = {name: value for name, value in _ALL.items() if name not in left_out}
    name = field.replace("_", "-")
    return Scenario(
        f"all-but-{name}",
        f"all-lossless's, without {name}",
        recipe=recipe,
        cuda_only=field in (*KERNELS, "text_encoders"),
        prepare_seconds=(100, 150),
    )


def _inductor(
    name: str, what: str, options: Mapping[str, str | bool | int], prepare_seconds: float = 100
) -> Scenario:
    """`compiled` with options of inductor's own, which the compiler is given on CUDA only."""
    scenario = _beside(name, what, cuda_only=True, options=options)
    return replace(scenario, prepare_seconds=(prepare_seconds, 0))


def _batch(
    images: int, *, quantize: str = "none", recipe: Fields | None = None, steps: int | None = None
) -> Scenario:
    """Several images a run, as it ships or by a recipe; `steps` where it is the offline case."""
    kind = f"batch-{images}" if steps is None else "offline"
    lossy = quantize != "none"
    what = f"{images} images a run" + ("" if steps is None else f" of {steps} steps")
    whose = "what ships" if recipe is None else "all-lossless's"
    return Scenario(
        "-".join([*(["all"] if recipe else []), *([quantize] if lossy else []), kind]),
        f"lossy: {quantize} linears, otherwise {whose}, {what}" if lossy else f"{whose}, {what}",
        compile="auto" if recipe is None else "off",
        recipe=recipe,
        quantize=quantize,
        images=images,
        steps=steps,
        lossy=lossy,
        prepare_seconds=(160, (20 if recipe is None else 150) + 8 * images),
    )


def _fp8(name: str, what: str, **fields: bool) -> Scenario:
    """fp8 beside every lossless way, with these fields of the recipe changed."""
    return Scenario(
        name,
        f"lossy: {what}",
        recipe=_ALL | fields,
        quantize="fp8",
        cuda_only=True,
        lossy=True,
        prepare_seconds=(150, 0),
    )


OFFLINE_STEPS = 20
"""As MLPerf's offline case asks, which counts images a second and no latency."""


def _kernel(field: str, what: str) -> Scenario:
    what += " by a kernel of our own"
    return _beside(field.replace("_", "-"), what, cuda_only=True, **{field: True})


def _uncompiled(name: str, what: str, **fields: Any) -> Scenario:
    """`served` on a CPU with these rewrites of the model and nothing compiled."""
    return Scenario(
        f"uncompiled-{name}",
        f"served's, {what}",
        dtype="half",
        recipe=fields,
        cpu_only=True,
        prepare_seconds=(0, 20),
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
    # What a CPU's `default` was chosen from.
    _uncompiled("text-once", "the prompt's keys and values once a run", text_once=True),
    _uncompiled("zero-text", "the same, zero text left out", text_once=True, zero_text=True),
    _uncompiled("channels-last", "channels_last convolutions", channels_last=True),
    _uncompiled("fused-qkv", "fused QKV", fuse_qkv=True),
    _uncompiled("time-once", "the step's embedding projected once a step", time_once=True),
    _uncompiled("group-norm", "group norms along the channels", group_norm=True),
    _uncompiled("upsample-transposed", "upsampling by a product", upsample="transposed"),
    _uncompiled("vae-attention", "the VAE's attention as two products", vae_attention=True),
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
        prepare_seconds=(110, 150),
    ),
    _inductor(
        "pdl",
        "each kernel's start overlapped with the end of the one before it",
        {"triton.enable_pdl": True},
    ),
    # By what is expected of them, bench/results/notes.md.
    _beside("group-norm", "group norms along the channels", group_norm=True),
    _kernel("layer_norm", "the blocks' sums and norms"),
    _beside(
        "residual-products",
        "the blocks' sums by the products before them, norms by a kernel of our own",
        cuda_only=True,
        layer_norm=True,
        residual_products=True,
    ),
    _beside("zero-text", "no text attended to where it is zero", zero_text=True),
    _inductor(
        "multi-kernel",
        "reductions of up to 16,384 read once or in a loop, by timing",
        {"triton.multi_kernel": 1},
    ),
    _kernel("self_attention", "self-attention over 1,024 tokens"),
    _kernel("geglu", "the feed-forwards' gated products"),
    _kernel("cross_attention", "attention to the text"),
    _beside(
        "upsample-transposed",
        "upsampling before its image, by a transposed product",
        upsample="transposed",
    ),
    _beside("text-encoders", "captured text encoders", cuda_only=True, text_encoders=True),
    replace(
        _beside("upsample-phases", "lossy: the same, by phases", upsample="phases"), lossy=True
    ),
    _beside("time-once", "the step's embedding projected once a step", time_once=True),
    _inductor(
        "tuned-kernels", "generated kernels' launches tuned", {"max_autotune_pointwise": True}, 200
    ),
    _beside("all-lossless", "every lossless way that is not measured yet", **_UNMEASURED),
    *(_all_but(field) for field in _UNMEASURED),
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
    _inductor(
        "tuned-products",
        "every product tuned",
        {
            "max_autotune_gemm": True,
            "max_autotune_gemm_backends": "ATEN,TRITON",
            "triton.enable_persistent_tma_matmul": True,
            "max_autotune_conv_backends": "ATEN",
        },
        400,
    ),
    Scenario(
        "max",
        "all-lossless's, every product and kernel tuned",
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
        "lossy: the large linears in fp8, scaled by row, otherwise as it ships",
        compile="auto",
        quantize="fp8",
        lossy=True,
        prepare_seconds=(150, 40),
    ),
    _fp8("all-fp8", "the same, otherwise all-lossless's"),
    _fp8("fp8-fused", "all-fp8's, norms written as fp8 by our own kernel", fp8_norms=True),
    _fp8(
        "fp8-static",
        "fp8-fused's, one calibrated scale for a product's activations",
        fp8_norms=True,
        fp8_static=True,
    ),
    *(_batch(images) for images in (2, 4, 8)),
    _batch(8, quantize="fp8"),
    _batch(8, recipe=_ALL),
    _batch(8, quantize="fp8", recipe=_ALL),
    _batch(8, steps=OFFLINE_STEPS),
    _batch(8, steps=OFFLINE_STEPS, quantize="fp8"),
    _batch(8, steps=OFFLINE_STEPS, recipe=_ALL),
    _batch(8, steps=OFFLINE_STEPS, quantize="fp8", recipe=_ALL),
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
