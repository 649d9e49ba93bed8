"""The random generator of an image's noise: every seed from 0 to 2^63 - 1 has a stream of its own.

torch's CPU generator is the Mersenne Twister MT19937, and `manual_seed` initialises it from the
seed's lower 32 bits only (pytorch#87509): seeds that agree in those would draw the same image.
torch's generator on CUDA takes all 64 bits.
"""

from __future__ import annotations

import numpy as np
import torch

_LOW = 2**32

_STATE_AT = 24
"""Bytes before the twister's 624 words in `torch.Generator.get_state`; each word takes eight."""


def cpu_generator(seed: int) -> torch.Generator:
    """A generator on the CPU whose stream depends on all of the seed's bits.

    Below 2^32 it is torch's own `manual_seed`. From there on, the twister's state is initialised
    from both of the seed's words by `init_by_array`, the initialisation that MT19937's authors give
    for keys of more than one word. Different keys of two words give different states.

    Args:
        seed: from 0 to 2^64 - 1.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if seed < _LOW:
        return generator
    # numpy guarantees that this class's streams never change.
    numpys = np.random.RandomState([seed % _LOW, seed // _LOW])
    words = numpys.get_state(legacy=False)["state"]["key"]
    state = generator.get_state()
    twister = state[_STATE_AT : _STATE_AT + 8 * len(words)].view(torch.int64)
    twister.copy_(torch.from_numpy(words.astype(np.int64)))
    return generator.set_state(state)
