"""What each compile mode does, as data. Imports no torch, so that any module may read it.

A mode (`SDXL_COMPILE`) is a name for a `Recipe`. A recipe says what is compiled, how launches are
saved, and which ways of computing the model faster are on. `WAYS` describes those ways and says for
each whether a GPU has measured it: a measured one is on in `default`, one that is not yet measured
is on in `max` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast, get_args

if TYPE_CHECKING:
    import torch

    from kernels_warmup.rewrites.upsampling import Upsampling

Mode = Literal["off", "rewritten", "regional", "default", "max"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Recipe:
    """Everything one mode does. The fields from `channels_last` on are ways, see `WAYS`."""

    scope: Literal["none", "blocks", "whole"] = "whole"
    """What is compiled: nothing, each repeated block by itself, or the whole UNet and decoder."""
    replay: Literal["none", "captured", "trees"] = "captured"
    """How kernel launches are saved on CUDA: not at all, by one captured CUDA graph per shape, or
    by inductor's graph trees."""
    options: Mapping[str, bool | int | str] = field(default_factory=dict)
    """Inductor's options; used on CUDA only."""
    channels_last: bool = True
    fuse_qkv: bool = True
    text_once: bool = True
    vae_attention: bool = True
    group_norm: bool = False
    upsample: Upsampling = "nearest"
    zero_text: bool = False
    time_once: bool = False
    layer_norm: bool = False
    self_attention: bool = False
    cross_attention: bool = False
    residual_products: bool = False
    geglu: bool = False
    text_encoders: bool = False
    fp8_norms: bool = False
    fp8_static: bool = False

    @property
    def has_graphs(self) -> bool:
        """Whether it makes graphs, compiled or captured, each for one input shape."""
        return self.scope != "none" or self.replay != "none"


@dataclass(frozen=True)
class Way:
    """One field of a recipe that makes the model faster.

    Attributes:
        what: what it changes, in one sentence.
        measured: the GPU and the day of its measurement (bench/results/notes.md), by itself or as
            a part of the mode `default`; None while no GPU has measured it.
        on: the field's value that turns it on.
        fp8_only: it changes nothing unless the UNet is quantised to fp8, which is lossy.
        triton: it is a Triton kernel: it needs a Hopper GPU and a 16-bit model, and elsewhere the
            model keeps its own operators.
    """

    what: str
    measured: str | None = None
    on: bool | str = True
    fp8_only: bool = False
    triton: bool = False


_FIRST_STACK = "H200, 2026-11-22"

WAYS: dict[str, Way] = {
    "channels_last": Way(
        "Keeps convolution weights in the memory order that the tensor cores' kernels read.",
        measured=_FIRST_STACK,
    ),
    "fuse_qkv": Way(
        "Computes the query, key and value of self-attention by one product.",
        measured=_FIRST_STACK,
    ),
    "text_once": Way(
        "Computes the prompt's keys, values and added condition once a run, not once a step.",
        measured=_FIRST_STACK,
    ),
    "vae_attention": Way(
        "Computes the VAE's one wide attention head in the model's own type.",
        measured=_FIRST_STACK,
    ),
    "group_norm": Way(
        "Computes the group norms of UNet and decoder by reductions along the channels.",
    ),
    "upsample": Way(
        "Convolves before upsampling instead of after it, in the UNet and the decoder.",
        on="transposed",
    ),
    "zero_text": Way(
        "Adds a second UNet function for runs without a negative prompt, whose unconditional half "
        "skips the attention to the text; needs text_once.",
    ),
    "time_once": Way("Projects the step's embedding for all residual blocks by one product."),
    "layer_norm": Way(
        "Computes each residual sum of a transformer block and the norm after it in one kernel.",
        triton=True,
    ),
    "residual_products": Way(
        "Adds the residual sums of the transformer blocks inside the products before them; needs "
        "layer_norm and no compiling by block, and leaves a quantised UNet as it is.",
        triton=True,
    ),
    "self_attention": Way(
        "Computes self-attention over few tokens by a kernel that fills the GPU: at 1024x1024 "
        "those are the layers of 1,024 tokens.",
        triton=True,
    ),
    "cross_attention": Way(
        "Computes the attention to the 77 text tokens by a kernel that holds all keys at once.",
        triton=True,
    ),
    "geglu": Way(
        "Computes the first product of a feed-forward and its gating in one kernel; leaves a "
        "quantised UNet as it is.",
        triton=True,
    ),
    "text_encoders": Way(
        "Captures both text encoders as CUDA graphs, whatever `replay` is: their 44 layers of "
        "small kernels keep the host busier than the GPU.",
    ),
    "fp8_norms": Way(
        "Lets the kernel of layer_norm write fp8 and its scales where an fp8 product reads them; "
        "needs layer_norm.",
        fp8_only=True,
        triton=True,
    ),
    "fp8_static": Way(
        "Scales all activations of a product by one factor, calibrated before compiling.",
        fp8_only=True,
    ),
}
"""Every way, by its field in `Recipe`. A test holds `RECIPES` to this table."""

TUNED: dict[str, bool | int | str] = {
    # Time the candidates for every matrix product instead of using cuBLAS's first choice: most
    # of a step's products have 1,280 columns, where the usual tiles leave a third of the GPU idle.
    # The compiler's process pool compiles the candidates. Their timings are kept in its cache
    # folder, shape by shape, so an interrupted tuning continues where it stopped.
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "ATEN,TRITON",
    # The templates that use Hopper's bulk copies are off by default in PyTorch.
    "triton.enable_persistent_tma_matmul": True,
    # Convolutions by the library alone: Triton's templates never won on an H100, and timing them
    # takes most of the tuning time.
    "max_autotune_conv_backends": "ATEN",
}
"""Inductor's options that tune every product."""

RECIPES: dict[Mode, Recipe] = {
    "off": Recipe(
        scope="none",
        replay="none",
        channels_last=False,
        fuse_qkv=False,
        text_once=False,
        vae_attention=False,
    ),
    # For a CPU: the rewrites that are faster there without compiling (bench/results/notes.md).
    "rewritten": Recipe(
        scope="none", replay="none", vae_attention=False, zero_text=True, time_once=True
    ),
    "regional": Recipe(scope="blocks"),
    "default": Recipe(scope="whole"),
    "max": Recipe(
        scope="whole",
        options={
            **TUNED,
            # Time a handful of launch settings for every generated kernel, compiled in the pool.
            # Coordinate descent stays off: it compiles its 10 to 20 candidates per kernel one by
            # one in this process, which takes longer than everything else together.
            "max_autotune_pointwise": True,
            # The shortcuts' 1x1 convolutions become products, which are tuned as above.
            "conv_1x1_as_mm": True,
        },
        group_norm=True,
        upsample="transposed",
        zero_text=True,
        time_once=True,
        layer_norm=True,
        residual_products=True,
        self_attention=True,
        cross_attention=True,
        geglu=True,
        text_encoders=True,
    ),
}


def mode_for(setting: str, device: torch.device) -> Mode:
    """The mode for a value of `SDXL_COMPILE` on a device: `auto` is `default` on CUDA, where
    compiling gains most, and `rewritten` elsewhere."""
    if setting != "auto":
        return cast(Mode, setting)
    return "default" if device.type == "cuda" else "rewritten"
