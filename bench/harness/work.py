"""What every request of a run does, and whether a scenario can run on this machine.

torch is imported inside functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.errors import BenchError
from bench.harness.scenarios import KERNELS, Scenario
from kernels_warmup.shapes import CompiledShape
from serve.settings import DEMO_MODEL

PROMPT = "a small red circle left of a large blue square on a white background"
GUIDANCE = 5.0
"""The default of diffusers and of the service."""


@dataclass(frozen=True)
class Work:
    """The model, the device, the image size and the steps of every request of a run."""

    model: str
    device: str
    """As torch names it."""
    shape: CompiledShape
    steps: int

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


def device_named(name: str) -> str:
    """The device that the service chooses for this SDXL_DEVICE, as torch names it.

    Raises:
        BenchError: there is no such device.
    """
    from serve.errors import ModelError
    from serve.model.loading import choose_device

    try:
        return str(choose_device(name))
    except (ModelError, RuntimeError) as error:
        raise BenchError(str(error)) from None


def choose_work(model: str | None, device: str, shape: str | None, steps: int) -> Work:
    """Choose the device, the model and the size where they are left open, as the service does.

    Raises:
        BenchError: the device, the size or the number of steps is not allowed.
    """
    from serve.settings import SDXL_BASE

    if steps < 2:
        raise BenchError(f"{steps} steps are not enough: the first is not steady; use 2 or more")
    found = device_named(device)
    try:
        size = None if shape is None else CompiledShape.parse(shape)
    except ValueError as error:
        raise BenchError(str(error)) from None
    if model is None:
        model = SDXL_BASE if found.startswith("cuda") else DEMO_MODEL
    if size is None:
        side = 128 if model == DEMO_MODEL else 1024
        size = CompiledShape(side, side)
    return Work(model, found, size, steps)


def dtype_name(scenario: Scenario, work: Work) -> str:
    """The dtype of the UNet, by torch's name."""
    if scenario.dtype == "half":
        return "float16" if work.on_cuda else "float32"
    if scenario.dtype == "auto":
        return "bfloat16" if work.on_cuda else "float32"
    return scenario.dtype


class CannotRun(Exception):
    """A scenario needs something that this machine lacks. The message is a sentence saying what."""


class ScenarioFailed(CannotRun):
    """A scenario was tried on this machine and failed."""


def check_can_run(scenario: Scenario, work: Work) -> None:
    """Raise CannotRun if the scenario needs another device, or something that is missing here."""
    if scenario.cuda_only and not work.on_cuda:
        raise CannotRun("it needs a CUDA device, and this machine has none")
    if scenario.cpu_only and work.on_cuda:
        raise CannotRun("it is for a CPU, and this device is a GPU")
    if scenario.quantize != "none":
        import torch

        from kernels_warmup.quantize import why_unusable as why_unquantizable

        reason = why_unquantizable(
            scenario.quantize,  # type: ignore[arg-type]
            torch.device(work.device),
        )
        if reason is not None:
            raise CannotRun(reason)
    if any((scenario.recipe or {}).get(field) for field in KERNELS):
        import torch

        try:
            from kernels_warmup.triton import why_unusable as why_no_kernels
        except ImportError:
            raise CannotRun("that commit has no kernels of its own") from None
        reason = why_no_kernels(
            torch.device(work.device), getattr(torch, dtype_name(scenario, work))
        )
        if reason is not None:
            raise CannotRun(reason)
    if scenario.attention != "auto":
        import torch

        from kernels_warmup.attention import why_unusable

        reason = why_unusable(
            scenario.attention,  # type: ignore[arg-type]
            torch.device(work.device),
            getattr(torch, dtype_name(scenario, work)),
        )
        if reason is not None:
            raise CannotRun(reason)


def one_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    # The prompt is the bench's own, so the message holds no user's text.
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
