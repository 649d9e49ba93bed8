"""A prompt's tokens, in chunks that a text encoder can read.

CLIP's text encoders read 77 tokens: a start, 75 of the text and an end. A longer prompt is encoded
in chunks of 75, each with a start and an end of its own. The encoders' hidden states of a text's
chunks are joined along the tokens, so that the UNet attends to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class PromptRules:
    """How prompts are read.

    Attributes:
        most_chunks: chunks of 75 tokens that are read of a prompt; what is beyond them is cut.
    """

    most_chunks: int = 1


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The tokens of some texts, of one tokenizer.

    Attributes:
        ids: (texts x chunks, 77) in host memory, the chunks of a text one after the other.
        counts: for each text its number of tokens, its start and end included, before it was cut.
        cut: for each text, whether it was cut.
    """

    ids: torch.Tensor
    counts: tuple[int, ...]
    cut: tuple[bool, ...]


def tokenise(tokenizer: Any, texts: Sequence[str], chunks: int = 1) -> PromptTokens:
    """Tokenise texts, each cut or padded to this number of chunks.

    The ids of one chunk are those of CLIP's tokenizer with truncation and padding. Those options
    would not say which texts were cut; finding out would take a second call. A chunk without text
    is an empty text.

    Several threads may use one tokenizer: without truncation and padding it keeps no state.
    """
    length = tokenizer.model_max_length
    room = chunks * (length - 2)
    # Not verbose: the library would warn of long texts, which the result reports.
    whole: list[list[int]] = tokenizer(list(texts), verbose=False).input_ids
    ids = [row for each in whole for row in _rows(each, length, tokenizer.pad_token_id, chunks)]
    counts = tuple(map(len, whole))
    return PromptTokens(torch.tensor(ids), counts, tuple(count - 2 > room for count in counts))


def count_chunks(tokenizer: Any, texts: Sequence[str]) -> int:
    """How many chunks the longest of these texts needs; 1 for an empty one."""
    room: int = tokenizer.model_max_length - 2
    whole: list[list[int]] = tokenizer(list(texts), verbose=False).input_ids
    longest = max(map(len, whole)) - 2
    return max(1, -(-longest // room))


def _rows(ids: list[int], length: int, fill: int, chunks: int) -> list[list[int]]:
    """A text's ids in rows of `length`, each with the text's start and end."""
    start, *content, end = ids
    room = length - 2
    rows = []
    for first in range(0, chunks * room, room):
        row = [start, *content[first : first + room], end]
        rows.append(row + [fill] * (length - len(row)))
    return rows
