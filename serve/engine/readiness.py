"""Where the process is in its life, as `/ready` reports it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from kernels_warmup.shapes import CompiledShape


class State(StrEnum):
    """Where the process is in its life."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(slots=True)
class Readiness:
    """The body of `/ready`. Written by the start-up and by `drain`; everything else only reads. The
    runtime takes a batch size away that ran out of memory.

    With `SDXL_READY_EARLY` the start-up adds shapes while requests are served.

    Attributes:
        model_commit: the commit of the hub's repository; None: the model is not from the hub.
        phase: the start-up's phase, then `ready`, then `draining`.
        reason: why the start failed; empty if it did not.
        shapes: the shapes that are warm; the first is the default size.
        planned_shapes: the shapes that the start-up warms; empty until the model is loaded.
        batch_sizes: for each warm shape, the numbers of images that a run may have, ascending.
            Written on the GPU thread.
        phases_ms: duration of each finished phase of the start-up.
        compile: how the model was prepared to run, and what the compiler did.
        scheduler: its `kind` and `spacing`, and what is `wrong` with them for this checkpoint.
        left_out: the shapes that could not be warmed, and the type of the error of each.
        loras: the names of the LoRAs that requests may use.
        lora_bytes: memory on the device for them, and for the weights that they change as they were
            loaded.
        cpu_threads: describes the threads that compute on the CPU, as they are now.
    """

    state: State = State.STARTING
    phase: str = "not started"
    reason: str = ""
    model: str = ""
    model_commit: str | None = None
    device: str = ""
    shapes: tuple[CompiledShape, ...] = ()
    planned_shapes: tuple[CompiledShape, ...] = ()
    batch_sizes: dict[CompiledShape, tuple[int, ...]] = field(default_factory=dict)
    phases_ms: dict[str, float] = field(default_factory=dict)
    compile: dict[str, str | int | float] = field(default_factory=dict)
    scheduler: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    lora_bytes: int = 0
    draining: bool = False
    _on_drain: list[Callable[[], object]] = field(default_factory=list, repr=False)
    cpu_threads: Callable[[], dict[str, Any]] = dict

    def drain(self) -> None:
        """No request is accepted from now on. A failed start stays failed."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING
        self.phase = "draining"
        self.draining = True
        for callback in list(self._on_drain):
            callback()

    @contextmanager
    def when_draining(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call `callback` when the drain begins within the block, at once if it has begun already.

        Whoever drains calls it, on any thread.
        """
        self._on_drain.append(callback)
        try:
            if self.draining:
                callback()
            yield
        finally:
            self._on_drain.remove(callback)

    def as_json(self) -> dict[str, Any]:
        return {
            "state": self.state.value,
            "phase": self.phase,
            "reason": self.reason,
            "model": self.model,
            "model_commit": self.model_commit,
            "device": self.device,
            "shapes": [str(shape) for shape in self.shapes],
            "batch_sizes": {str(shape): sizes for shape, sizes in self.batch_sizes.items()},
            "left_out": self.left_out,
            "warmup_ms": self.phases_ms,
            "compile": self.compile,
            "scheduler": self.scheduler,
            "loras": list(self.loras),
            "lora_bytes": self.lora_bytes,
            "cpu_threads": self.cpu_threads(),
        }
