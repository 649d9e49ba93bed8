"""From a source in `SDXL_LORAS` to a safetensors file on this machine.

A source is one of:

    demo:NAME                                 a LoRA for the demo model, shipped with this package
    PATH                                      a .safetensors file, or a directory with one
    OWNER/REPO[/FILE][@REVISION]              a repository on the hub
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from serve.demo_model import loras_path
from serve.errors import ModelError
from serve.model.hub import HUB_SECONDS, REPOSITORY, hub_failure, say_commit
from serve.model.loras.files import PEFT_CONFIG
from serve.settings.fields import stays_inside

logger = logging.getLogger(__name__)

DEMO = "demo:"
USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the file. Of several files it is taken."""

_HUB = re.compile(
    rf"(?P<name>{REPOSITORY})(/(?P<file>[^@]+\.safetensors))?"
    r"(@(?P<revision>[^@\s]+))?"
)
_MOST_SHOWN = 5


def find_file(name: str, source: str) -> Path:
    """The file of a LoRA; one on the hub is downloaded.

    Args:
        name: what requests call it, for the error.

    Raises:
        ModelError: there is no such file, or several and none is named.
    """
    if source.startswith(DEMO):
        return _shipped(name, source.removeprefix(DEMO))
    # Of os.path, which raise for no text: a user that is not there, a name that is too long.
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        files = sorted(each.name for each in path.glob("*.safetensors"))
        return path / _only(name, f"the directory {source}", files, f"{source}/FILE")
    hub = _HUB.fullmatch(source)
    if hub is not None and all(map(stays_inside, (hub["file"] or "", hub["revision"] or ""))):
        found = _download(name, hub["name"], hub["file"], hub["revision"])
        say_commit(f"SDXL_LORAS={name}={source.partition('@')[0]}@", found, hub["revision"])
        return found
    raise ModelError(
        f"SDXL_LORAS: {name}={source} is neither a file or directory here nor a hub repository "
        "like OWNER/REPO@REVISION."
    )


def _shipped(name: str, shipped: str) -> Path:
    files = {each.stem: each for each in sorted(loras_path().glob("*.safetensors"))}
    if shipped not in files:
        allowed = ", ".join(files) or "none"
        raise ModelError(
            f"SDXL_LORAS: {name}={DEMO}{shipped}: no such LoRA is shipped; these are: {allowed}."
        )
    return files[shipped]


def _only(name: str, where: str, files: Sequence[str], spelling: str) -> str:
    """The one file, or the one with a usual name."""
    usual = [each for each in USUAL_NAMES if each in files]
    if len(files) == 1 or usual:
        return usual[0] if usual else files[0]
    if not files:
        raise ModelError(f"SDXL_LORAS: {name}: {where} has no .safetensors file.")
    shown = ", ".join(files[:_MOST_SHOWN]) + (", ..." if len(files) > _MOST_SHOWN else "")
    raise ModelError(
        f"SDXL_LORAS: {name}: {where} has several .safetensors files ({shown}); name one of them "
        f"as {spelling}."
    )


def _download(name: str, repository: str, file: str | None, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        on_hub = _files_on_hub(repository, revision)
        if file is None:
            files = [each for each in on_hub if "/" not in each and each.endswith(".safetensors")]
            where = f"the hub repository {repository}"
            file = _only(name, where, sorted(files), f"{repository}/FILE")
        if PEFT_CONFIG in on_hub and "/" not in file:
            hf_hub_download(repository, PEFT_CONFIG, revision=revision)
        return Path(hf_hub_download(repository, file, revision=revision))
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - the library's HTTP client raises many types
        reason = hub_failure(error, revision)
        before = _downloaded_before(repository, file, revision)
        if before is None:
            raise ModelError(
                f"SDXL_LORAS: {name}: the LoRA {repository} was not downloaded before, and "
                f"{reason}."
            ) from None
        logger.warning("%s: %s; what was downloaded before is used", repository, reason)
        return before


def _files_on_hub(repository: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=revision, timeout=HUB_SECONDS)
    return [each.rfilename for each in info.siblings or []]


def _downloaded_before(repository: str, file: str | None, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for each in USUAL_NAMES if file is None else (file,):
        found = try_to_load_from_cache(repository, each, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None
