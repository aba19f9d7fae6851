"""One client's rows, encoded when they are first needed, and the keyed hashes that name them in a ledger."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, sha256
from typing import Literal

from fedlora.data.rows import Rows, row_hashes, stride, take
from fedlora.jobs import Client

from .encoder import Encoder, Example, Records
from .examples import EncodedRow
from .lazy import Lazy, examples_of


def fingerprint(rows: Rows, columns: Sequence[str]) -> str:
    """The hash by which version 0.1 knew data again, without a key; it does not depend on the order of the rows.

    It stays with the client, as from the hash of few or short records these could be guessed.
    """
    return sha256(b"".join(sorted(row_hashes(rows, columns)))).hexdigest()


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's examples, encoded when they are first needed; what lies in memory of a text is where it is kept."""

    encoder: Encoder
    train_rows: Rows
    heldout_rows: Rows = ()
    unit: Literal["row", "example"] = "row"  # what a record is: a row of the data, or each example that is made of it
    dealt: bool = False  # do the rows come out of a pool that is dealt among clients, and not from its own source?
    heldout_limit: int = 0  # most held-out examples of an evaluation; 0: all

    @cached_property
    def train(self) -> Sequence[Example]:
        """The examples to train on, each made when it is asked for."""
        return examples_of(self._completed)

    @cached_property
    def heldout(self) -> Sequence[Example]:
        """The held-out examples that the client is evaluated on: all, or so many as the limit says, evenly spread."""
        rows, limit = self.heldout_rows, self.heldout_limit
        rows = take(rows, range(len(rows))[:: stride(len(rows), limit)])  # the others need not be encoded
        examples = examples_of(self.encoder.complete(self.encoder.encoded(rows)))
        return examples[:: stride(len(examples), limit)]

    @cached_property
    def records(self) -> Records:
        """The records that a private run protects: each a list of its examples."""
        rows, train = self._completed, self.train
        return (
            Lazy(len(rows), lambda i: rows[i].examples)
            if self.unit == "row"
            else Lazy(len(train), lambda i: [train[i]])
        )

    def keyed_hashes(self, key: bytes) -> list[bytes]:
        """A hash of 16 bytes of each row that the client has, held out or not; without the key it says nothing."""
        return [blake2b(row, key=key, digest_size=16).digest() for row in self._row_hashes]

    @cached_property
    def fingerprint(self) -> str:
        """The hash by which a ledger of version 0.1 knows these data again."""
        return fingerprint(self.train_rows, self.encoder.schema.columns)

    @cached_property
    def whole_fingerprint(self) -> str:
        """The same of all rows: training rows and held-out ones."""
        return sha256(b"".join(sorted(self._row_hashes))).hexdigest()

    @cached_property
    def _row_hashes(self) -> list[bytes]:
        columns = self.encoder.schema.columns
        return [*row_hashes(self.train_rows, columns), *row_hashes(self.heldout_rows, columns)]

    def client(self, id: int, rank: int) -> Client:
        """The client as the server knows it: its counts and its rank."""
        is_row = self.unit == "row" or self.encoder.schema.has_head  # of which every row is one example
        return Client(id, len(self.train_rows), rank, len(self.train_rows if is_row else self.train))

    @cached_property
    def _completed(self) -> Sequence[EncodedRow]:
        return self.encoder.complete(self.encoded)

    @cached_property
    def encoded(self) -> Sequence[EncodedRow]:
        """What became of each row to train on, but for what the base says of it.

        There may be nothing to learn in any: its client then fails alone.
        """
        return self.encoder.encoded(self.train_rows)
