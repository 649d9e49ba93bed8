"""From a loaded SDXL pipeline to one that runs compiled: the only place inductor is configured.

`compile_model` changes the pipeline's UNet, VAE decoder and text encoders in place, so that
diffusers' own pipeline goes on calling its own classes. Nothing compiles here: each input shape
compiles when it is first called, which is warm-up's task, and so is forbidding it afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch._dynamo.exc import RecompileError

from kernels_warmup.attention import Backend, resolve, set_attention
from kernels_warmup.blocks import ZERO_TEXT, set_blocks
from kernels_warmup.norms import set_decoder_norms, set_unet_norms
from kernels_warmup.quantize import Quantization, Quantized, quantize_unet
from kernels_warmup.rewrites import TextOnce, channels_last, set_time_once, set_vae_attention
from kernels_warmup.triton import why_unusable as kernels_unusable
from kernels_warmup.upsample import Upsampling, set_upsampling

logger = logging.getLogger(__name__)

Mode = Literal["off", "rewritten", "regional", "default", "max"]
MODES: tuple[Mode, ...] = get_args(Mode)

TensorFunction = Callable[..., Any]
"""From tensors to one tensor, or to a tuple of them."""

GRAPHS_PER_FUNCTION = 64
"""How many shapes one function may be compiled for: nine sizes, with guidance and without, a few
batch sizes. Dynamo's own limit of 8 would silently run the ninth eagerly."""


class Models(Protocol):
    """The parts of a diffusers SDXL pipeline that are compiled or captured."""

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any


@dataclass(frozen=True)
class Recipe:
    """Everything one mode does; the bench varies single fields of it."""

    scope: Literal["none", "blocks", "whole"] = "whole"
    """What is compiled: nothing, each repeated block by itself, or the UNet and decoder whole."""
    replay: Literal["none", "captured", "trees"] = "captured"
    """How launches are saved on CUDA: not at all, one captured graph a shape, inductor's trees."""
    options: Mapping[str, bool | int | str] = field(default_factory=dict)
    """Inductor's options; used on CUDA only."""
    channels_last: bool = True
    fuse_qkv: bool = True
    text_once: bool = True
    vae_attention: bool = True
    # Not measured on a GPU yet, and so in `max` alone.
    group_norm: bool = False
    """Group norms as reductions along the channels, in the UNet and the decoder."""
    upsample: Upsampling = "nearest"
    """How the upsamplings before a convolution are computed, in the UNet and the decoder."""
    zero_text: bool = False
    """A second function for runs without a negative prompt, whose unconditional half attends to no
    text; it needs `text_once`, and compiles beside the full one."""
    time_once: bool = False
    """The step's embedding projected for all residual blocks at once."""
    # Kernels of our own in Triton. They need Hopper and a 16-bit type; elsewhere nothing changes.
    layer_norm: bool = False
    """The transformer blocks' sums, each with the norm after it."""
    self_attention: bool = False
    """Self-attention over few tokens: in SDXL's smaller images, the 1,024 of 1024x1024."""
    cross_attention: bool = False
    """Attention to the text's 77 keys."""
    residual_products: bool = False
    """The transformer blocks' sums by the products before them; it needs `layer_norm` and no
    compiling block by block. A quantised UNet keeps its sums."""
    geglu: bool = False
    """The feed-forwards' first product, with its gating."""
    text_encoders: bool = False
    """On CUDA, the text encoders as captured graphs, whatever `replay` says of the rest. Their 44
    layers of small kernels keep the host busier than the GPU; compiling them would buy little more.
    """
    # Variants of fp8 products, which change nothing where none are; not measured on a GPU yet.
    fp8_norms: bool = False
    """The kernel of `layer_norm` writes fp8 and its scales where a product reads them."""
    fp8_static: bool = False
    """One scale for all activations of a product, calibrated before compiling."""

    @property
    def has_graphs(self) -> bool:
        """Whether it makes graphs, each for one input shape: compiled, captured or both."""
        return self.scope != "none" or self.replay != "none"


TUNED: dict[str, bool | int | str] = {
    # Time the candidates for every matrix product instead of taking cuBLAS's first choice: most
    # of a step's products have 1,280 columns, where the usual tiles leave a third of the GPU idle.
    # Candidates are compiled in the compiler's pool of processes; what each took is kept in its
    # cache folder, shape by shape, so a tuning that was cut off goes on where it was.
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "ATEN,TRITON",
    # The templates built on Hopper's bulk copies; off by default in PyTorch.
    "triton.enable_persistent_tma_matmul": True,
    # Convolutions by the library alone: Triton's templates never won on an H100, and timing them
    # takes most of the tuning time.
    "max_autotune_conv_backends": "ATEN",
}

RECIPES: dict[Mode, Recipe] = {
    "off": Recipe("none", "none", {}, False, False, False, False),
    # For a CPU: the rewrites that are faster there without compiling (bench/results/notes.md).
    "rewritten": Recipe(
        scope="none", replay="none", vae_attention=False, zero_text=True, time_once=True
    ),
    "regional": Recipe(scope="blocks"),
    "default": Recipe(scope="whole"),
    "max": Recipe(
        scope="whole",
        text_encoders=True,
        options={
            **TUNED,
            # Time a handful of launch settings for every generated kernel, compiled in the pool.
            # Not the descent along each setting: it compiles its 10 to 20 candidates a kernel one
            # by one in this process, which takes longer than everything else together.
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
    ),
}


def mode_for(setting: str, device: torch.device) -> Mode:
    """The mode that `SDXL_COMPILE` means on a device: `auto` is `default` on CUDA, where compiling
    gains most, and `rewritten` elsewhere."""
    if setting != "auto":
        return cast(Mode, setting)
    return "default" if device.type == "cuda" else "rewritten"


@dataclass
class CompiledModel:
    """What `compile_model` did, and the guard that ends warm-up."""

    mode: Mode
    recipe: Recipe
    attention: Backend
    quantized: Quantized | None
    text: TextOnce | None
    functions: tuple[PerShape, ...]

    def freeze(self) -> None:
        """Arm the guard: from now on nothing is compiled or captured, it runs eagerly instead.

        A compilation in the middle of a request would cost it minutes; an eager step costs it
        tens of milliseconds, and is counted in `fallbacks`.
        """
        for function in self.functions:
            function.frozen = True

    def thaw(self) -> None:
        """Lift the guard, to warm one more shape while no request runs."""
        for function in self.functions:
            function.frozen = False

    @property
    def fallbacks(self) -> Fallbacks:
        """What has run eagerly under the guard so far."""
        return Fallbacks(
            cold=sum(function.fallbacks.cold for function in self.functions),
            recompiles=sum(function.fallbacks.recompiles for function in self.functions),
        )

    @property
    def shapes_met(self) -> int:
        """How many distinct inputs the functions have run with, all of them together."""
        return sum(len(function.met) for function in self.functions)


@dataclass
class Fallbacks:
    """How often a call ran eagerly: for a shape never warmed, or because a warm one would have
    been compiled again."""

    cold: int = 0
    recompiles: int = 0


def compile_model(
    pipeline: Models,
    mode: Mode = "default",
    *,
    attention: Backend = "auto",
    quantize: Quantization = "none",
    recipe: Recipe | None = None,
) -> CompiledModel:
    """Prepare a loaded pipeline, already on its device and in its type, to run compiled.

    Call it once for a pipeline, and run the pipeline afterwards on one thread only. The modes:
    `off` leaves the modules as they are; `rewritten` changes what they compute and compiles
    nothing; `regional` compiles each repeated block once (seconds);
    `default` the whole UNet and decoder, one graph a shape; `max` also tunes what takes minutes.
    On a CPU nothing is captured and inductor keeps its own settings.
    """
    if mode not in MODES:
        raise ValueError(f"{mode!r} is not a compile mode: one of {', '.join(MODES)} is")
    recipe = recipe or RECIPES[mode]
    device = pipeline.unet.device
    backend = resolve(attention, device, pipeline.unet.dtype)
    if recipe == RECIPES["off"]:
        if attention != "auto":
            set_attention(pipeline.unet, backend, fuse_qkv=False)
        quantized = quantize_unet(pipeline.unet, quantize)
        return CompiledModel(mode, recipe, backend, quantized, None, ())
    if device.type == "cuda":
        # The fastest convolution is found by timing, once a shape, in warm-up.
        torch.backends.cudnn.benchmark = True
    # One pool for all graphs: they run one after the other, and keep their outputs alive.
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    unet = compile_unet(pipeline.unet, recipe, backend, quantize, pool)
    decode = compile_decoder(pipeline.vae, recipe, pool)
    encoders = capture_text_encoders(pipeline, recipe, pool) if recipe.text_encoders else ()
    functions = (*unet.functions, decode, *encoders)
    return CompiledModel(mode, recipe, backend, unet.quantized, unet.text, functions)


def compile_unet(
    unet: Any,
    recipe: Recipe,
    attention: Backend,
    quantize: Quantization = "none",
    pool: Any = None,
) -> UNetForward:
    """Rewrite the UNet in place and put a compiled `forward` in front of it, which is returned.

    Raises:
        ValueError: the UNet is not SDXL's, or the recipe contradicts itself.
    """
    if recipe.zero_text and not recipe.text_once:
        raise ValueError("zero_text needs text_once: the keys and values of a text that is zero")
    if recipe.residual_products and (not recipe.layer_norm or recipe.scope == "blocks"):
        raise ValueError("residual_products needs layer_norm, and no compiling block by block")
    if recipe.fp8_norms and not recipe.layer_norm:
        raise ValueError("fp8_norms needs layer_norm: it is that kernel which writes fp8")
    if recipe.channels_last:
        channels_last(unet)
    set_attention(unet, attention, fuse_qkv=recipe.fuse_qkv)
    # Before the text buffers, which would keep the forward that its error is measured by from
    # running by itself.
    quantized = quantize_unet(unet, quantize, static=recipe.fp8_static)
    if recipe.time_once:
        set_time_once(unet)
    if recipe.group_norm:
        set_unet_norms(unet)
    set_upsampling(unet, recipe.upsample)
    if recipe.zero_text:
        set_blocks(unet)
    text = TextOnce(unet) if recipe.text_once else None
    _set_kernels(unet, recipe, attention, quantized)
    functions = [_step_function(unet, text)]
    if recipe.zero_text:
        functions.append(_step_without_negative(unet))
    if recipe.scope == "blocks":
        _compile_blocks(unet, recipe, unet.device)
    elif recipe.scope == "whole":
        functions = [_compiled(function, recipe, unet.device) for function in functions]
    step, *more = [PerShape(function, recipe, unet.device, pool) for function in functions]
    unet.forward = UNetForward(step, text, quantized, more[0] if more else None)
    return cast(UNetForward, unet.forward)


def compile_decoder(vae: Any, recipe: Recipe, pool: Any = None) -> PerShape:
    """Rewrite the VAE in place and put a compiled `forward` in front of its decoder."""
    if recipe.channels_last:
        channels_last(vae)
    if recipe.vae_attention:
        set_vae_attention(vae)
    if recipe.group_norm:
        set_decoder_norms(vae.decoder)
    set_upsampling(vae.decoder, recipe.upsample)
    decode = _decode_function(vae)
    if recipe.scope == "blocks":
        _compile_blocks(vae.decoder, recipe, vae.device)
    elif recipe.scope == "whole":
        decode = _compiled(decode, recipe, vae.device)
    per_shape = PerShape(decode, recipe, vae.device, pool)
    vae.decoder.forward = DecoderForward(per_shape)
    return per_shape


def _set_kernels(
    unet: Any, recipe: Recipe, attention: Backend, quantized: Quantized | None
) -> None:
    """The recipe's own kernels, where they can run; only there is Triton imported."""
    wanted = (recipe.layer_norm, recipe.self_attention, recipe.cross_attention, recipe.geglu)
    if not any(wanted):
        return
    reason = kernels_unusable(unet.device, unet.dtype)
    if reason is not None:
        logger.info("the blocks keep their own operators: %s", reason)
        return
    from kernels_warmup.triton import install

    if recipe.layer_norm:
        install.set_layer_norm(unet, across_blocks=recipe.scope != "blocks")
    if recipe.fp8_norms:
        install.set_fp8_norms(unet)
    # A quantised product does not add onto a sum.
    if recipe.residual_products and quantized is None:
        from kernels_warmup.triton.residuals import set_residual_products

        set_residual_products(unet)
    if recipe.self_attention:
        install.set_self_attention(unet, attention)
    if recipe.cross_attention:
        install.set_cross_attention(unet, attention)
    # That kernel's product is of the model's own type.
    if recipe.geglu and quantized is None:
        install.set_geglu(unet)


def capture_text_encoders(
    pipeline: Models, recipe: Recipe, pool: Any = None
) -> tuple[PerShape, PerShape]:
    """Put a captured `forward` in front of both text encoders; nothing of them is compiled."""

    def capture(encoder: Any) -> PerShape:
        captured = replace(recipe, replay="captured")
        per_shape = PerShape(_encode_function(encoder), captured, encoder.device, pool)
        encoder.forward = TextEncoderForward(per_shape)
        return per_shape

    return capture(pipeline.text_encoder), capture(pipeline.text_encoder_2)


def inductor_options(recipe: Recipe, device: torch.device) -> dict[str, bool | int | str]:
    """The options `torch.compile` gets; on a CPU the templates above do not exist."""
    if device.type != "cuda":
        return {}
    trees = {"triton.cudagraphs": True} if recipe.replay == "trees" else {}
    return {**recipe.options, **trees}


def _compiled(function: TensorFunction, recipe: Recipe, device: torch.device) -> TensorFunction:
    options = inductor_options(recipe, device)
    # fullgraph: a graph break would cost a step its overlap without a word.
    # static shapes: the kernels of a warm shape know every size.
    return torch.compile(function, fullgraph=True, dynamic=False, options=cast(Any, options))


def _compile_blocks(module: torch.nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Compile the repeated blocks; equal ones share a graph, so that 70 cost as much as two."""
    options = inductor_options(recipe, device)
    for block in module.modules():
        if isinstance(block, BasicTransformerBlock | ResnetBlock2D):
            block.compile(fullgraph=True, dynamic=False, options=options)


def _step_function(unet: Any, text: TextOnce | None) -> TensorFunction:
    """One UNet forward as a function of tensors only."""
    forward = unet.forward

    def step(
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return cast(
            torch.Tensor,
            forward(
                sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
            )[0],
        )

    def step_after_text(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return cast(
            torch.Tensor,
            forward(sample, timestep, None, added_cond_kwargs={}, return_dict=False)[0],
        )

    return step if text is None else step_after_text


def _step_without_negative(unet: Any) -> TensorFunction:
    """One UNet forward of a guided run whose negative text is zero, as a function of tensors."""
    forward = unet.forward

    def step_without_negative(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return cast(
            torch.Tensor,
            forward(
                sample,
                timestep,
                None,
                added_cond_kwargs={},
                cross_attention_kwargs={ZERO_TEXT: True},
                return_dict=False,
            )[0],
        )

    return step_without_negative


def _decode_function(vae: Any) -> TensorFunction:
    forward = vae.decoder.forward

    def decode(sample: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, forward(sample))

    return decode


def _encode_function(encoder: Any) -> TensorFunction:
    """What SDXL reads of an encoder: its first output, and the states before its last layer."""
    forward = encoder.forward

    def encode(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = forward(input_ids, output_hidden_states=True)
        return output[0], output.hidden_states[-2]

    return encode


class UNetForward:
    """Stands in for the UNet's `forward`; the one place that sees each step from outside.

    Attributes:
        takes_zero_text: whether `cross_attention_kwargs` may say `blocks.ZERO_TEXT`.
        functions: what it may run.
    """

    def __init__(
        self,
        step: PerShape,
        text: TextOnce | None,
        quantized: Quantized | None = None,
        step_without_negative: PerShape | None = None,
    ) -> None:
        self._step = step
        self._step_without_negative = step_without_negative
        self.text = text
        self.quantized = quantized
        self.takes_zero_text = step_without_negative is not None
        self.functions = (step,) if step_without_negative is None else (step, step_without_negative)

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: Mapping[str, torch.Tensor],
        cross_attention_kwargs: Mapping[str, object] | None = None,
        return_dict: bool = True,
        **unused: object,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """As the UNet's. `cross_attention_kwargs` holds nothing but `blocks.ZERO_TEXT`, if that:
        the first half of the text is zero, which is the caller's word and not looked at."""
        step = self._step
        told = set(cross_attention_kwargs or ())
        if ZERO_TEXT in told and self._step_without_negative is not None:
            step = self._step_without_negative
            told.remove(ZERO_TEXT)
        refused = sorted(told) + [name for name, value in unused.items() if value is not None]
        if refused:
            raise TypeError(f"the compiled UNet does not take {', '.join(refused)}")
        if self.text is not None:
            self.text.prepare_conditioning(encoder_hidden_states, added_cond_kwargs)
            noise: torch.Tensor = step(sample, timestep)
        else:
            noise = step(
                sample,
                timestep,
                encoder_hidden_states,
                added_cond_kwargs["text_embeds"],
                added_cond_kwargs["time_ids"],
            )
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)


class DecoderForward:
    """Stands in for the VAE decoder's `forward`."""

    def __init__(self, decode: PerShape) -> None:
        self._decode = decode

    def __call__(
        self, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        if latent_embeds is not None:
            raise TypeError("the compiled VAE decoder does not take latent_embeds")
        return cast(torch.Tensor, self._decode(sample))


class EncodedText(NamedTuple):
    """As much of a text encoder's output as SDXL reads, found where SDXL looks for it."""

    first: torch.Tensor
    """The pooled and projected text (texts, width) where the encoder has a projection, else its
    last states (texts, tokens, width)."""
    hidden_states: tuple[torch.Tensor, None]
    """The states before the last layer (texts, tokens, width); the last layer's are not kept."""


class TextEncoderForward:
    """Stands in for a text encoder's `forward`."""

    def __init__(self, encode: PerShape) -> None:
        self._encode = encode

    def __call__(self, input_ids: torch.Tensor, *, output_hidden_states: bool) -> EncodedText:
        if not output_hidden_states:
            raise TypeError("the captured text encoder is asked for its hidden states")
        first, before_last = self._encode(input_ids)
        return EncodedText(first, (before_last, None))


class PerShape:
    """Runs a function, and on CUDA replays it as one graph for each shape of its inputs.

    What it returns is always the caller's own: a later replay never overwrites it. Once `frozen`,
    what would need a compilation runs eagerly; the function must give the same when called again.
    """

    def __init__(
        self,
        function: TensorFunction,
        recipe: Recipe,
        device: torch.device,
        pool: Any = None,
    ) -> None:
        self.function = function
        self._replay = recipe.replay if device.type == "cuda" else "none"
        self._has_graphs = recipe.scope != "none" or self._replay != "none"
        self._pool = pool
        self._captured: dict[tuple[object, ...], Captured] = {}
        self.met: set[tuple[object, ...]] = set()
        self.frozen = False
        self.fallbacks = Fallbacks()

    def __call__(self, *inputs: torch.Tensor) -> Any:
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if not self._has_graphs:
            # The same code runs every shape: none of them is cold, and the guard guards nothing.
            self.met.add(key)
            return self.function(*inputs)
        captured = self._captured.get(key)
        if captured is not None:
            return captured.replay(inputs)
        if not self.frozen:
            return self._run(inputs) if key in self.met else self._first(key, inputs)
        if key not in self.met:
            self.fallbacks.cold += 1
            return self._eagerly(inputs)
        try:
            # Typed, where the compiler's stance of the same purpose raises a bare RuntimeError;
            # raised before anything of the function has run.
            with torch._dynamo.config.patch(error_on_recompile=True):
                return self._run(inputs)
        except RecompileError as error:
            if not self.fallbacks.recompiles:
                # Once: every step would say the same. The text names sizes and modules only.
                logger.warning("not compiled again, run eagerly: %s", error)
            self.fallbacks.recompiles += 1
            return self._eagerly(inputs)

    def _run(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        if self._replay != "trees":
            return self.function(*inputs)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return _cloned(self.function(*inputs))

    def _eagerly(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        # The stance holds for the process, and this thread alone runs what is compiled.
        with torch.compiler.set_stance("force_eager"):
            return self.function(*inputs)

    def _first(self, key: tuple[object, ...], inputs: tuple[torch.Tensor, ...]) -> Any:
        # The limit is set around the call and not once: such settings belong to a thread.
        with torch._dynamo.config.patch(recompile_limit=GRAPHS_PER_FUNCTION):
            result = self._run(inputs)
            if self._replay == "captured":
                self._captured[key] = Captured(self.function, inputs, self._pool)
        self.met.add(key)
        return result


class Captured:
    """One function as a CUDA graph over input and output tensors of its own.

    Weights and text buffers are read where they lie. Not inductor's graph trees: those check the
    guards of a few thousand weights before each replay, and hand out an output that the next
    replay overwrites.
    """

    def __init__(
        self,
        function: TensorFunction,
        inputs: tuple[torch.Tensor, ...],
        pool: Any,
    ) -> None:
        # Not inference tensors, which could not be refilled outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            place = inputs[0].device
            self._inputs = tuple(torch.empty_like(t, device=place).copy_(t) for t in inputs)
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # Twice: the first call may still tune or load something, which no graph may hold.
                for _ in range(2):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may go on using CUDA while this one captures.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._output = function(*self._inputs)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return _cloned(self._output)


def _cloned(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(tensor.clone() for tensor in result)
    return result.clone()
