"""What an exception of a run means for its requests."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

from serve.errors import DeviceLost, GenerationFailed, OutOfMemory, RequestError
from serve.model.hub import first_line

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)
"""What torch and Triton say in a plain RuntimeError if memory is lacking for something that torch's
GPU allocator does not allocate: tensors on the CPU, the driver's and the libraries' own memory,
kernels that are loaded."""


def explain_failure(
    error: Exception, device: torch.device, own_prompt: bool = False
) -> RequestError:
    """Map an exception of a run to a row of the failure table. Call it on the GPU thread.

    The exception's own text is neither kept nor logged: the message of a tokenizer or of another
    library may quote the prompt.

    Args:
        device: the model's device. On CUDA it is synchronised, to find out whether it still works.
        own_prompt: the prompt is none of a user's, so the first line of the text is logged. In the
            warm-up only that line names a compiler that is missing, or how much memory is.
    """
    if isinstance(error, RequestError):
        return error
    logger.error(
        "a run failed with %s%s\n%s",
        type(error).__name__,
        f": {first_line(error)}" if own_prompt else "",
        "".join(traceback.format_tb(error.__traceback__)),
    )
    failure: RequestError
    if _is_lost(device):
        failure = DeviceLost()
    elif _is_out_of_memory(error):
        _free_memory(error)
        failure = OutOfMemory()
    else:
        failure = GenerationFailed(type(error).__name__)
    failure.cause_type = type(error).__name__
    return failure


def clear_frames(error: BaseException | None) -> None:
    """Drop the local variables of the ended frames that an exception and its contexts refer to.

    They would keep a run's tensors alive as long as the exception.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _is_lost(device: torch.device) -> bool:
    """Whether the CUDA context is broken: then every later call on it fails too."""
    if device.type != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return any(each in text for each in _OUT_OF_MEMORY)


def _free_memory(error: Exception) -> None:
    import torch

    clear_frames(error)
    torch.cuda.empty_cache()
