"""What a client has spent of its privacy: an append-only file of its own, charged before anything is trained.

Each line holds the hash of the line before, and `ledger.head` beside it how many lines there are and the last hash: a
line that was changed, taken out or lost is seen, and the client then refuses to train. Two lines go with a job:

    charge    before the first step: sigma, q, steps, and which data
    answer    after the update lies on this disk, and before it is sent

A job that comes again after a crash is charged again only if its answer may have left: with an answer on the disk it
gets that, and without one none was sent, so the charge that is there already pays for it.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedlora.errors import LedgerError
from fedlora.jobs import Charge, PrivacySpent, PrivacyTerms, Update
from fedlora.privacy.accounting import epsilon
from fedlora.storage.client_state import CachedReply
from fedlora.storage.files import append_durably, write_durably

FIRST = "0" * 64  # what the first line has for the hash of a line before


class Ledger:
    """A client's folder: `ledger.jsonl`, `ledger.head`, and `answer.safetensors` of the last job."""

    def __init__(self, folder: Path, data: str) -> None:
        """`data` is the fingerprint of the client's records. Nothing is read, or refused, before it is needed."""
        self.folder, self.data = folder, data

    def charge(self, job: str, privacy: PrivacyTerms, round: int, budget: float) -> None:
        """Write down what this job (its digest) will spend. Raises `LedgerError`, and writes nothing, if it may not."""
        entries = self._entries()
        charges = charges_of(entries)
        if len(charges) < privacy.known:
            raise LedgerError(
                f"{self._path}: it holds {len(charges)} charges, and the server has had {privacy.known} answers from "
                "this client; put the ledger back from a copy, or leave the run"
            )
        if self._already_paid(entries, job):
            return
        now = Charge(privacy.noise, privacy.rate, privacy.steps)
        before = epsilon(charges, privacy.delta)
        after = epsilon([*charges, now], privacy.delta)
        if after > budget * (1 + 1e-9):
            raise LedgerError(
                f"its privacy budget is spent: epsilon is {before:.3g} by {self._path}, {after:.3g} with this round, "
                f"and dp.budget = {budget:.3g}"
            )
        terms = {"noise": now.noise, "rate": now.rate, "steps": now.steps, "clip": privacy.clip}
        line = {"kind": "charge", "job": job, "round": round + 1, **terms, "seeded": privacy.seeded}
        self._append(entries, line)

    def keep(self, job: str, update: Update) -> None:
        """Put a job's answer on the disk, then the line that it is there: from now on it may be sent."""
        self._answer.keep(job, update)
        self._append(self._entries(), {"kind": "answer", "job": job})

    def answer(self, job: str) -> Update | None:
        """The answer to this job, if it was worked out already."""
        return self._answer.to(job)

    def spent(self, delta: float) -> PrivacySpent:
        """All that was ever charged here."""
        charges = self.charges()
        return PrivacySpent(epsilon(charges, delta), len(charges))

    def charges(self) -> list[Charge]:
        """Every charge, in order. Raises `LedgerError` for a ledger that is not what was written."""
        return charges_of(self._entries())

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
        """Was this job charged, and nothing of it sent, or only what `answer` gives again?"""
        own = [e["kind"] for e in entries if e["job"] == job]
        return bool(own) and (own[-1] == "charge" or self.answer(job) is not None)

    def _entries(self) -> list[dict[str, Any]]:
        """The lines there are, each checked. A last line that no head counts is of a crash, before anything began."""
        if not self._path.exists() and not self._head.exists():
            return []
        n, last = self._read_head()
        entries, before = [], FIRST
        for text in self._lines()[:n] if n else ():
            before = sha256((before + text).encode()).hexdigest()
            entries.append(json.loads(text))
        if len(entries) != n or before != last:
            raise LedgerError(
                f"{self._path} was altered: its {len(entries)} lines are not the {n} that were written; put it back "
                "from a copy, or start with a new folder and data that were in no run"
            )
        other = [e["data"] for e in entries if e.get("data", self.data) != self.data]
        if other:
            raise LedgerError(
                f"{self._path} is of another data set ({other[0][:12]}, these records are {self.data[:12]}); give "
                "every data set a ledger of its own"
            )
        return entries

    def _lines(self) -> list[str]:
        try:
            return self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise LedgerError(
                f"{self._path} is missing or cannot be read ({e}), and this client was charged before; put it back "
                "from a copy"
            ) from e

    def _read_head(self) -> tuple[int, str]:
        try:
            n, last = self._head.read_text(encoding="utf-8").split()
            return int(n), last
        except (OSError, ValueError) as e:
            raise LedgerError(f"{self._head} is missing or damaged ({e}); put it back from a copy") from e

    def _append(self, entries: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> None:
        """One more line, on the disk before its head is, and both before this returns."""
        if not self._head.exists():
            write_durably(self._head, f"0 {FIRST}\n".encode())  # a first line without a head would look altered
        before = self._read_head()[1]
        good = "".join(f"{line}\n" for line in self._lines()[: len(entries)]) if entries else ""
        text = json.dumps({**entry, "data": self.data, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        try:
            if self._path.exists():
                os.truncate(self._path, len(good.encode()))  # drop what a crash left of a line
            append_durably(self._path, f"{text}\n".encode())
        except OSError as e:
            raise LedgerError(
                f"{self._path} could not be written: {e.strerror}; make room, as without it none trains"
            ) from e
        digest = sha256((before + text).encode()).hexdigest()
        write_durably(self._head, f"{len(entries) + 1} {digest}\n".encode())


def charges_of(entries: Sequence[Mapping[str, Any]]) -> list[Charge]:
    """The charges among a ledger's lines."""
    return [Charge(e["noise"], e["rate"], e["steps"]) for e in entries if e["kind"] == "charge"]
