"""Loading a model onto its device: the demo, a directory, a hub repository, or random weights."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from kernels_warmup.shapes import DEMO_SHAPES, SDXL_SHAPES, CompiledShape
from serve.demo_model import checkpoint_path
from serve.errors import ModelError
from serve.model.hub import (
    REPOSITORY,
    HubUnavailable,
    downloaded_before,
    first_line,
    hub_failure,
    say_commit,
    variant_on_hub,
)
from serve.model.schedulers import OWN_SCHEDULE, Schedule
from serve.model.sdxl import SdxlModel
from serve.model.weights import non_finite_tensor
from serve.settings import DEMO_MODEL, RANDOM_SDXL_BASE, SDXL_BASE, SDXL_BASE_COMMIT

logger = logging.getLogger(__name__)

_PARTS = (
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def load_model(
    name: str | None,
    revision: str | None = None,
    device_name: str = "auto",
    dtype_name: str = "auto",
    schedule: Schedule = OWN_SCHEDULE,
) -> SdxlModel:
    """Load a model onto its device, and make a GPU with a number the calling thread's current one.

    Args:
        name: `demo`, `random:sdxl-base`, a hub repository or a local directory; None: SDXL base
            on a CUDA device, else the demo.
        revision: a branch, tag or commit of a hub repository; None: its main branch, and of SDXL
            base `SDXL_BASE_COMMIT`.
        schedule: the scheduler and the timesteps, where they are not the model's own.

    Raises:
        ModelError: there is no such model, it is not a complete SDXL pipeline, or it cannot run at
            these timesteps.
    """
    device = choose_device(device_name)
    if device.index is not None:
        # Streams, events, captured graphs and Triton's launches are the current device's, and a
        # thread begins with number 0. A graph captured there would be empty: each replay would
        # return the same image.
        torch.cuda.set_device(device)
    dtype = _DTYPES[dtype_name] if dtype_name != "auto" else _default_dtype(device)
    if name is None:
        name = SDXL_BASE if device.type == "cuda" else DEMO_MODEL
    if name == SDXL_BASE:
        revision = revision or SDXL_BASE_COMMIT
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if name == RANDOM_SDXL_BASE:
        pipeline = _build_random(device, dtype)
        return SdxlModel(pipeline, "sdxl-base-random", device, SDXL_SHAPES, schedule)
    if name == DEMO_MODEL:
        pipeline = _on_device(name, _load_directory(checkpoint_path(), dtype), device)
        return SdxlModel(pipeline, "demo", device, DEMO_SHAPES, schedule)
    # Of os.path, which raise for no text: a user that is not there, a name that is too long.
    directory = Path(os.path.expanduser(name))
    commit = None
    if os.path.isdir(directory):
        pipeline = _load_directory(directory, dtype)
        label = directory.resolve().name
    elif re.fullmatch(REPOSITORY, name):
        pipeline = _load_hub(name, revision, dtype)
        label = name.split("/")[-1]
        if (downloaded := downloaded_before(name, revision)) is not None:
            commit = say_commit("SDXL_MODEL_REVISION=", downloaded, revision)
    else:
        raise ModelError(
            f"SDXL_MODEL={name!r} is neither a directory here nor a hub repository like "
            f"{SDXL_BASE}; `{DEMO_MODEL}` and `{RANDOM_SDXL_BASE}` need no download."
        )
    pipeline = _on_device(name, pipeline, device)
    model = SdxlModel(pipeline, label, device, _trained_shapes(pipeline), schedule)
    model.commit = commit
    return model


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if there is a CUDA device, else the CPU.

    Raises:
        ModelError: there is no such CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"SDXL_DEVICE={name}: this machine has {torch.cuda.device_count()} CUDA devices "
            "that torch can use."
        )
    return device


def _default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _load_directory(directory: Path, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    if not (directory / "model_index.json").is_file():
        raise ModelError(
            f"{directory} holds no model_index.json: a directory in diffusers layout is needed."
        )
    halves = any((directory / "unet").glob("*.fp16.safetensors"))
    return _from_pretrained(
        str(directory), dtype, variant="fp16" if halves else None, local_files_only=True
    )


def _load_hub(name: str, revision: str | None, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    # Download each file in parallel ranges. The hub's client reads this when a download starts.
    os.environ.setdefault("HF_XET_HIGH_PERFORMANCE", "1")
    try:
        variant = variant_on_hub(name, revision)
    except HubUnavailable as error:
        directory = downloaded_before(name, revision)
        if directory is None:
            raise ModelError(
                f"the model {name!r} was not downloaded before, and {error}."
            ) from None
        logger.warning("%s: %s; what was downloaded before is used", name, error)
        return _load_directory(directory, dtype)
    return _from_pretrained(name, dtype, variant=variant, revision=revision)


def _from_pretrained(name: str, dtype: torch.dtype, **options: Any) -> StableDiffusionXLPipeline:
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            name,
            dtype=dtype,
            # Pickled weights run code when loaded.
            use_safetensors=True,
            add_watermarker=False,
            **options,
        )
    except Exception as error:  # noqa: BLE001 - of four libraries' errors; all mean the same here
        # About local files they quote no more than the files.
        local = f"{type(error).__name__}: {first_line(error)}"
        local_only = options.get("local_files_only")
        why = local if local_only else hub_failure(error, options.get("revision"))
        raise ModelError(f"the model at {name!r} could not be loaded: {why}") from None
    for part in _PARTS:
        module = getattr(pipeline, part)
        if module is None:
            raise ModelError(
                f"the model at {name!r} is not a complete SDXL pipeline: it lacks {part}."
            )
        if isinstance(module, torch.nn.Module) and any(p.is_meta for p in module.parameters()):
            raise ModelError(f"the model at {name!r} lacks weights of its {part}.")
    if dtype == torch.float16 and pipeline.vae.config.force_upcast:
        # This VAE overflows in float16; bfloat16 has the range of float32. diffusers would recast
        # it on every call, which breaks captured graphs.
        pipeline.vae.to(torch.bfloat16)
    return pipeline


def _on_device(
    name: str, pipeline: StableDiffusionXLPipeline, device: torch.device
) -> StableDiffusionXLPipeline:
    """Move the pipeline, and check its weights there, where that is fast."""
    pipeline = pipeline.to(device)
    tensor = non_finite_tensor({part: getattr(pipeline, part) for part in _PARTS})
    if tensor is not None:
        raise ModelError(
            f"the model at {name!r} cannot draw: {tensor} has values that are not finite as "
            f"{str(pipeline.unet.dtype).removeprefix('torch.')}; the file is damaged, or needs "
            "another SDXL_DTYPE."
        )
    return pipeline


def _build_random(device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    from transformers import CLIPTokenizer

    from serve.model.sdxl_base import build_random_sdxl_base

    tokenizer = CLIPTokenizer.from_pretrained(checkpoint_path() / "tokenizer")
    return build_random_sdxl_base(tokenizer, device, dtype)


def _trained_shapes(pipeline: StableDiffusionXLPipeline) -> tuple[CompiledShape, ...]:
    """SDXL's sizes for a UNet of SDXL's sample size, else the square of its own sample size."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if side == SDXL_SHAPES[0].width:
        return SDXL_SHAPES
    return (CompiledShape(side, side),)
