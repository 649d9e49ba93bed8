"""What torch's compiler would launch on a Hopper GPU, worked out on a machine without one.

The model is built of fake tensors on a `cuda` device that is not there, traced, and lowered by
inductor as it does for an H200, up to the code it would hand to Triton. Nothing is compiled or run,
so it needs neither Triton nor a GPU, and a full-size UNet takes a minute on one core. What only a
timing can decide (tuned products, convolution algorithms) is left at the library's choice.

Inductor's insides are private: this is the one file that touches them.
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
"""What inductor asks a device about itself."""

SECTOR_BYTES = 32
"""The least that device memory gives; a run of fewer bytes pays for all of them."""

FP8_PRODUCTS = "gemm, fp8"

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""


@dataclass(frozen=True)
class Launch:
    """One kernel as inductor would launch it.

    Attributes:
        kind: as `kernels.KINDS` has them, `own` for kernels of our own, `FP8_PRODUCTS`.
        name: the library's operator, or the operators a generated kernel was fused from.
        bytes: of every buffer it reads or writes, each counted once.
        short_bytes: of those, what a generated reduction reads in runs of under a sector.
    """

    kind: str
    name: str
    bytes: int
    short_bytes: int = 0


@dataclass(frozen=True)
class Lowered:
    """One function's launches, and the FLOPs of its products, convolutions and attention."""

    launches: tuple[Launch, ...]
    flops: dict[str, int]
    """By kind."""


@contextlib.contextmanager
def pretended_gpu() -> Iterator[FakeTensorMode]:
    """Inside it, torch believes that there is an H200, as long as all tensors are fake.

    Raises:
        BenchError: this torch was built without CUDA, and there is no C++ compiler to stand in
            for what that leaves out.
    """
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        _stand_in_for_the_device_guard()
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
        # Without cuDNN torch would say that a convolution's result is never channels_last.
        "torch._C._conv_determine_backend_memory_format": _layout_of_cudnn,
        # Its patterns are traced with real tensors, and match nothing that names its attention.
        "torch._inductor.fx_passes.joint_graph.lazy_init": lambda *_, **__: None,
        # Both ask an installed Triton, which the code up to here does not need.
        "torch._inductor.scheduler.has_triton": lambda *_: True,
        "torch.utils._triton.triton_hash_with_backend": lambda *_: "none",
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer, create=True))
        # Initial values are nobody's concern, and drawing them would want the device.
        for name in ("uniform_", "normal_", "kaiming_uniform_", "zeros_", "ones_"):
            stack.enter_context(
                mock.patch(f"torch.nn.init.{name}", lambda tensor, *_, **__: tensor)
            )
        # Module.to() cannot exchange the parameters for fake ones.
        stack.enter_context(mock.patch("kernels_warmup.compile.channels_last", _channels_last))
        stack.enter_context(torch.no_grad())
        yield FakeTensorMode(allow_non_fake_inputs=True)


def fake_module(make: Callable[[], nn.Module], dtype: torch.dtype) -> Any:
    """A module whose weights are fake and on the device that is not there; call it within the
    mode that `pretended_gpu` gives."""
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
    """What `torch.compile(function)` would launch for these inputs; `module` holds its weights."""
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def of_tensors(weights: list[torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
        # Weights are inputs here: as constants of the graph, inductor would read their values.
        with _reparametrize_module(module, dict(zip(state, weights, strict=True))):
            return function(*given)

    weights = list(state.values())
    # The counter takes bmm's `out_dtype` for its own argument.
    mapping = {torch.ops.aten.bmm: _bmm_flops}
    with mode, FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function(*inputs)
    with mode:
        traced = make_fx(of_tensors, decomposition_table=select_decomp_table())(weights, *inputs)
    flat = [*weights, *inputs]
    # Folding would compute the constants on the device.
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
                continue  # names one result of the operator before it
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
    """Bytes of an operator's results that inductor counts as none.

    It gives up on a result that an operator in place waits for, since that is no MultiOutput.
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

    A program walks the reduced dimensions for a few neighbouring outputs. What lies side by side in
    neither direction is fetched a sector at a time for the few bytes that are wanted, and again by
    another program.
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
    """How many elements lie side by side when these dimensions are walked, the last one fastest."""
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
        return "gemm"  # the library's own, with a sum
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


def _stand_in_for_the_device_guard() -> None:
    """Give torch a CUDA device guard that does nothing, where it was built without any.

    Indexing, copying and the like ask for the guard before they ask what kind of tensor it is.
    """
    if getattr(_stand_in_for_the_device_guard, "done", False):
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
    _stand_in_for_the_device_guard.done = True  # type: ignore[attr-defined]
