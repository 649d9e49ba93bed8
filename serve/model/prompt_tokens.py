"""A prompt's tokens, in chunks that a text encoder can read.

CLIP's text encoders read 77 tokens: a start, 75 of the text and an end. A longer prompt is encoded
in chunks of 75, each with a start and an end of its own. The encoders' hidden states of a text's
chunks are joined along the tokens, so that the UNet attends to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from serve.model.prompt_weights import WeightedText, parse

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PromptRules:
    """How prompts are read.

    Attributes:
        most_chunks: chunks of 75 tokens that are read of a prompt; what is beyond them is cut.
        weighted: `(words:1.3)` gives words a weight; otherwise it is text.
    """

    most_chunks: int = 1
    weighted: bool = False

    def read(self, texts: Sequence[str]) -> list[WeightedText]:
        """The texts that are encoded, with their weights."""
        return [parse(text) if self.weighted else WeightedText(text) for text in texts]


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The tokens of some texts, of one tokenizer.

    Attributes:
        ids: (texts x chunks, 77) in host memory, the chunks of a text one after the other.
        counts: for each text its number of tokens, its start and end included, before it was cut.
        cut: for each text, whether it was cut.
        weights: the weight of each id; None if all are 1.
    """

    ids: torch.Tensor
    counts: tuple[int, ...]
    cut: tuple[bool, ...]
    weights: torch.Tensor | None = None


def tokenise(tokenizer: Any, texts: Sequence[WeightedText], chunks: int = 1) -> PromptTokens:
    """Tokenise texts, each cut or padded to this number of chunks.

    The ids of one chunk are those of CLIP's tokenizer with truncation and padding. Those options
    would not say which texts were cut; finding out would take a second call. A chunk without text
    is an empty text.

    Several threads may use one tokenizer: without truncation and padding it keeps no state.
    """
    length = tokenizer.model_max_length
    room = chunks * (length - 2)
    is_weighted = any(text.is_weighted for text in texts)
    # Not verbose: the library would warn of long texts, which the result reports.
    whole = tokenizer(
        [text.text for text in texts], verbose=False, return_offsets_mapping=is_weighted
    )
    fill = tokenizer.pad_token_id
    ids = [row for each in whole.input_ids for row in _rows(each, length, fill, chunks)]
    weights = None
    if is_weighted:
        of_tokens = map(_token_weights, texts, whole.offset_mapping)
        rows = [row for each in of_tokens for row in _rows(each, length, 1.0, chunks)]
        weights = torch.tensor(rows)
    counts = tuple(map(len, whole.input_ids))
    cut = tuple(count - 2 > room for count in counts)
    return PromptTokens(torch.tensor(ids), counts, cut, weights)


def count_chunks(tokenizer: Any, texts: Sequence[WeightedText]) -> int:
    """How many chunks the longest of these texts needs; 1 for an empty one."""
    room: int = tokenizer.model_max_length - 2
    whole: list[list[int]] = tokenizer([text.text for text in texts], verbose=False).input_ids
    longest = max(map(len, whole)) - 2
    return max(1, -(-longest // room))


def _token_weights(text: WeightedText, offsets: list[tuple[int, int]]) -> list[float]:
    """The weight of each token: that of its first character. Start and end have none."""
    return [1.0, *(text.weights[first] for first, _ in offsets[1:-1]), 1.0]


def _rows(tokens: list[T], length: int, fill: T, chunks: int) -> list[list[T]]:
    """A text's tokens in rows of `length`, each with the text's start and end."""
    start, *content, end = tokens
    room = length - 2
    rows = []
    for first in range(0, chunks * room, room):
        row = [start, *content[first : first + room], end]
        rows.append(row + [fill] * (length - len(row)))
    return rows
