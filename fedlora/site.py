"""A client's place: its own data, what it keeps on its own disk, and its word on what it will do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Literal

from . import preflight, worker
from .data import Rows
from .dpsgd import STANDARD, Mechanism, Records
from .encode import Encoder, Example
from .flat import digest
from .ledger import Ledger, fingerprint
from .model import Model
from .seat import Seat
from .sketch import narrow, widen
from .store import Store
from .strategy import Ask, Client, Job, Privacy, Update


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
    mechanism: Mechanism = STANDARD  # of private jobs; another only for an audit

    def answer(self, model: Model, job: Job) -> Update:
        """Do a round's work. A private job is charged first; one that was done already has the same answer again.

        Raises `ClientFailed`; of a private job `LedgerError` or `PrivacyError`, and then nothing was trained;
        `SecureError` of one that is to be masked and may not be.
        """
        inner = narrow(job)  # of a sketch, if the server has not; it cannot where it is not to see the update
        update = self._private(model, inner, job.privacy) if job.privacy else self._plain(model, inner)
        update = replace(update, lora=widen(job, update.lora))
        return self.seat.mask(job, update) if job.masking else update

    def _plain(self, model: Model, job: Job) -> Update:
        store = Store(self.folder)
        update, kept = worker.train(model, job, self.id, self.site.train, store.before(job.round))
        store.keep(job.round, kept)
        return update

    def _private(self, model: Model, job: Job, privacy: Privacy) -> Update:
        preflight.once(model, job)
        store, ledger, name = Store(self.folder), self.ledger, digest(job)
        ledger.charge(name, privacy, job.round, self.budget)
        answer = ledger.answer(name)
        if answer is None:
            records, before = self.site.records, store.before(job.round)
            answer, kept = worker.train_privately(model, job, self.id, records, before, self.mechanism)
            store.keep(job.round, kept)
            ledger.keep(name, answer)
        return replace(answer, spent=ledger.spent(privacy.delta))

    def reply(self, ask: Ask) -> dict[str, str]:
        """Do a step of secure aggregation; who joins says how much it weighs. Raises `SecureError`."""
        said = self.seat.reply(ask)
        if ask.step == "join":
            said |= {"examples": str(len(self.site.train)), "records": str(len(self.site.records))}
        return said

    @property
    def seat(self) -> Seat:
        """Its part in secure aggregation."""
        return Seat(self.folder, self.id)

    @property
    def ledger(self) -> Ledger:
        """What its data have been charged with."""
        own = self.ledgers / str(self.id) if self.ledgers else self.folder
        return Ledger(own, self.site.fingerprint)
