"""Weights of words in a prompt: `a (red:1.3) circle`.

`parse` takes the weights out of a text; `weigh` applies them to what a text encoder made of it. The
rule is that of sd_embed and of diffusers' community pipeline for long prompts: a token's state is
moved along the line from the last state of its chunk, which is that of its end or its padding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

MOST_WEIGHT = 2.0

_PIECE = re.compile(
    r"\\(?P<escaped>[()])"
    r"|(?P<open>\()"
    r"|:\s*(?P<weight>[0-9]{1,3}(?:\.[0-9]{0,6})?|\.[0-9]{1,6})\s*\)"
    r"|(?P<close>\))"
    r"|.",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class WeightedText:
    """A text without its weights, and the weight of each of its characters; none: all have 1."""

    text: str
    weights: tuple[float, ...] = ()

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1 for weight in self.weights)


def parse(text: str) -> WeightedText:
    r"""Take the weights out of a text.

    `(words:1.3)` gives words a weight from 0 to `MOST_WEIGHT`. Weights inside each other multiply,
    up to `MOST_WEIGHT`. What does not have this form is text: a parenthesis without a weight or
    without its other half, another number. `\(` and `\)` are parentheses of the text.
    """
    pieces = list(_PIECE.finditer(text))
    weight_from, weight_ends = _matched(pieces)
    characters: list[str] = []
    weights: list[float] = []
    around = [1.0]
    for index, piece in enumerate(pieces):
        if index in weight_from:
            around.append(min(around[-1] * weight_from[index], MOST_WEIGHT))
        elif index in weight_ends:
            around.pop()
        else:
            shown = piece["escaped"] or piece[0]
            characters.append(shown)
            weights += [around[-1]] * len(shown)
    return WeightedText("".join(characters), tuple(weights))


def _matched(pieces: list[re.Match[str]]) -> tuple[dict[int, float], set[int]]:
    """The parentheses around words with a weight, as indices of pieces: the opening ones with their
    weights, and the closing ones."""
    weight_from: dict[int, float] = {}
    weight_ends: set[int] = set()
    opened: list[int] = []
    for index, piece in enumerate(pieces):
        if piece.lastgroup == "open":
            opened.append(index)
        elif opened and piece.lastgroup in ("close", "weight"):
            begin = opened.pop()
            if piece["weight"] and float(piece["weight"]) <= MOST_WEIGHT:
                weight_from[begin] = float(piece["weight"])
                weight_ends.add(index)
    return weight_from, weight_ends


def weigh(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Apply weights (chunks, tokens) to the hidden states (chunks, tokens, width) of an encoder.

    A state with a weight of 1 stays the same to the bit.
    """
    return torch.lerp(hidden[:, -1:], hidden, weights.to(hidden.dtype).unsqueeze(-1))
