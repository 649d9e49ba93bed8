"""Attention backends by name, and the attention processor that uses them.

A backend is one operator, called directly, so the named kernel is the one that runs, eagerly and
under `torch.compile`. The alternatives do not guarantee that: diffusers' `set_attention_backend()`
silently does nothing on the SDXL UNet, and flags such as `sdpa_kernel` only permit a kernel.

Shapes: query, key and value are (batch, heads, tokens, head size), unless a docstring says
otherwise.
"""

from __future__ import annotations

import re
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.attention import BasicTransformerBlock

Backend = Literal["auto", "cudnn", "flash", "xformers", "math"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

SDXL_HEAD_SIZE = 64


def attend(
    backend: Backend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Unmasked scaled dot-product attention by the named backend.

    `auto` lets PyTorch choose among its kernels. `math` is the plain formula with the softmax in
    float32, the reference for the others.
    """
    if backend == "cudnn":
        return cast(
            torch.Tensor,
            torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, False, 0.0, False, False
            )[0],
        )
    if backend == "flash":
        return cast(
            torch.Tensor,
            torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, False, False
            )[0],
        )
    if backend == "xformers":
        result: torch.Tensor = _xformers_attention(query, key, value)
        return result
    if backend == "math":
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        mixed: torch.Tensor = scores.float().softmax(-1).to(value.dtype) @ value
        return mixed
    return F.scaled_dot_product_attention(query, key, value)


@torch.library.custom_op("stepspan::xformers_attention", mutates_args=())
def _xformers_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    # A custom operator, because the compiler would otherwise trace into xformers' dispatch.
    # xformers expects (batch, tokens, heads, head size), the layout of the projections' results.
    from xformers.ops import memory_efficient_attention

    result = memory_efficient_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return cast(torch.Tensor, result).contiguous().transpose(1, 2)


@_xformers_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)


def why_unusable(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int = SDXL_HEAD_SIZE,
) -> str | None:
    """One sentence saying why this backend cannot run here, or None if it can.

    It finds out by running the backend on a few tokens: a list of conditions would be out of date
    at the next release of any of the libraries.
    """
    if backend not in BACKENDS:
        return f"{backend!r} is not an attention backend; choose one of {', '.join(BACKENDS)}"
    if backend in ("auto", "math"):
        return None
    if device.type != "cuda":
        return f"attention backend {backend!r} needs a CUDA device; this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"attention backend {backend!r} needs bfloat16 or float16; the model is {dtype}"
    if backend == "xformers":
        reason = _why_xformers_does_not_load()
        if reason is not None:
            return f"attention backend 'xformers' needs xformers, which does not load: {reason}"
    sample = torch.zeros(1, 1, 128, head_size, device=device, dtype=dtype)
    try:
        attend(backend, sample, sample, sample)
        torch.cuda.synchronize(device)
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        return f"attention backend {backend!r} does not run here: {_first_line(error)}"
    return None


def _why_xformers_does_not_load() -> str | None:
    """The missing package or shared library, without paths; None if xformers is complete."""
    try:
        import xformers.ops
    except (ImportError, OSError, RuntimeError) as error:
        return _without_paths(error)
    # Without its compiled operators xformers still imports, warns, and keeps the error here.
    library = getattr(xformers, "_cpp_lib", None)
    failure = getattr(library, "_cpp_library_load_exception", None)
    return None if failure is None else _without_paths(failure)


def _without_paths(error: BaseException) -> str:
    """The first line of the error that caused this one; of file paths only the names remain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"(?<![\w.])/\S*/", "", _first_line(error))


def resolve(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int = SDXL_HEAD_SIZE,
) -> Backend:
    """The backend to use for a setting.

    `auto` becomes cuDNN on Hopper, where its kernel is the fastest that PyTorch ships, and remains
    PyTorch's own choice elsewhere.

    Raises:
        ValueError: the backend cannot run here; the text is `why_unusable`'s.
    """
    if backend == "auto":
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        if hopper and why_unusable("cudnn", device, dtype, head_size) is None:
            return "cudnn"
        return "auto"
    reason = why_unusable(backend, device, dtype, head_size)
    if reason is not None:
        raise ValueError(reason)
    return backend


class StepAttention:
    """A diffusers attention processor: SDXL's attention by a named backend.

    It uses the fused query-key-value projection if the module has one. If the text's keys and
    values were computed beforehand (`rewrites.text_once`), it reads them from the module's
    `text_key` and `text_value` and ignores the text. If the query's batch is smaller than theirs,
    it attends to the last of them: the conditional half (`rewrites.zero_text`).
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None:
            raise ValueError("SDXL attends to every token; an attention mask is not supported")
        attended = self.attended(attn, hidden_states, encoder_hidden_states)
        return cast(torch.Tensor, attn.to_out[0](attended))

    def attended(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention's result before its output projection, (batch, tokens, width)."""
        text_key: torch.Tensor | None = getattr(attn, "text_key", None)
        if text_key is not None:
            query = attn.to_q(hidden_states)
            batch = query.shape[0]
            key, value = text_key[-batch:], attn.text_value[-batch:]
        elif encoder_hidden_states is None and attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query = attn.to_q(hidden_states)
            key, value = attn.to_k(context), attn.to_v(context)
        return self.mix(attn.heads, query, key, value)

    def mix(
        self, heads: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attention in the projections' layout: query (batch, tokens, heads x head size), key and
        value (batch, keys, heads x head size), and the result as the query."""
        batch, tokens, width = query.shape

        def by_head(flat: torch.Tensor) -> torch.Tensor:
            return flat.view(batch, -1, heads, width // heads).transpose(1, 2)

        mixed = attend(self.backend, by_head(query), by_head(key), by_head(value))
        return mixed.transpose(1, 2).reshape(batch, tokens, width)


def set_attention(unet: torch.nn.Module, backend: Backend, *, fuse_qkv: bool = True) -> None:
    """Set the attention backend of every transformer block of the UNet, and fuse projections.

    Only self-attention is fused. The text's keys and values are computed once a run: fusing them
    would save nothing and keep a second copy of 0.6 GB of weights.
    """
    processor = StepAttention(backend)
    for block in transformer_blocks(unet):
        for attn in (block.attn1, block.attn2):
            _require_plain(attn)
            attn.set_processor(processor)
        if fuse_qkv:
            block.attn1.fuse_projections(fuse=True)
            _share_fused_weight(block.attn1)


def _share_fused_weight(attn: Any) -> None:
    """Make the weights of query, key and value views of the fused one, which diffusers copies: no
    weight is stored twice, and one that changes in place changes in the fused one too."""
    start = 0
    for linear in (attn.to_q, attn.to_k, attn.to_v):
        rows = slice(start, start + linear.out_features)
        linear.weight.data = attn.to_qkv.weight.data[rows]
        if linear.bias is not None:
            linear.bias.data = attn.to_qkv.bias.data[rows]
        start = rows.stop


def transformer_blocks(unet: torch.nn.Module) -> list[Any]:
    """The UNet's transformer blocks in module order; SDXL base has 70."""
    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


def _require_plain(attn: Any) -> None:
    """Raise for an attention with parts that `StepAttention` would leave out."""
    absent = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    extra = [name for name in absent if getattr(attn, name, None) is not None]
    if attn.residual_connection or attn.rescale_output_factor != 1.0:
        extra.append("residual_connection")
    if getattr(attn, "scale", None) != (attn.inner_dim // attn.heads) ** -0.5:
        extra.append("scale")
    if extra:
        raise ValueError(f"not SDXL's attention: it also has {', '.join(extra)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
