"""Examples of any kind cut into micro-batches: their cost in tokens, and what a model can take together."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from fedlora.encoding.encoder import Example, length
from fedlora.models.model import Model

from .microbatches import bounds, plan

PATCH = 16  # pixels of the side of a patch of an image


def micro_batches(model: Model, examples: Sequence[Example], most_rows: int) -> list[list[int]]:
    """The places of the examples of each micro-batch: rows of like lengths, or of one where the model needs that."""
    costs = [tokens(example) for example in examples]
    limits = replace(bounds(model.net), rows=most_rows)
    if not model.encoder.limits.one_length:
        return plan(costs, limits)
    lengths = [length(example) for example in examples]
    by_length = sorted(range(len(examples)), key=lengths.__getitem__)
    alike = [list(places) for _, places in groupby(by_length, key=lengths.__getitem__)]
    planned = [(places, plan([costs[i] for i in places], limits)) for places in alike]
    return [[places[i] for i in batch] for places, batches in planned for batch in batches]


def tokens(example: Example) -> int:
    """What an example costs, in tokens: those it reads and those it writes; an image as many as it has patches."""
    if "pixel_values" in example:
        return max(example["pixel_values"][0].numel() // PATCH**2, 1)
    return length(example) + len(example.get("decoder_input_ids", ()))
