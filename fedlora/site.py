"""A client's place: its own data, what it keeps on its own disk, and its word on what it will do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Literal

from . import preflight, worker
from .data import Rows
from .dpsgd import Records
from .encode import Encoder, Example
from .flat import digest
from .ledger import Ledger, fingerprint
from .model import Model
from .store import Store
from .strategy import Client, Job, Update


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


@dataclass(frozen=True, eq=False)
class Desk:
    """One client at a model: its site, and its folders."""

    id: int
    site: Site
    folder: Path  # of what it keeps
    ledgers: Path | None = None  # where its ledger lies, if not there: a folder that outlives the run
    budget: float = inf  # epsilon that it lets its data be charged with, over all runs of one ledger

    def answer(self, model: Model, job: Job) -> Update:
        """Do a round's work. A private job is charged first; one that was done already has the same answer again.

        Raises `ClientFailed`; of a private job `LedgerError` or `PrivacyError`, and then nothing was trained.
        """
        store = Store(self.folder)
        if job.privacy is None:
            update, kept = worker.train(model, job, self.id, self.site.train, store.before(job.round))
            store.keep(job.round, kept)
            return update
        preflight.once(model, job)
        ledger, name = self.ledger, digest(job)
        ledger.charge(name, job.privacy, job.round, self.budget)
        answer = ledger.answer(name)
        if answer is None:
            answer, kept = worker.train_privately(model, job, self.id, self.site.records, store.before(job.round))
            store.keep(job.round, kept)
            ledger.keep(name, answer)
        return replace(answer, spent=ledger.spent(job.privacy.delta))

    @property
    def ledger(self) -> Ledger:
        """What its data have been charged with."""
        own = self.ledgers / str(self.id) if self.ledgers else self.folder
        return Ledger(own, self.site.fingerprint)
