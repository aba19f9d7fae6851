"""One client's rows, encoded when they are first needed, and the fingerprint that names them in a ledger."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

from fedlora.jobs import Client

from .encoding import Encoder, Example, Records
from .rows import Rows


def fingerprint(rows: Rows, columns: Sequence[str]) -> str:
    """A hash of what is in these columns, whatever the order of the rows. It stays with the client: of few or short
    records a hash would give them away."""
    each = sorted(sha256(repr([_content(row[c]) for c in columns]).encode()).digest() for row in rows)
    return sha256(b"".join(each)).hexdigest()


def _content(value: Any) -> Any:
    """What tells one value from another: of an image its pixels, or the file's bytes."""
    if isinstance(value, Mapping):
        return [(key, _content(value[key])) for key in sorted(value)]
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if hasattr(value, "tobytes"):
        return sha256(value.tobytes()).hexdigest()
    return [_content(v) for v in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, eq=False)
class Site:
    """One client's examples, encoded when they are first needed."""

    encoder: Encoder
    train_rows: Rows
    heldout_rows: Rows = ()
    unit: Literal["row", "example"] = "row"  # what a record is: a row of the data, or each example that is made of it

    @cached_property
    def train(self) -> list[Example]:
        return [example for row in self._by_row for example in row]

    @cached_property
    def heldout(self) -> list[Example]:
        return self.encoder(self.heldout_rows)

    @cached_property
    def records(self) -> Records:
        """What a private run protects, one after another."""
        return self._by_row if self.unit == "row" else [[example] for example in self.train]

    @cached_property
    def fingerprint(self) -> str:
        """Which data these are, for the ledger."""
        return fingerprint(self.train_rows, self.encoder.form.columns)

    def client(self, id: int, rank: int) -> Client:
        """What the server is told of this client."""
        records = len(self.train_rows) if self.unit == "row" else len(self.train)
        return Client(id, len(self.train_rows), rank, records)

    @cached_property
    def _by_row(self) -> Sequence[Sequence[Example]]:
        return self.encoder.by_row(self.train_rows)
