"""One function that runs as a CUDA graph per input shape, and never compiles once it is frozen.

`PerShape` is the single place that decides, for every call of the compiled UNet, decoder or text
encoder, whether it compiles, replays a captured graph or falls back to eager. `Captured` is one
such graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.exc import RecompileError

from kernels_warmup.recipes import Recipe
from kernels_warmup.shapes import MOST_CHUNKS

logger = logging.getLogger(__name__)

TensorFunction = Callable[..., Any]
"""Takes tensors; returns one tensor or a tuple of them."""

GRAPHS_PER_FUNCTION = 64 * MOST_CHUNKS
"""How many shapes one function may be compiled for: nine sizes, with 1 to 64 latents each, a power
of two, and each number of chunks of text. Guidance doubles the images of a batch, of which there
are at most 32. Dynamo's own limit of 8 would silently run the ninth shape eagerly."""


@dataclass
class Fallbacks:
    """How many calls ran eagerly although the model is compiled.

    Attributes:
        cold: their shape was never warmed.
        recompiles: their shape was warm, but the compiler would have compiled it again.
    """

    cold: int = 0
    recompiles: int = 0


class PerShape:
    """Runs a function; on CUDA, replays it as one graph for each shape of its inputs.

    The caller owns what it returns: a later replay never overwrites it. While `frozen`, a call that
    would compile runs eagerly instead, so calling the function twice must give the same result.

    Attributes:
        has_graphs: whether it compiles or captures, each for one shape of its inputs.
        met: the shapes and types of the inputs that it has run with.
        frozen: whether compiling and capturing are forbidden.
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
        self.has_graphs = recipe.scope != "none" or self._replay != "none"
        self._pool = pool
        self._captured: dict[tuple[object, ...], Captured] = {}
        self.met: set[tuple[object, ...]] = set()
        self.frozen = False
        self.fallbacks = Fallbacks()

    def __call__(self, *inputs: torch.Tensor, buffers: int | None = None) -> Any:
        """Run the function.

        Args:
            buffers: the size of what the function reads besides its inputs, if that varies. Each
                size has a graph of its own, like a shape of the inputs.
        """
        key: tuple[object, ...] = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if buffers is not None:
            key += (buffers,)
        if not self.has_graphs:
            # The same code runs every shape, so no shape is cold and there is nothing to forbid.
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
            # This raises a typed error, before any part of the function has run; the compiler's
            # stance for the same purpose raises a bare RuntimeError.
            with torch._dynamo.config.patch(error_on_recompile=True):
                return self._run(inputs)
        except RecompileError as error:
            if not self.fallbacks.recompiles:
                # Logged once: every step would repeat it. The text names sizes and modules only.
                logger.warning("a call does not fit the compiled code and runs eagerly: %s", error)
            self.fallbacks.recompiles += 1
            return self._eagerly(inputs)

    def _run(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        if self._replay != "trees":
            return self.function(*inputs)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return _cloned(self.function(*inputs))

    def _eagerly(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        # The stance applies to the whole process; only this thread runs compiled functions.
        with torch.compiler.set_stance("force_eager"):
            return self.function(*inputs)

    def _first(self, key: tuple[object, ...], inputs: tuple[torch.Tensor, ...]) -> Any:
        # The limit is set around each call, because such settings belong to one thread.
        with torch._dynamo.config.patch(recompile_limit=GRAPHS_PER_FUNCTION):
            result = self._run(inputs)
            if self._replay == "captured":
                self._captured[key] = Captured(self.function, inputs, self._pool)
        self.met.add(key)
        return result


class Captured:
    """A function captured as one CUDA graph, with input and output tensors of its own.

    The graph reads weights and text buffers at the addresses that they had during capture.
    Inductor's graph trees are no alternative: they check the guards of a few thousand weights
    before each replay, and return an output that the next replay overwrites.
    """

    def __init__(
        self,
        function: TensorFunction,
        inputs: tuple[torch.Tensor, ...],
        pool: Any,
    ) -> None:
        # Outside inference mode, because an inference tensor cannot be refilled outside it.
        with torch.inference_mode(False), torch.no_grad():
            device = inputs[0].device
            self._inputs = tuple(torch.empty_like(t, device=device).copy_(t) for t in inputs)
            side_stream = _side_stream(device)
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                # Twice: the first call may still tune or load something, which a graph cannot hold.
                for _ in range(2):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side_stream)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may go on using CUDA while this one captures.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._output = function(*self._inputs)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        """Copy the inputs in, replay the graph, and return a copy of its output."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return _cloned(self._output)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which functions run before they are captured.

    It is one for all of them, because PyTorch keeps a workspace for cuBLAS, 32 MiB on Hopper, for
    each stream that has ever run a product.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _cloned(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(tensor.clone() for tensor in result)
    return result.clone()
