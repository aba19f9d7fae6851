"""The privacy that a client has spent: an append-only file on its own disk, charged before anything is trained.

Every line is chained to the line before it by a hash, and `ledger.head` holds the number of lines and the last hash: a
line that was changed, taken out or lost is noticed, and the client then refuses to train. The same two values lie a
second time in a mark outside the ledger's folder: a ledger that is gone, or was put back from an older copy, is behind
its mark. Each job has two lines:

    charge    before the first step: sigma, q, steps, unit, delta, and which records the client had
    answer    once the update lies on this disk, and before it is sent; or `failed`, before a failure is sent

What a job's second line says is the only answer that it ever has. A job without one has sent nothing: it is trained
again, with fresh noise, for the charge that is there. A job whose answer was sent and is lost is charged again.

One process at a time works on a ledger (`Ledger.locked`). All of its files can be read by their owner alone.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Any

from fedlora.client.ledger_records import KnownRecords
from fedlora.encoding.client_data import ClientData
from fedlora.errors import LedgerError, PrivacyError, PrivateJobFailed, ReasonCode
from fedlora.jobs import Charge, PrivacySpent, PrivacyTerms, Update
from fedlora.privacy.accounting import epsilon, refuse_charge
from fedlora.privacy.record_level import refuse_terms
from fedlora.storage.client_state import CachedReply
from fedlora.storage.files import append_durably, file_lock, write_durably

FIRST = "0" * 64  # stands for the hash of a line before the first
KINDS = {"charge", "answer", "failed"}


class Ledger:
    """A folder of one client: `ledger.jsonl`, `ledger.head`, and `answer.safetensors` with the last job's answer.

    `ledger.salt` and `ledger.records` beside them tell which records were charged (`KnownRecords`).
    """

    def __init__(self, folder: Path, data: ClientData, mark: Path | None = None) -> None:
        """`data` are the client's records, `mark` a file in another folder. Nothing is read before it is needed."""
        self.folder, self.data, self.mark = folder, data, mark
        self._records = KnownRecords(folder, data)
        self._lock = file_lock(folder / ".lock")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from this ledger inside a `with`; they wait. One object may hold it several times."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except (OSError, NotImplementedError) as e:  # the latter for a disk without locks
            raise LedgerError(f"{self.folder} cannot be written and locked ({e}); without a ledger none trains") from e
        try:
            yield
        finally:
            self._lock.release()

    def charge(self, job: str, privacy: PrivacyTerms, *, round: int, budget: float, delta: float | None = None) -> None:
        """Charge the job with this digest, unless it is paid for already, and reckon at this delta (None: the job's).

        Raises `PrivacyError` for terms that no mechanism has, and `LedgerError` if the charge would pass the budget or
        the ledger is not whole; then nothing is written.
        """
        refuse_terms(privacy)
        delta = delta or privacy.delta
        with self.locked():
            entries = self._entries()
            charges = charges_of(entries)
            self._check_count(charges, privacy.known)
            if self._already_paid(entries, job):
                return
            self._check_unit_and_delta(entries, delta)
            now = Charge(noise=privacy.noise, rate=privacy.rate, steps=privacy.steps)
            self._check_budget(charges, now, delta=delta, budget=budget)
            line = {
                "kind": "charge",
                "job": job,
                "round": round + 1,
                "noise": now.noise,
                "rate": now.rate,
                "steps": now.steps,
                "clip": privacy.clip,
                "seeded": privacy.seeded,
                "unit": self.data.unit,
                "delta": delta,
            }
            self._append(line | self._records.learn(entries))

    def keep(self, job: str, update: Update) -> None:
        """Write a job's answer to the disk, and then the line which says so: from now on it may be sent."""
        with self.locked():
            self._answer.keep(job, update)
            self._append({"kind": "answer", "job": job})

    def fail(self, job: str) -> None:
        """Write the line which says that a charged job has failed: that is its answer for ever."""
        with self.locked():
            self._append({"kind": "failed", "job": job})

    def answer(self, job: str) -> Update | None:
        """Return the answer that this job had, or None if it had none; the ledger knows it before it is sent again.

        Raises `PrivateJobFailed` for a job that failed after its charge.
        """
        with self.locked():
            kinds = [e["kind"] for e in self._entries() if e["job"] == job]
            if "failed" in kinds[-1:]:
                raise PrivateJobFailed
            answer = self._answer.to(job)
            if answer is not None and "charge" in kinds[-1:]:
                self._append({"kind": "answer", "job": job})  # a crash came between the answer's file and its line
            return answer

    def spent(self, delta: float) -> PrivacySpent:
        """Return the epsilon of everything that was ever charged here, at this delta, and the number of charges."""
        charges = self.charges()
        return PrivacySpent(epsilon=epsilon(charges, delta=delta), charges=len(charges))

    def charged(self, round: int) -> set[str]:
        """Return the hashes of the jobs that were charged as this round (from 0) of any run."""
        return {e["job"] for e in self._entries() if e["kind"] == "charge" and e["round"] == round + 1}

    def charges(self) -> list[Charge]:
        """Return every charge, in order. Raises `LedgerError` for a ledger that is not what was written."""
        return charges_of(self._entries())

    def _check_count(self, charges: Sequence[Charge], known: int) -> None:
        if len(charges) < known:
            raise LedgerError(
                f"{self._path}: it holds {len(charges)} charges, and the server has had {known} answers from "
                "this client; put the ledger back from a copy, or leave the run"
            )

    def _check_budget(self, charges: Sequence[Charge], now: Charge, *, delta: float, budget: float) -> None:
        if budget == inf:
            return
        before = epsilon(charges, delta=delta)
        after = epsilon([*charges, now], delta=delta)
        if not after <= budget * (1 + 1e-9):
            raise LedgerError(
                f"its privacy budget is spent: epsilon is {before:.3g} by {self._path}, {after:.3g} with this round, "
                f"and dp.budget = {budget:.3g}",
                code=ReasonCode.BUDGET,
            )

    def _check_unit_and_delta(self, entries: Sequence[Mapping[str, Any]], delta: float) -> None:
        """Raise `LedgerError` where the lines are of another unit or delta: their charges do not add up to one epsilon.

        Lines of version 0.1 name neither. That version added up what was there, so they count as of today's.
        """
        now = {"unit": self.data.unit, "delta": delta}
        for name, value in now.items():
            others = {e[name] for e in entries if e["kind"] == "charge" and name in e} - {value}
            if others:
                raise LedgerError(
                    f"{self._path} holds charges for dp.{name} = {others.pop()}, and dp.{name} = {value} now; a ledger "
                    f"has one dp.{name}: set it as it was"
                )

    @property
    def _path(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def _head(self) -> Path:
        return self.folder / "ledger.head"

    @property
    def _answer(self) -> CachedReply:
        return CachedReply(self.folder)

    def _already_paid(self, entries: Sequence[Mapping[str, Any]], job: str) -> bool:
        """Has this job been paid for already?

        True if it was charged and either no answer to it ever left this machine, or the stored answer or failure will
        be sent again instead of training anew.
        """
        kinds = [e["kind"] for e in entries if e["job"] == job]
        if not kinds:
            return False
        return kinds[-1] in ("charge", "failed") or self._answer.to(job) is not None

    def _entries(self) -> list[dict[str, Any]]:
        """Return the ledger's lines as values. Raises `LedgerError` for lines that are of other data, or altered."""
        entries = [self._entry(n, text) for n, text in enumerate(self._texts(), 1)]
        self._records.check(entries)
        return entries

    def _entry(self, n: int, text: str) -> dict[str, Any]:
        """Return a line as a value. Raises `LedgerError` for one that no ledger has, such as a charge of -5 steps."""
        try:
            entry: dict[str, Any] = json.loads(text)
            if entry["kind"] not in KINDS or not isinstance(entry["job"], str):
                raise ValueError(f"its kind is {entry['kind']!r}")
            charges_of([entry])
        except (ValueError, TypeError, LookupError, PrivacyError) as e:
            raise LedgerError(f"{self._path} line {n} is none that was written here: {e}; put it back") from e
        return entry

    def _texts(self) -> list[str]:
        """Return the ledger's lines. Raises `LedgerError` where they are not the lines that were written.

        A last line that the head does not count yet was left by a crash, before anything was trained: it is skipped.
        """
        marked, at_mark = self._read_mark()  # first, as another process may add a line while this one reads
        if not marked and not self._path.exists() and not self._head.exists():
            return []
        n, last = self._read_head(marked)
        texts = self._lines()[:n] if n else []
        if len(texts) != n or _chained(texts) != last:
            raise LedgerError(
                f"{self._path} was altered: its {len(texts)} lines are not the {n} that were written; put it back "
                "from a copy, or start with a new folder and data that were in no run"
            )
        if n < marked or _chained(texts[:marked]) != at_mark:
            raise LedgerError(
                f"{self._path} is older than its mark: it holds {n} lines, and {self.mark} has seen {marked}; put back "
                "the newest copy of the ledger"
            )
        return texts

    def _lines(self) -> list[str]:
        try:
            return self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise LedgerError(
                f"{self._path} {_state(e)}, and this client was charged before; put it back from a copy"
            ) from e

    def _read_head(self, marked: int) -> tuple[int, str]:
        try:
            return _count_and_hash(self._head)
        except (OSError, ValueError) as e:
            seen = f", and {self.mark} has seen {marked} lines of it" if marked else ""
            raise LedgerError(f"{self._head} {_state(e)}{seen}; put it back from a copy") from e

    def _read_mark(self) -> tuple[int, str]:
        """Return the number of lines that the mark has seen, and the hash of the last of them."""
        if self.mark is None or not self.mark.exists():
            return 0, FIRST
        try:
            return _count_and_hash(self.mark)
        except (OSError, ValueError) as e:
            raise LedgerError(
                f"{self.mark} {_state(e)}, and says whether {self._path} is the newest; put it back, or delete it "
                "if you know that the ledger is whole"
            ) from e

    def _append(self, entry: Mapping[str, Any]) -> None:
        """Write one more line, then the head that counts it, then the mark; all on the disk when this returns."""
        texts = self._texts()
        if not texts:
            write_durably(self._head, f"0 {FIRST}\n".encode(), mode=0o600)  # else a first line would look altered
        whole = "".join(f"{line}\n" for line in texts).encode()
        text = json.dumps({**entry, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, allow_nan=False)
        try:
            if self._path.exists():
                os.truncate(self._path, len(whole))  # drop what a crash left of a line
            append_durably(self._path, f"{text}\n".encode(), mode=0o600)
        except OSError as e:
            raise LedgerError(
                f"{self._path} could not be written: {e.strerror}; make room, as without it none trains"
            ) from e
        head = f"{len(texts) + 1} {_chained([*texts, text])}\n".encode()
        write_durably(self._head, head, mode=0o600)
        if self.mark:
            write_durably(self.mark, head, mode=0o600)


def _count_and_hash(path: Path) -> tuple[int, str]:
    n, last = path.read_text(encoding="utf-8").split()
    return int(n), last


def _chained(texts: Sequence[str]) -> str:
    """Return the hash of the last line; every line is hashed with the hash of the line before it."""
    before = FIRST
    for text in texts:
        before = sha256((before + text).encode()).hexdigest()
    return before


def charges_of(entries: Sequence[Mapping[str, Any]]) -> list[Charge]:
    """Return the charges among a ledger's lines. Raises `PrivacyError` for one that no mechanism can have."""
    charged = [e for e in entries if e["kind"] == "charge"]
    charges = [Charge(noise=e["noise"], rate=e["rate"], steps=e["steps"]) for e in charged]
    for charge in charges:
        refuse_charge(charge)
    return charges


def _state(error: OSError | ValueError) -> str:
    """What an error in reading a file says of the file, to follow its name."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({error.strerror})" if isinstance(error, OSError) else "is damaged"
