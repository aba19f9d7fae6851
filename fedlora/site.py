"""A client's place: its own data, what it keeps on its own disk, and its word on what it will do."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Literal

from . import preflight, worker
from .compress import with_feedback
from .data import Rows
from .dpsgd import STANDARD, Mechanism, Records
from .encode import Encoder, Example
from .errors import PrivacyError
from .flat import digest
from .ledger import Ledger, fingerprint
from .lora import LoRA
from .model import Model
from .seat import Seat
from .sketch import narrow, widen
from .store import Answer, Store
from .strategy import Ask, Client, Job, Privacy, Update

log = logging.getLogger("fedlora")


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


@dataclass(frozen=True)
class Own:
    """What a client insists on, whatever a server asks of it."""

    ledgers: Path | None = None  # where its ledger lies, if not with what else it keeps: a folder that outlives the run
    budget: float = inf  # epsilon that it lets its data be charged with, over all runs of one ledger
    private: bool = False  # it trains by DP-SGD, or not at all
    seeded: bool = True  # noise may come from the run's seed
    metrics: bool = True  # its training loss may be told
    masked: bool = False  # its update leaves it under a mask, or not at all
    egress: tuple[str, ...] = ("*",)  # tensors that may leave it, as `SIDE MODULE`, with *

    def refuse(self, job: Job, records: int) -> None:
        """Raise `PrivacyError` for a job that asks for less privacy than this client wants, or for more tensors."""
        p = job.privacy
        wrong = {
            "no DP-SGD, and dp.epsilon or dp.noise is set here": self.private and p is None,
            "noise from a seed, and dp.seeded is not set here": p is not None and p.seeded and not self.seeded,
            "its training loss, and dp.metrics is not set here": job.metrics and not self.metrics,
            "an update without a mask, and secure.aggregation is set here": self.masked and job.masking is None,
            f"delta = {p.delta if p else 0:g}, which is not below 1/N of the {records} records here": (
                p is not None and p.delta >= 1 / max(records, 1)
            ),
        }
        for what in (what for what, asked in wrong.items() if asked):
            raise PrivacyError(f"the server asks for {what}; have it ask for what was agreed, or leave the run")
        for tensor in (f"{s} {m}" for s in job.shares for m in job.start.side(s)):
            if not any(fnmatchcase(tensor, pattern) for pattern in self.egress):
                raise PrivacyError(f'the server asks for "{tensor}", which client.egress does not let out of here')


@dataclass(frozen=True, eq=False)
class Desk:
    """One client at a model: its site, and its folder."""

    id: int
    site: Site
    folder: Path  # of what it keeps
    own: Own = field(default_factory=Own)
    mechanism: Mechanism = STANDARD  # of private jobs; another only for an audit
    once: bool = (
        False  # keep the last answer, so that a job which comes again is not done again; a private one always is
    )

    def answer(self, model: Model, job: Job) -> Update:
        """Do a round's work. A private job is charged first; one that was done already has the same answer again.

        Raises `ClientFailed`; `PrivacyError` or, of a private job, `LedgerError`, and then nothing was trained;
        `SecureError` of one that is to be masked and may not be.
        """
        self.own.refuse(job, self.site.client(self.id, 0).records)
        inner = narrow(job)  # of a sketch, if the server has not; it cannot where it is not to see the update
        update = self._private(model, inner, job.privacy) if job.privacy else self._plain(model, inner)
        update = replace(update, lora=widen(job, update.lora))
        return self.seat.mask(job, update) if job.masking else self._small(job, update)

    def _small(self, job: Job, update: Update) -> Update:
        """The update as it travels in few bytes, and as the server will have it."""
        if job.upload == "float32":
            return update
        store = Store(self.folder, "left")
        residual = store.before(job.round) if job.feedback else LoRA()
        packed, received, left = with_feedback(job.start, update.lora, residual, job.upload)
        if job.feedback:
            store.keep(job.round, left)
        return replace(update, lora=received, packed=packed)

    def _plain(self, model: Model, job: Job) -> Update:
        store, last = Store(self.folder), Answer(self.folder)
        name = digest(job) if self.once else ""
        if self.once and (done := last.to(name)):
            return done
        update, kept = worker.train(model, job, self.id, self.site.train, store.before(job.round))
        log.debug("trained round %d", job.round + 1)
        store.keep(job.round, kept)
        if self.once:
            last.keep(name, update)
        return update

    def _private(self, model: Model, job: Job, privacy: Privacy) -> Update:
        preflight.once(model, job)
        store, ledger, name = Store(self.folder), self.ledger, digest(job)
        ledger.charge(name, privacy, job.round, self.own.budget)
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
        folder = self.own.ledgers / str(self.id) if self.own.ledgers else self.folder
        return Ledger(folder, self.site.fingerprint)
