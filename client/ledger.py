"""The privacy that a client has spent: an append-only file on its own disk, charged before anything is trained.

Every line is chained to the line before it by a hash, and `ledger.head` holds the number of lines and the last hash: a
line that was changed, taken out or lost is noticed, and the client then refuses to train. Each job has two lines:

    charge    before the first step: sigma, q, steps, and a fingerprint of the data
    answer    once the update lies on this disk, and before it is sent

A job that comes again after a crash is charged again only if its answer may have left this machine. If the answer is on
the disk, that one is sent once more. If there is none, nothing was sent, and the charge on the disk pays for the job.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedlora.errors import LedgerError, ReasonCode
from fedlora.jobs import Charge, PrivacySpent, PrivacyTerms, Update
from fedlora.privacy.accounting import epsilon
from fedlora.storage.client_state import CachedReply
from fedlora.storage.files import append_durably, write_durably

FIRST = "0" * 64  # stands for the hash of a line before the first


class Ledger:
    """A folder of one client: `ledger.jsonl`, `ledger.head`, and `answer.safetensors` with the last job's answer."""

    def __init__(self, folder: Path, data: str) -> None:
        """`data` is the fingerprint of the client's records. Nothing is read, or refused, before it is needed."""
        self.folder, self.data = folder, data

    def charge(self, job: str, privacy: PrivacyTerms, *, round: int, budget: float) -> None:
        """Charge the job with this digest, unless it is paid for already.

        Raises `LedgerError`, and writes nothing, if the charge would pass the budget or the ledger is not whole.
        """
        entries = self._entries()
        charges = charges_of(entries)
        if len(charges) < privacy.known:
            raise LedgerError(
                f"{self._path}: it holds {len(charges)} charges, and the server has had {privacy.known} answers from "
                "this client; put the ledger back from a copy, or leave the run"
            )
        if self._already_paid(entries, job):
            return
        now = Charge(noise=privacy.noise, rate=privacy.rate, steps=privacy.steps)
        self._check_budget(charges, now, delta=privacy.delta, budget=budget)
        line = {
            "kind": "charge",
            "job": job,
            "round": round + 1,
            "noise": now.noise,
            "rate": now.rate,
            "steps": now.steps,
            "clip": privacy.clip,
            "seeded": privacy.seeded,
        }
        self._append(line)

    def keep(self, job: str, update: Update) -> None:
        """Write a job's answer to the disk, and then the line which says so: from now on it may be sent."""
        self._answer.keep(job, update)
        self._append({"kind": "answer", "job": job})

    def answer(self, job: str) -> Update | None:
        """Return the stored answer to this job, or None if there is none."""
        return self._answer.to(job)

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

    def _check_budget(self, charges: Sequence[Charge], now: Charge, *, delta: float, budget: float) -> None:
        before = epsilon(charges, delta=delta)
        after = epsilon([*charges, now], delta=delta)
        if after > budget * (1 + 1e-9):
            raise LedgerError(
                f"its privacy budget is spent: epsilon is {before:.3g} by {self._path}, {after:.3g} with this round, "
                f"and dp.budget = {budget:.3g}",
                code=ReasonCode.BUDGET,
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

        True if it was charged and either no answer to it ever left this machine, or the stored answer will be sent
        again instead of training anew.
        """
        kinds = [e["kind"] for e in entries if e["job"] == job]
        if not kinds:
            return False
        return kinds[-1] == "charge" or self.answer(job) is not None

    def _entries(self) -> list[dict[str, Any]]:
        """Return the ledger's lines as values. Raises `LedgerError` for lines that are of other data, or altered."""
        entries = [json.loads(text) for text in self._texts()]
        for entry in entries:
            self._check_data(entry.get("data", self.data))
        return entries

    def _check_data(self, data: str) -> None:
        if data != self.data:
            raise LedgerError(
                f"{self._path} is of another data set ({data[:12]}, these records are {self.data[:12]}); give "
                "every data set a ledger of its own"
            )

    def _texts(self) -> list[str]:
        """Return the ledger's lines. Raises `LedgerError` where they are not the lines that were written.

        A last line that the head does not count yet was left by a crash, before anything was trained: it is skipped.
        """
        if not self._path.exists() and not self._head.exists():
            return []
        n, last = self._read_head()
        texts = self._lines()[:n] if n else []
        if len(texts) != n or _chained(texts) != last:
            raise LedgerError(
                f"{self._path} was altered: its {len(texts)} lines are not the {n} that were written; put it back "
                "from a copy, or start with a new folder and data that were in no run"
            )
        return texts

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

    def _append(self, entry: Mapping[str, Any]) -> None:
        """Write one more line, and then the head that counts it; both are on the disk when this returns."""
        texts = self._texts()
        if not texts:
            write_durably(self._head, f"0 {FIRST}\n".encode())  # a first line without a head would look altered
        whole = "".join(f"{line}\n" for line in texts).encode()
        text = json.dumps({**entry, "data": self.data, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        try:
            if self._path.exists():
                os.truncate(self._path, len(whole))  # drop what a crash left of a line
            append_durably(self._path, f"{text}\n".encode())
        except OSError as e:
            raise LedgerError(
                f"{self._path} could not be written: {e.strerror}; make room, as without it none trains"
            ) from e
        write_durably(self._head, f"{len(texts) + 1} {_chained([*texts, text])}\n".encode())


def _chained(texts: Sequence[str]) -> str:
    """Return the hash of the last line; every line is hashed with the hash of the line before it."""
    before = FIRST
    for text in texts:
        before = sha256((before + text).encode()).hexdigest()
    return before


def charges_of(entries: Sequence[Mapping[str, Any]]) -> list[Charge]:
    """Return the charges among a ledger's lines."""
    charged = [e for e in entries if e["kind"] == "charge"]
    return [Charge(noise=e["noise"], rate=e["rate"], steps=e["steps"]) for e in charged]
