"""From a loaded SDXL pipeline to one that runs compiled: the only place inductor is configured.

`compile_model` changes the pipeline's UNet and VAE decoder in place, so that diffusers' own
pipeline goes on calling its own classes. Nothing compiles here: each input shape compiles when it
is first called, which is warm-up's task, and so is forbidding it afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, get_args

import torch
import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch._dynamo.exc import RecompileError

from kernels_warmup.attention import Backend, resolve, set_attention
from kernels_warmup.quantize import Quantization, Quantized, quantize_unet
from kernels_warmup.rewrites import TextOnce, channels_last, set_vae_attention
from kernels_warmup.triton import why_unusable as kernels_unusable

logger = logging.getLogger(__name__)

Mode = Literal["off", "regional", "default", "max"]
MODES: tuple[Mode, ...] = get_args(Mode)

TensorFunction = Callable[..., torch.Tensor]

GRAPHS_PER_FUNCTION = 64
"""How many shapes one function may be compiled for: nine sizes, with guidance and without, a few
batch sizes. Dynamo's own limit of 8 would silently run the ninth eagerly."""


class Models(Protocol):
    """The parts of a diffusers SDXL pipeline that are compiled."""

    unet: Any
    vae: Any


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
    # Kernels of our own in Triton. They need Hopper and a 16-bit type; elsewhere nothing changes.
    layer_norm: bool = False
    """The transformer blocks' sums, each with the norm after it."""
    cross_attention: bool = False
    """Attention to the text's 77 keys."""
    geglu: bool = False
    """The feed-forwards' first product, with its gating."""


TUNED: dict[str, bool | int | str] = {
    # Time the candidates for every matrix product instead of taking cuBLAS's first choice: most
    # of a step's products have 1,280 columns, where the usual tiles leave a third of the GPU idle.
    "max_autotune_gemm": True,
    # The templates built on Hopper's bulk copies; off by default in PyTorch.
    "triton.enable_persistent_tma_matmul": True,
    # Convolutions by the library alone: Triton's templates never won on an H100, and timing them
    # takes most of the tuning time.
    "max_autotune_conv_backends": "ATEN",
}

RECIPES: dict[Mode, Recipe] = {
    "off": Recipe("none", "none", {}, False, False, False, False),
    "regional": Recipe(scope="blocks"),
    "default": Recipe(scope="whole"),
    "max": Recipe(
        scope="whole",
        options={
            **TUNED,
            # Search the launch settings of every generated kernel; minutes, for about 1%.
            "coordinate_descent_tuning": True,
            # The shortcuts' 1x1 convolutions become products, which are tuned as above.
            "conv_1x1_as_mm": True,
        },
        layer_norm=True,
        cross_attention=True,
        geglu=True,
    ),
}


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
        """How many distinct inputs the UNet and the decoder have run with."""
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
    `off` leaves the modules as they are; `regional` compiles each repeated block once (seconds);
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
    step = compile_unet(pipeline.unet, recipe, backend, quantize, pool)
    decode = compile_decoder(pipeline.vae, recipe, pool)
    forward = pipeline.unet.forward
    return CompiledModel(mode, recipe, backend, forward.quantized, forward.text, (step, decode))


def compile_unet(
    unet: Any,
    recipe: Recipe,
    attention: Backend,
    quantize: Quantization = "none",
    pool: Any = None,
) -> PerShape:
    """Rewrite the UNet in place and put a compiled `forward` in front of it."""
    if recipe.channels_last:
        channels_last(unet)
    set_attention(unet, attention, fuse_qkv=recipe.fuse_qkv)
    # Before the text buffers, which would keep the forward that its error is measured by from
    # running by itself.
    quantized = quantize_unet(unet, quantize)
    text = TextOnce(unet) if recipe.text_once else None
    _set_kernels(unet, recipe, attention, quantized)
    step = _step_function(unet, text)
    if recipe.scope == "blocks":
        _compile_blocks(unet, recipe, unet.device)
    elif recipe.scope == "whole":
        step = _compiled(step, recipe, unet.device)
    per_shape = PerShape(step, recipe, unet.device, pool)
    unet.forward = UNetForward(per_shape, text, quantized)
    return per_shape


def compile_decoder(vae: Any, recipe: Recipe, pool: Any = None) -> PerShape:
    """Rewrite the VAE in place and put a compiled `forward` in front of its decoder."""
    if recipe.channels_last:
        channels_last(vae)
    if recipe.vae_attention:
        set_vae_attention(vae)
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
    if not (recipe.layer_norm or recipe.cross_attention or recipe.geglu):
        return
    reason = kernels_unusable(unet.device, unet.dtype)
    if reason is not None:
        logger.info("the blocks keep their own operators: %s", reason)
        return
    from kernels_warmup.triton import install

    if recipe.layer_norm:
        install.set_layer_norm(unet, across_blocks=recipe.scope != "blocks")
    if recipe.cross_attention:
        install.set_cross_attention(unet, attention)
    # A quantised product is torchao's.
    if recipe.geglu and quantized is None:
        install.set_geglu(unet)


def inductor_options(recipe: Recipe, device: torch.device) -> dict[str, bool | int | str]:
    """The options `torch.compile` gets; on a CPU the templates above do not exist."""
    if device.type != "cuda":
        return {}
    trees = {"triton.cudagraphs": True} if recipe.replay == "trees" else {}
    return {**recipe.options, **trees}


def _compiled(function: TensorFunction, recipe: Recipe, device: torch.device) -> TensorFunction:
    options = inductor_options(recipe, device)
    return cast(
        TensorFunction,
        # fullgraph: a graph break would cost a step its overlap without a word.
        # static shapes: the kernels of a warm shape know every size.
        torch.compile(function, fullgraph=True, dynamic=False, options=cast(Any, options)),
    )


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


def _decode_function(vae: Any) -> TensorFunction:
    forward = vae.decoder.forward

    def decode(sample: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, forward(sample))

    return decode


class UNetForward:
    """Stands in for the UNet's `forward`; the one place that sees each step from outside."""

    def __init__(
        self, step: PerShape, text: TextOnce | None, quantized: Quantized | None = None
    ) -> None:
        self._step = step
        self.text = text
        self.quantized = quantized

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: Mapping[str, torch.Tensor],
        return_dict: bool = True,
        **unused: object,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        refused = [name for name, value in unused.items() if value is not None]
        if refused:
            raise TypeError(f"the compiled UNet does not take {', '.join(refused)}")
        if self.text is not None:
            self.text.prepare_conditioning(encoder_hidden_states, added_cond_kwargs)
            noise = self._step(sample, timestep)
        else:
            noise = self._step(
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
        return self._decode(sample)


class PerShape:
    """Runs a function, and on CUDA replays it as one graph for each shape of its inputs.

    The result is always a tensor of its own: a later replay never overwrites it. Once `frozen`,
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
        self._pool = pool
        self._captured: dict[tuple[object, ...], Captured] = {}
        self.met: set[tuple[object, ...]] = set()
        self.frozen = False
        self.fallbacks = Fallbacks()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
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

    def _run(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if self._replay != "trees":
            return self.function(*inputs)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self.function(*inputs).clone()

    def _eagerly(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # The stance holds for the process, and this thread alone runs what is compiled.
        with torch.compiler.set_stance("force_eager"):
            return self.function(*inputs)

    def _first(self, key: tuple[object, ...], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
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

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()
