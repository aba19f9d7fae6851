"""One client's rows, encoded when they are first needed, and the fingerprint that names them in a ledger."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain
from typing import Any, Literal

from fedlora.jobs import Client

from .encoding import Encoder, Example, Records
from .rows import Rows


def fingerprint(rows: Rows, columns: Sequence[str]) -> str:
    """A hash of the values in these columns, which does not depend on the order of the rows.

    It stays with the client, as from the hash of few or short records these could be guessed.
    """
    by_row = sorted(sha256(repr([_content(row[c]) for c in columns]).encode()).digest() for row in rows)
    return sha256(b"".join(by_row)).hexdigest()


def _content(value: Any) -> Any:
    """A value as text, numbers and hashes; of an image its pixels, or the file's bytes."""
    if isinstance(value, Mapping):
        return [(key, _content(value[key])) for key in sorted(value)]
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if hasattr(value, "tobytes"):
        return sha256(value.tobytes()).hexdigest()
    if isinstance(value, list | tuple):
        return [_content(v) for v in value]
    return value


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's examples, encoded when they are first needed."""

    encoder: Encoder
    train_rows: Rows
    heldout_rows: Rows = ()
    unit: Literal["row", "example"] = "row"  # what a record is: a row of the data, or each example that is made of it

    @cached_property
    def train(self) -> list[Example]:
        """The examples to train on."""
        return list(chain.from_iterable(self._by_row))

    @cached_property
    def heldout(self) -> list[Example]:
        """The examples that the client holds out for an evaluation."""
        return self.encoder(self.heldout_rows)

    @cached_property
    def records(self) -> Records:
        """The records that a private run protects: each a list of its examples."""
        return self._by_row if self.unit == "row" else [[example] for example in self.train]

    @cached_property
    def fingerprint(self) -> str:
        """The hash by which a ledger knows these data again."""
        return fingerprint(self.train_rows, self.encoder.schema.columns)

    def client(self, id: int, rank: int) -> Client:
        """The client as the server knows it: its counts and its rank."""
        records = len(self.train_rows) if self.unit == "row" else len(self.train)
        return Client(id, len(self.train_rows), rank, records)

    @cached_property
    def _by_row(self) -> Sequence[Sequence[Example]]:
        return self.encoder.by_row(self.train_rows)
