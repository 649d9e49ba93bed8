"""The kernels that torch's compiler would launch on a Hopper GPU, determined without one.

The model's tensors are fake, on a `cuda` device that does not exist. The model is traced and
lowered by inductor as for an H200, up to the code that would go to Triton. Nothing is compiled or
run, so neither Triton nor a GPU is needed; a full-size UNet takes a minute on one core. Choices
that inductor makes by timing (tuned products, convolution algorithms) stay with the library's
default.

Inductor's internals are private; this is the only module that uses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.flop_counter import FlopCounterMode

from bench.errors import BenchError

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150_000_000_000,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=52_428_800,
    is_integrated=False,
    gcnArchName="",
)
"""The device properties that inductor reads."""

SECTOR_BYTES = 32
"""The smallest access to device memory; a shorter run of bytes costs as much."""

FP8_PRODUCTS = "gemm, fp8"

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kind: one of `profile.KINDS`, `own` for kernels of our own, or `FP8_PRODUCTS`.
        name: the library's operator, or the operators that a generated kernel fuses.
        bytes: the size of every buffer that it reads or writes, each counted once.
        short_bytes: of those, the bytes that a generated reduction reads in runs shorter than a
            sector.
    """

    kind: str
    name: str
    bytes: int
    short_bytes: int = 0


@dataclass(frozen=True)
class Lowered:
    """A function's launches, and the FLOPs of its products, convolutions and attentions."""

    launches: tuple[Launch, ...]
    flops: dict[str, int]
    """By kind."""


@contextlib.contextmanager
def pretended_gpu() -> Iterator[FakeTensorMode]:
    """A block in which torch reports an H200, provided that all tensors are fake.

    Raises:
        BenchError: this torch was built without CUDA, and there is no C++ compiler to build the
            missing device guard.
    """
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        _register_device_guard()
    answers: dict[str, Callable[..., Any]] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.get_device_properties": lambda *_: H200,
        "torch.cuda._get_device_properties": lambda *_: H200,
        "torch.cuda.get_device_capability": lambda *_: (H200.major, H200.minor),
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda._lazy_init": lambda: None,
        # Without cuDNN torch assumes that a convolution's result is never channels_last.
        "torch._C._conv_determine_backend_memory_format": _layout_of_cudnn,
        # It traces patterns with real tensors; none matches a model that calls attention by name.
        "torch._inductor.fx_passes.joint_graph.lazy_init": lambda *_, **__: None,
        # Both need an installed Triton, which lowering does not.
        "torch._inductor.scheduler.has_triton": lambda *_: True,
        "torch.utils._triton.triton_hash_with_backend": lambda *_: "none",
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer, create=True))
        # Initial values are not used, and computing them would need the device.
        for name in ("uniform_", "normal_", "kaiming_uniform_", "zeros_", "ones_"):
            stack.enter_context(
                mock.patch(f"torch.nn.init.{name}", lambda tensor, *_, **__: tensor)
            )
        # Module.to() cannot replace fake parameters.
        stack.enter_context(mock.patch("kernels_warmup.compile.channels_last", _channels_last))
        stack.enter_context(torch.no_grad())
        yield FakeTensorMode(allow_non_fake_inputs=True)


def fake_module(make: Callable[[], nn.Module], dtype: torch.dtype) -> Any:
    """A module with fake weights on the CUDA device; call it within `pretended_gpu`'s mode."""
    with init_empty_weights(include_buffers=False):
        module = make()
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, device="cuda", dtype=dtype)
            setattr(owner, name, nn.Parameter(empty, requires_grad=False))
    return module.eval()


def lower(
    module: nn.Module,
    function: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    mode: FakeTensorMode,
) -> Lowered:
    """What `torch.compile(function)` would launch for these inputs.

    Args:
        module: holds the weights that `function` uses.
    """
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def of_tensors(weights: list[torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
        # Weights are inputs here, because inductor reads the values of constants.
        with _reparametrize_module(module, dict(zip(state, weights, strict=True))):
            return function(*given)

    weights = list(state.values())
    # The counter's own formula for bmm mistakes `out_dtype` for one of its arguments.
    mapping = {torch.ops.aten.bmm: _bmm_flops}
    with mode, FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function(*inputs)
    with mode:
        traced = make_fx(of_tensors, decomposition_table=select_decomp_table())(weights, *inputs)
    flat = [*weights, *inputs]
    # Constant folding would compute on the device.
    folding = config.patch(joint_graph_constant_folding=False)
    with V.set_fake_mode(mode), folding:
        traced.graph.eliminate_dead_code()
        joint_graph_passes(traced)
        post_grad_passes(traced, True)
        graph = GraphLowering(traced, example_inputs=flat, is_inference=True)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*flat)
            graph.codegen()
            launches = tuple(_launches(graph.scheduler.nodes))
    by_kind: dict[str, int] = {}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        kind = _kind_of_operator(str(operator))
        by_kind[kind] = by_kind.get(kind, 0) + int(flops)
    return Lowered(launches, by_kind)


def _launches(nodes: list[Any]) -> Iterator[Launch]:
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    for node in nodes:
        if isinstance(node, NopKernelSchedulerNode):
            continue
        read_and_written = int(node.get_read_write_buffers_sizes())
        if isinstance(node, ExternKernelSchedulerNode):
            if isinstance(node.node, ir.MultiOutput):
                continue  # one result of the operator before it
            name = str(getattr(node.node, "python_kernel_name", "") or type(node.node).__name__)
            read_and_written += _uncounted_results(node)
            yield Launch(_kind_of_operator(name), name, read_and_written)
            continue
        origins = sorted(
            {
                str(origin.target).removeprefix("aten.").split(".")[0]
                for part in node.get_nodes()
                if part.node is not None
                for origin in part.node.origins
                if origin.op == "call_function"
            }
        )
        kind = "generated: reduction" if node.is_reduction() else "generated: pointwise"
        short = _short_bytes(node.get_nodes())
        yield Launch(kind, " ".join(origins), read_and_written, short)


def _uncounted_results(node: Any) -> int:
    """Bytes of an operator's results that inductor counts as zero.

    It does so if an in-place operator uses a result, because that is no MultiOutput.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    missing = 0
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    for written in {dep.name for dep in node.read_writes.writes}:
        if accesses.get(written) == 0:
            users = [user.node for user in node.scheduler.name_to_buf[written].users]
            for user in users:
                if isinstance(getattr(user, "node", None), ir.MultiOutput):
                    result = user.node.get_name()
                    missing += int(V.graph.get_numel(result)) * V.graph.get_dtype(result).itemsize
    return missing


def _short_bytes(parts: list[Any]) -> int:
    """How many bytes a generated reduction reads in runs shorter than a sector.

    A Triton program iterates over the reduced dimensions for a few neighbouring outputs. An input
    that is contiguous in neither direction is read a sector at a time for a few bytes, and another
    program reads the same sector again.
    """
    from torch._inductor.virtualized import V

    short: dict[str, int] = {}
    for part in parts:
        if not part.is_reduction():
            continue
        body = part._body
        for name in {read.name for read in part.read_writes.reads}:
            width = V.graph.get_dtype(name).itemsize
            size = int(V.graph.get_numel(name)) * width
            for index in body.get_all_read_expr(name):
                variables = index.free_symbols
                runs = [
                    _run(index, body, walked, sizes)
                    for walked, sizes in zip(body.vars, body.sizes, strict=True)
                    if variables & set(walked)
                ]
                if size > SECTOR_BYTES and max(runs, default=size) * width < SECTOR_BYTES:
                    short[name] = size
    return sum(short.values())


def _run(index: Any, body: Any, walked: Any, sizes: Any) -> int:
    """How many elements are contiguous when these dimensions vary, the last one fastest."""
    extents = [int(size) for size in sizes]
    longest = min(math.prod(extents), SECTOR_BYTES)
    place = dict.fromkeys((*body.iter_vars, *body.reduce_vars), 0)
    first = int(index.subs(place))
    for step in range(1, longest):
        rest = step
        for variable, extent in zip(reversed(walked), reversed(extents), strict=True):
            rest, place[variable] = divmod(rest, extent)
        if int(index.subs(place)) != first + step:
            return step
    return longest


def _bmm_flops(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left.numel() * right[-1]


def _kind_of_operator(name: str) -> str:
    if "attention" in name:
        return "attention"
    if "stepspan::add_product" in name or "stepspan.add_product" in name:
        return "gemm"  # the library's product, with a sum
    if "stepspan" in name:
        return "own"
    if "scaled_mm" in name:
        return FP8_PRODUCTS
    if "convolution" in name:
        return "conv"
    if any(word in name for word in ("mm", "linear", "scaled_dot")):
        return "gemm"
    return "other"


def _layout_of_cudnn(image: torch.Tensor, weight: torch.Tensor, _: object) -> torch.memory_format:
    last = torch.channels_last
    either = any(tensor.is_contiguous(memory_format=last) for tensor in (image, weight))
    return last if either else torch.contiguous_format


def _channels_last(module: nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dim() == 4:
                last = parameter.data.to(memory_format=torch.channels_last)
                setattr(owner, name, nn.Parameter(last, requires_grad=False))


def _register_device_guard() -> None:
    """Register a CUDA device guard that does nothing, for a torch built without CUDA.

    Indexing and copying, for example, need the guard even for fake tensors.
    """
    if getattr(_register_device_guard, "done", False):
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    base = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        try:
            subprocess.run(
                [
                    *(get_cpp_compiler(), "-std=c++20", "-shared", "-fPIC"),
                    *(f"-I{base / 'include'}", str(source), "-o", str(library)),
                    *(f"-L{base / 'lib'}", "-lc10"),
                ],
                check=True,
                capture_output=True,
            )
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            raise BenchError(
                "counting without a GPU needs a C++ compiler or a torch built with CUDA; "
                f"the compiler here fails ({type(error).__name__})"
            ) from error
        ctypes.CDLL(str(library))
    _register_device_guard.done = True  # type: ignore[attr-defined]
