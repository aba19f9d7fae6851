"""What a base model can take as its input, for the encoder that makes it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.errors import ConfigError, DataError, cut

SHOWN = 40  # characters of a text in an error


@dataclass(frozen=True)
class InputLimits:
    """The limits of one base model; those left out are none."""

    positions: int | None = None  # tokens that its table of positions has a row for
    vocabulary: int | None = None  # tokens that its embedding, and its output, have a row for
    token_types: int | None = None  # kinds of token that it tells apart: those of a pair's first text and of its second
    pads_left: bool = False  # a batch is padded on the left, as the model classifies by the last position
    one_length: bool = False  # a batch holds rows of one length only, as padding changes the model's numbers
    places: frozenset[int] = frozenset()  # tokens by which it finds where a text ends: no text may hold one

    def refuse(self, tokenizer: Any, ids: Sequence[int], text: str = "", *, max_length: int) -> None:
        """Raise `ConfigError` for an example too long for the model, `DataError` for a token that it has no row for."""
        if self.positions is not None and len(ids) > self.positions:
            raise ConfigError(
                f"model.max_length = {max_length} is above the {self.positions} positions of the model, and an example "
                f"has {len(ids)} tokens{_shown(text)}; set model.max_length to {self.positions} or less"
            )
        largest = max(ids, default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise DataError(
                f'"{tokenizer.convert_ids_to_tokens(largest)}" is token {largest} of the tokenizer, and the model\'s '
                f"embedding ends at {self.vocabulary - 1}{_shown(text)}; save the model after "
                "resize_token_embeddings, or take the tokenizer that belongs to it"
            )

    def takes(self, token_types: Iterable[Sequence[int]]) -> bool:
        """Does the model tell tokens apart by type, and has it so many types?"""
        if self.token_types is None or self.token_types < 2:
            return self.token_types is None
        return max(map(max, filter(None, token_types)), default=0) < self.token_types


NO_LIMITS = InputLimits()


def _shown(text: str) -> str:
    """The start of a text, to follow a clause."""
    return f' (in the text "{cut(text, SHOWN)}")' if text.strip() else ""
