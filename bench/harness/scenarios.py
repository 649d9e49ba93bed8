"""The scenarios that the bench can time, as data: a known baseline, then one change at a time.

The first two run no code of this project. They show whether two files were measured on a machine in
the same state. All others run in the service's own runtime. A description that begins with "+"
names the change from the scenario before; any other names the scenario that it differs from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.errors import BenchError

Way = Literal["documented", "diffusers", "served"]
"""What runs a request: fal's documented example, a plain diffusers call, the service's runtime."""

Fields = Mapping[str, str | bool | Mapping[str, str | bool | int]]
"""Fields of `recipes.Recipe`. `options`, which go to inductor, are a mapping themselves."""


@dataclass(frozen=True)
class Scenario:
    """One scenario. Its fields name what it needs, so that the bench can say why it cannot run."""

    name: str
    what: str
    """A description for people."""
    way: Way = "served"
    dtype: str = "auto"
    """As SDXL_DTYPE; `half` is float16 on CUDA and float32 on a CPU."""
    compile: str = "off"
    """As SDXL_COMPILE; the mode's own recipe is used unless `recipe` is set."""
    recipe: Fields | None = None
    """Fields of `recipes.Recipe` to turn on; None: the mode's own recipe."""
    decoder: Fields | None = None
    """Another recipe for the VAE's decoder; None: the same as for the UNet."""
    attention: str = "auto"
    quantize: str = "none"
    images: int = 1
    """Images in one run."""
    one_request: bool = False
    """Its images belong to one request; else each to a request of its own."""
    steps: int | None = None
    """Denoising steps a request; None: as many as the run's `--steps`."""
    cuda_only: bool = False
    cpu_only: bool = False
    lossy: bool = False
    """Changes the image by more than rounding."""
    prepare_seconds: tuple[float, float] = (10, 20)
    """The longest time to load, compile and warm it: on one H100-class GPU at 1024x1024, and for
    the demo model on two CPU cores. It is not started if a time limit is nearer than this. Code
    that an earlier scenario compiled is in the compiler's cache."""

    @property
    def calibration(self) -> bool:
        """Whether it runs no code of this project."""
        return self.way != "served"

    @property
    def settings(self) -> dict[str, str]:
        """The fields that define it, as text, for the result file."""
        settings = {
            "way": self.way,
            "compile": self.compile,
            "attention": self.attention,
            "quantize": self.quantize,
            "images": str(self.images),
        }
        if self.one_request:
            settings["one_request"] = "true"
        if self.steps is not None:
            settings["steps"] = str(self.steps)
        return settings | _flat("recipe", self.recipe) | _flat("decoder", self.decoder)


def _flat(name: str, fields: Mapping[str, Any] | None) -> dict[str, str]:
    """Recipe fields as text by their full name, each option by itself."""
    flat: dict[str, str] = {}
    for field, value in (fields or {}).items():
        if isinstance(value, Mapping):
            flat |= _flat(f"{name}.{field}", value)
        else:
            flat[f"{name}.{field}"] = str(value).lower()
    return flat


# Lossless changes one after the other, as fields of a recipe. On CUDA the graph comes first: a step
# that Python launches is limited by the host, which would hide the effect of the other changes.
_GRAPH: dict[str, str | bool | Mapping[str, str | bool | int]] = {"replay": "captured"}
_LAST = _GRAPH | {"channels_last": True}
_FUSED = _LAST | {"fuse_qkv": True}
_TEXT = _FUSED | {"text_once": True}
_VAE = _TEXT | {"vae_attention": True}
_WHOLE = _VAE | {"scope": "whole"}

KERNELS = ("layer_norm", "residual_products", "self_attention", "cross_attention", "geglu")
"""Fields of a recipe that need `kernels_warmup.triton`."""

# Rewrites that no GPU has measured yet: each by itself together with `compiled`, and all at once.
_UNMEASURED: dict[str, Any] = {
    "group_norm": True,
    # Not by phases: a decode is then 8% further from float32 than eager bfloat16
    # (results/notes.md).
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
        f"vae-attention, with {name} attention",
        recipe=_VAE,
        attention=name,
        cuda_only=name != "math",
    )


def _compiled_with(name: str, what: str, *, cuda_only: bool = False, **fields: Any) -> Scenario:
    """`compiled` with these fields of its recipe changed; the UNet and decoder compile again."""
    return Scenario(
        name,
        f"compiled, with {what}",
        recipe=_WHOLE | fields,
        cuda_only=cuda_only,
        prepare_seconds=(100, 150),
    )


def _all_but(field: str) -> Scenario:
    """`all-lossless` without one rewrite, so that a slow one cannot hide the others."""
    left_out = {field} | ({"residual_products"} if field == "layer_norm" else set())
    recipe = {name: value for name, value in _ALL.items() if name not in left_out}
    name = field.replace("_", "-")
    return Scenario(
        f"all-but-{name}",
        f"all-lossless, without {name}",
        recipe=recipe,
        cuda_only=field in (*KERNELS, "text_encoders"),
        prepare_seconds=(100, 150),
    )


def _inductor(
    name: str, what: str, options: Mapping[str, str | bool | int], prepare_seconds: float = 100
) -> Scenario:
    """`compiled` with options for inductor, which are used on CUDA only."""
    scenario = _compiled_with(name, what, cuda_only=True, options=options)
    return replace(scenario, prepare_seconds=(prepare_seconds, 0))


def _batch(
    images: int, *, quantize: str = "none", recipe: Fields | None = None, steps: int | None = None
) -> Scenario:
    """Several images a run, by the default or by a recipe; with `steps`, the offline case."""
    kind = f"batch-{images}" if steps is None else "offline"
    lossy = quantize != "none"
    what = f"{images} images a run" + ("" if steps is None else f" of {steps} steps")
    base = "default" if recipe is None else "all-lossless"
    return Scenario(
        "-".join([*(["all"] if recipe else []), *([quantize] if lossy else []), kind]),
        f"lossy: {base}, with {quantize} linears, {what}" if lossy else f"{base}, with {what}",
        compile="auto" if recipe is None else "off",
        recipe=recipe,
        quantize=quantize,
        images=images,
        steps=steps,
        lossy=lossy,
        prepare_seconds=(160, (20 if recipe is None else 150) + 8 * images),
    )


def _fp8(name: str, what: str, **fields: bool) -> Scenario:
    """fp8 and every lossless rewrite, with these fields of the recipe changed."""
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
"""As in MLPerf's offline case, which counts images a second and no latency."""


def _kernel(field: str, what: str) -> Scenario:
    what += " by our own kernel"
    return _compiled_with(field.replace("_", "-"), what, cuda_only=True, **{field: True})


def _uncompiled(name: str, what: str, **fields: Any) -> Scenario:
    """`served` on a CPU with these rewrites of the model, and nothing compiled."""
    return Scenario(
        f"uncompiled-{name}",
        f"served, with {what}",
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
    Scenario("served", "the same model in the service's runtime, nothing changed", dtype="half"),
    Scenario("bf16", "+ bfloat16", dtype="bfloat16"),
    Scenario("graph", "+ one captured CUDA graph", recipe=_GRAPH, cuda_only=True),
    Scenario("channels-last", "+ channels_last convolutions", recipe=_LAST),
    Scenario("fused-qkv", "+ fused QKV", recipe=_FUSED),
    Scenario("text-once", "+ the prompt's keys and values computed once a run", recipe=_TEXT),
    Scenario("vae-attention", "+ the VAE's attention in the model's dtype", recipe=_VAE),
    # The candidates that a CPU's `default` was chosen from.
    _uncompiled("text-once", "the prompt's keys and values computed once a run", text_once=True),
    _uncompiled(
        "zero-text",
        "the same, and no attention to text that is zero",
        text_once=True,
        zero_text=True,
    ),
    _uncompiled("channels-last", "channels_last convolutions", channels_last=True),
    _uncompiled("fused-qkv", "fused QKV", fuse_qkv=True),
    _uncompiled("time-once", "the step's embedding projected once a step", time_once=True),
    _uncompiled("group-norm", "group norms along the channels", group_norm=True),
    _uncompiled("upsample-transposed", "upsampling by a product", upsample="transposed"),
    _uncompiled("vae-attention", "the VAE's attention as two products", vae_attention=True),
    *(_attention(name) for name in ("cudnn", "flash", "xformers", "math")),
    Scenario(
        "vae-compiled",
        "vae-attention, with only the VAE decoder compiled",
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
    # Ordered by their expected effect (bench/results/notes.md).
    _compiled_with("group-norm", "group norms along the channels", group_norm=True),
    _kernel("layer_norm", "the blocks' sums and norms"),
    _compiled_with(
        "residual-products",
        "the blocks' sums in the products before them, norms by our own kernel",
        cuda_only=True,
        layer_norm=True,
        residual_products=True,
    ),
    _compiled_with("zero-text", "no attention to text that is zero", zero_text=True),
    _inductor(
        "multi-kernel",
        "reductions of up to 16,384 values read once or in a loop, chosen by timing",
        {"triton.multi_kernel": 1},
    ),
    _kernel("self_attention", "self-attention over 1,024 tokens"),
    _kernel("geglu", "the feed-forwards' gated products"),
    _kernel("cross_attention", "attention to the text"),
    _compiled_with(
        "upsample-transposed",
        "upsampling by a transposed product",
        upsample="transposed",
    ),
    _compiled_with("text-encoders", "captured text encoders", cuda_only=True, text_encoders=True),
    replace(
        _compiled_with("upsample-phases", "upsampling by phases (lossy)", upsample="phases"),
        lossy=True,
    ),
    _compiled_with("time-once", "the step's embedding projected once a step", time_once=True),
    _inductor(
        "tuned-kernels",
        "tuned launches of generated kernels",
        {"max_autotune_pointwise": True},
        200,
    ),
    _compiled_with(
        "all-lossless", "every lossless rewrite that no GPU has measured yet", **_UNMEASURED
    ),
    *(_all_but(field) for field in _UNMEASURED),
    Scenario(
        "launched",
        "compiled, launched kernel by kernel without a CUDA graph",
        recipe=_WHOLE | {"replay": "none"},
        cuda_only=True,
        prepare_seconds=(120, 0),
    ),
    Scenario(
        "trees",
        "compiled, with inductor's own CUDA graph trees",
        recipe=_WHOLE | {"replay": "trees"},
        cuda_only=True,
        prepare_seconds=(150, 0),
    ),
    _inductor(
        "tuned-products",
        "every matrix product tuned",
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
        "all-lossless, with every product and kernel tuned",
        compile="max",
        cuda_only=True,
        prepare_seconds=(400, 0),
    ),
    Scenario(
        "int8",
        "lossy: default, with int8 linears",
        compile="auto",
        quantize="int8",
        lossy=True,
        prepare_seconds=(300, 40),
    ),
    Scenario(
        "fp8",
        "lossy: default, with large linears in fp8, scaled by row",
        compile="auto",
        quantize="fp8",
        lossy=True,
        prepare_seconds=(150, 40),
    ),
    _fp8("all-fp8", "all-lossless, with large linears in fp8, scaled by row"),
    _fp8("fp8-fused", "all-fp8, with norms written as fp8 by our own kernel", fp8_norms=True),
    _fp8(
        "fp8-static",
        "fp8-fused, with one calibrated scale for a product's activations",
        fp8_norms=True,
        fp8_static=True,
    ),
    *(_batch(images) for images in (2, 4, 8)),  # `default` draws one
    replace(
        _batch(4),
        name="num-images-4",
        what="default, with 4 images a request, in one run",
        one_request=True,
    ),
    _batch(8, quantize="fp8"),
    _batch(8, recipe=_ALL),
    _batch(8, quantize="fp8", recipe=_ALL),
    _batch(8, steps=OFFLINE_STEPS),
    _batch(8, steps=OFFLINE_STEPS, quantize="fp8"),
    _batch(8, steps=OFFLINE_STEPS, recipe=_ALL),
    _batch(8, steps=OFFLINE_STEPS, quantize="fp8", recipe=_ALL),
    Scenario("default", "the service's default", compile="auto", prepare_seconds=(120, 20)),
)
"""The baseline first, the default last."""

BASELINE = SCENARIOS[0]
_BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def chosen(names: Sequence[str] | None) -> list[Scenario]:
    """The scenarios of these names, in the order of SCENARIOS; all of them without a name.

    Raises:
        BenchError: a name is unknown.
    """
    if not names:
        return list(SCENARIOS)
    for name in names:
        if name not in _BY_NAME:
            allowed = ", ".join(_BY_NAME)
            raise BenchError(f"there is no scenario {name!r}; use one of {allowed}")
    return [scenario for scenario in SCENARIOS if scenario.name in names]
