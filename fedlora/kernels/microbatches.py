"""Rows of unequal lengths cut into micro-batches of rows that are nearly as long as each other.

A micro-batch of n rows of at most T tokens costs as much time as n T tokens, padding among them, and as much again as
`overhead` tokens, whatever its size: the operations of a network have to be started once for each micro-batch. With the
rows in order of length, the best cut is found by dynamic programming:

    best(j) = min over i < j of best(i) + overhead + (j - i) T_j,   T_j the length of the last row before j

In a best cut every micro-batch either ends where the length changes, or has no room for one more row of its longest
length: a row taken over from the next micro-batch would cost less here than there. So only those ends are tried.

What the bounds of a network are is computed, not timed when it runs: the cut decides in which order gradients are
added, and a run of a seed is to be the same when it runs again. `bounds` rests on these measurements (one thread of a
Zen 3, float32, forward and backward, milliseconds):

    | network                  | one row of 2 tokens | a token more | overhead in tokens |
    |--------------------------|---------------------|--------------|--------------------|
    | the embedded Llama       | 13.7                | 0.17         | 39 to 79           |
    | MiniLM (6 layers of 384) | 23.8                | 0.73         | 27 to 33           |
    | SmolLM2-135M             | 283                 | 7.5          | 37 to 46           |

A processor's cost of a micro-batch grows with the network as its cost of a token does, so their ratio hardly changes;
and on a Zen 4 those of the embedded Llama were no faster with more than a thousand tokens. On a GPU the cost of a
micro-batch is taken to be that of starting its kernels, LAUNCHES for each linear layer; none has been measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch
from torch import nn

CPU_TOKENS, CPU_OVERHEAD = 1024, 48
LAUNCHES, LAUNCH = 25, 5e-6  # kernels for each linear layer, forward and backward, and the seconds to start one
RATE = 4e14  # floating-point operations a second of a GPU in bfloat16; an older one makes a cut a little too coarse
NUMBERS = 17  # kept for the backward pass of a token, for each layer and hidden unit (see `Model.memory`)
SHARE = 0.25  # of a GPU's memory, for what a micro-batch keeps for its backward pass


@dataclass(frozen=True)
class Bounds:
    """What decides how rows are cut into micro-batches."""

    tokens: int  # in a micro-batch at most, padding among them; a longer row is alone
    overhead: int  # tokens that take as long as it takes to start a micro-batch
    rows: int = 2**31  # in a micro-batch at most


def bounds(net: nn.Module) -> Bounds:
    """The bounds of this network's micro-batches on the device it is on, the same whenever it is asked."""
    weight = next(net.parameters())
    if weight.device.type != "cuda":
        return Bounds(tokens=CPU_TOKENS, overhead=CPU_OVERHEAD)
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    seconds = 6 * sum(m.in_features * m.out_features for m in linear) / RATE  # a token's, forward and backward
    kept = NUMBERS * weight.element_size() * sum(m.in_features for m in linear) / 7  # of about seven a layer
    memory = torch.cuda.get_device_properties(weight.device).total_memory
    tokens = max(int(SHARE * memory / max(kept, 1)), CPU_TOKENS)
    return Bounds(tokens=tokens, overhead=min(int(len(linear) * LAUNCHES * LAUNCH / max(seconds, 1e-9)), tokens))


def plan(lengths: Sequence[int], bounds: Bounds) -> list[list[int]]:
    """The places of the rows of each micro-batch, which in all cost the least time; each in order of length.

    Micro-batches are in order of length too, and rows of one length stay in their given order.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cuts = _cuts([lengths[i] for i in order], bounds)
    return [order[i:j] for i, j in pairwise(cuts)]


def padded_tokens(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """The tokens that these micro-batches have, padding among them."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def _cuts(lengths: Sequence[int], bounds: Bounds) -> list[int]:
    """The places, 0 and the count of rows among them, at which rows in order of length are best cut."""
    n = len(lengths)
    ends = _ends(lengths)
    best, before = [0.0, *[inf] * n], [0] * (n + 1)
    for i in range(n):
        if best[i] < inf:  # else no cut that is tried comes here
            for j in _next_cuts(lengths, ends, i, bounds):
                cost = best[i] + bounds.overhead + (j - i) * lengths[j - 1]
                if cost < best[j]:
                    best[j], before[j] = cost, i
    return _followed(before, n)


def _ends(lengths: Sequence[int]) -> list[int]:
    """For each row, in order of length, the place after the last row of its length."""
    ends = [len(lengths)] * len(lengths)
    for i in range(len(lengths) - 2, -1, -1):
        ends[i] = ends[i + 1] if lengths[i] == lengths[i + 1] else i + 1
    return ends


def _next_cuts(lengths: Sequence[int], ends: Sequence[int], start: int, bounds: Bounds) -> Iterator[int]:
    """Yield the places at which a micro-batch that begins at `start` may end; at least one."""
    at = start
    while at < len(lengths):
        room = min(bounds.tokens // max(lengths[at], 1), bounds.rows)  # rows of this length
        if start + room < ends[at]:  # not all of them: the micro-batch is full
            if at == start or start + room > at:
                yield start + max(room, 1)
            return
        yield ends[at]
        at = ends[at]


def _followed(before: Sequence[int], last: int) -> list[int]:
    """The cuts of the best way to the last place, first to last."""
    cuts = [last]
    while cuts[-1]:
        cuts.append(before[cuts[-1]])
    return cuts[::-1]
