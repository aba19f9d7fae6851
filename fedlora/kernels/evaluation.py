"""How good a model is, in micro-batches of rows of like lengths, and for several sets of examples in one stream.

`Model.metrics` is the plain form. Here the rows of all sets are sorted together, so that few of them are padded, and
each micro-batch is taken apart by the sets that its examples belong to.
"""

from collections.abc import Callable, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor

from fedlora.encoding.encoder import Example
from fedlora.encoding.lazy import joined
from fedlora.metrics import Metrics
from fedlora.models.model import Model

from .attention import quick_attention
from .example_batches import micro_batches
from .losses import metrics_by_set

MOST_ROWS = 2**31  # of a micro-batch, where its tokens alone are bounded


def measure(model: Model, examples: Sequence[Example]) -> Metrics:
    """How good the model with its present adapter is on these examples; as `Model.metrics`."""
    return measure_each(model, [examples])[0]


@torch.no_grad()
def measure_each(
    model: Model,
    sets: Sequence[Sequence[Example]],
    before: Callable[[Tensor], None] = lambda _: None,
    most_rows: int = MOST_ROWS,
) -> list[Metrics]:
    """How good the model is on each of several sets of examples.

    `before` is called before each micro-batch, of at most `most_rows`, with the set of each of its examples,
    (examples,): it may give every row an adapter of its own.
    """
    sums = [Metrics(0, 0, 0.0, 0)] * len(sets)
    owners = list(chain.from_iterable([i] * len(examples) for i, examples in enumerate(sets)))
    every = joined(sets)
    model.net.eval()
    with quick_attention(model.net):
        for places in micro_batches(model, every, most_rows):
            places.sort(key=owners.__getitem__)  # so that those of one set lie together
            own = [owners[i] for i in places]
            before(torch.tensor(own, device=model.device))
            batch = model.encoder.collate([every[i] for i in places])
            found = metrics_by_set(model, batch, [len([*g]) for _, g in groupby(own)])
            for owner, metrics in zip(dict.fromkeys(own), found, strict=True):
                sums[owner] += metrics
    return sums
