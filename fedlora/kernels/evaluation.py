"""How good a model is, in micro-batches of rows of like lengths, and for several sets of examples in one stream.

`Model.metrics` is the plain form. Here the rows of all sets are sorted together, so that few of them are padded, and
each micro-batch is taken apart by the sets that its examples belong to.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
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
from .threads import MicroBatchThreads

MOST_ROWS = 2**31  # of a micro-batch, where its tokens alone are bounded
Tell = Callable[[Tensor], None]  # takes the set of each example of the next micro-batch, (examples,)


def measure(model: Model, examples: Sequence[Example]) -> Metrics:
    """How good the model with its present adapter is on these examples; as `Model.metrics`."""
    return measure_each(model, [examples])[0]


def measure_each(
    model: Model,
    sets: Sequence[Sequence[Example]],
    telling: Callable[[Model], AbstractContextManager[Tell]] = lambda _: nullcontext(_nothing),
    most_rows: int = MOST_ROWS,
) -> list[Metrics]:
    """How good the model is on each of several sets of examples.

    In the context `telling(model)`, of this model or of one with the same weights, a function is told before each
    micro-batch, of at most `most_rows`, the set of each of its examples, (examples,): it may give every row an adapter
    of its own.
    """
    sums = [Metrics(0, 0, 0.0, 0)] * len(sets)
    owners = list(chain.from_iterable([i] * len(examples) for i, examples in enumerate(sets)))
    every = joined(sets)
    model.net.eval()

    def measured(own: tuple[Model, Tell], places: Sequence[int]) -> list[tuple[int, Metrics]]:
        (net, tell), places = own, sorted(places, key=owners.__getitem__)  # so that those of one set lie together
        whose = [owners[i] for i in places]
        with torch.no_grad():
            tell(torch.tensor(whose, device=net.device))
            batch = net.encoder.collate([every[i] for i in places])
            found = metrics_by_set(net, batch, [len([*g]) for _, g in groupby(whose)])
        return list(zip(dict.fromkeys(whose), found, strict=True))

    with quick_attention(model.net), MicroBatchThreads(model, partial(_told, telling)) as threads:
        for owner, metrics in chain.from_iterable(threads.each(measured, micro_batches(model, every, most_rows))):
            sums[owner] += metrics
    return sums


@contextmanager
def _told(telling: Callable[[Model], AbstractContextManager[Tell]], model: Model) -> Iterator[tuple[Model, Tell]]:
    with telling(model) as tell:
        yield model, tell


def _nothing(_: Tensor) -> None:
    """All rows have the model's own adapter."""
