"""From a key of a LoRA file to a module of the model.

A LoRA file names a module in one of three ways, here for the same module:

    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight       PEFT, diffusers since it uses PEFT
    unet.down_blocks.1.attentions.0.proj_in.lora.down.weight    diffusers before
    lora_unet_input_blocks_4_1_proj_in.lora_down.weight         kohya, by the names of SGM's UNet
    lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight   kohya, by diffusers' names

The names are looked up in a table that is made from the model's own modules. diffusers' converter
rewrites each name by a chain of replacements instead: it cannot say which key of the file does not
fit, and quotes all keys in its errors. A test holds this table to that converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The parts of the pipeline that a LoRA may change."""

Role = Literal["down", "up", "alpha"]

_ENDINGS: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"\.lora_A(\.[A-Za-z0-9_-]+)?\.weight$"), "down"),
    (re.compile(r"\.lora_B(\.[A-Za-z0-9_-]+)?\.weight$"), "up"),
    (re.compile(r"(\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)down\.weight$"), "down"),
    (re.compile(r"(\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)up\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
)

_OTHER_KINDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.lora_mid\."), "a LoCon with a middle product (lora_mid)"),
    (re.compile(r"\.hada_"), "a LoHa"),
    (re.compile(r"\.lokr_"), "a LoKr"),
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)"), "a DoRA"),
    (re.compile(r"\.oft_"), "an OFT"),
    (re.compile(r"\.on_input$"), "an IA3"),
    (re.compile(r"\.(diff|diff_b|w_norm|b_norm|set_weight)$"), "a file of whole differences"),
    (re.compile(r"(\.lora_B(\.[A-Za-z0-9_-]+)?|\.lora_up|\.lora_bias|\.base_layer)\.bias$"),
     "a LoRA with biases"),
    (re.compile(r"\.lora_embedding_[AB]"), "a LoRA of embeddings"),
)  # fmt: skip

_PROCESSOR = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What diffusers before PEFT calls the projections of a text encoder's attention."""

_KOHYA_PARTS = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te1_", "lora_te_"),
    "text_encoder_2": ("lora_te2_",),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A module that a LoRA may change: the part of the pipeline, and its name there."""

    part: str
    module: str


def other_kind(key: str) -> str | None:
    """What a file with this key is, if it is something else than a LoRA."""
    return next((kind for pattern, kind in _OTHER_KINDS if pattern.search(key)), None)


class Names:
    """The modules of a pipeline that a LoRA may change, by every name that a file may give them."""

    def __init__(self, pipeline: Any) -> None:
        self._targets: dict[str, Target] = {}
        for part in PARTS:
            module = getattr(pipeline, part)
            for name, child in module.named_modules():
                if isinstance(child, nn.Linear | nn.Conv2d):
                    for spelling in _spellings(part, name, pipeline.unet.config):
                        self._targets[spelling] = Target(part, name)

    def find(self, key: str) -> tuple[Target, Role] | None:
        """The module that a key of a file is about, and what of it the key has; None: no module
        of this model."""
        for pattern, role in _ENDINGS:
            if pattern.search(key):
                target = self._targets.get(_plain(pattern.sub("", key)))
                return None if target is None else (target, role)
        return None


def _plain(name: str) -> str:
    """A module's name as the table has it, whichever library wrote it."""
    if name.startswith("lora_"):
        return name
    found = re.match(r"(?:(unet|text_encoder_2|text_encoder)\.)?(?:base_model\.model\.)?", name)
    assert found is not None
    part, rest = found[1], name[found.end() :]
    if part is None:
        # A file for one part alone names none, or names it behind PEFT's own prefix.
        inner = re.match(r"(unet|text_encoder_2|text_encoder)\.", rest)
        part, rest = (inner[1], rest[inner.end() :]) if inner else ("unet", rest)
    rest = rest.replace(".processor.", ".")
    if part == "unet":
        rest = re.sub(r"\.to_out$", ".to_out.0", rest)
    else:
        rest = rest.removeprefix("text_model.")
        rest = re.sub(r"(?<=\.self_attn\.)to_\w+$", lambda m: _PROCESSOR.get(m[0], m[0]), rest)
    return f"{part}.{rest}"


def _spellings(part: str, name: str, unet_config: Mapping[str, Any]) -> Iterator[str]:
    """A module's names: the one that `_plain` gives, and kohya's."""
    # The library's releases differ in whether the first encoder has this prefix; files have it.
    plain = name if part == "unet" else name.removeprefix("text_model.")
    yield f"{part}.{plain}"
    in_files = [plain]
    if part != "unet":
        # The projection stands beside the text model, not inside it.
        in_files = [plain if plain == "text_projection" else f"text_model.{plain}"]
    elif (sgm := sgm_name(name, unet_config)) is not None:
        in_files.append(sgm)
    for prefix in _KOHYA_PARTS[part]:
        for each in in_files:
            yield prefix + each.replace(".", "_")


_SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SGM_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def sgm_name(name: str, unet_config: Mapping[str, Any]) -> str | None:
    """The name of a module of diffusers' SDXL UNet in Stability's own code, which kohya's trainer
    uses; None: it has none."""
    if name in _SGM_OUTSIDE:
        return _SGM_OUTSIDE[name]
    layers = unet_config["layers_per_block"]
    if not isinstance(layers, int):
        return None
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
    if found is None:
        return None
    side, block, kind, layer, inside = (
        found[1],
        int(found[2] or 0),
        found[3],
        int(found[4]),
        found[5],
    )
    inside = _SGM_RESNET.get(inside, inside)
    if side is None:
        middle = _SGM_MIDDLE.get(f"{kind}.{layer}")
        return None if middle is None else f"middle_block.{middle}.{inside}"
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + first + layers}.0.op"
    if kind == "upsamplers":
        attends = "CrossAttn" in unet_config["up_block_types"][block]
        return f"output_blocks.{first + layers}.{2 if attends else 1}.{inside}"
    place = {"resnets": 0, "attentions": 1}[kind]
    if side == "down":
        return f"input_blocks.{1 + first + layer}.{place}.{inside}"
    return f"output_blocks.{first + layer}.{place}.{inside}"
