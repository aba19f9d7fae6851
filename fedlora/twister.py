"""The state of torch's generator on the CPU, a Mersenne Twister: 624 words of 32 bits, of which a seed sets all by 32.

Where the words lie in the state is private to torch: it stands here alone, and is looked at before it is relied on.
"""

import torch
from torch import Tensor

SIZE = 624  # words
_BYTES, _PLACE = 5056, slice(24, 24 + SIZE * 8)  # of a state, and of its words in it


def is_known(state: Tensor, seed: int) -> bool:
    """Are the words of a state that torch has just seeded where they are looked for? The first is known by the seed."""
    return len(state) == _BYTES and int(_words(state)[0]) == seed & 0xFFFFFFFF


def filled(state: Tensor, words: Tensor) -> Tensor:
    """A state that torch has just seeded, with these words, (624,) of 64 bits each, in place of its own."""
    _words(state).copy_(words)
    return state


def next_generator() -> torch.Generator:
    """A generator of its own, whose words the global one draws; with a torch of another state they are one seed."""
    words = torch.randint(2**32, (SIZE,))
    generator = torch.Generator()
    state = generator.get_state()
    if is_known(state, generator.initial_seed()):
        return generator.set_state(filled(state, words))
    return generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def _words(state: Tensor) -> Tensor:
    """The words of a state, in its own memory."""
    return state[_PLACE].view(torch.int64)
