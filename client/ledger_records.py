"""Which records a ledger was charged for: a random salt, and a hash of each record that is keyed with it.

A charge is for every record that the client then had. So a ledger serves any data that share records with those it has
seen: one record more, another data.limit or another split are the same data, and the new records are added. Data that
share none are refused: they would need a ledger of their own, or the folder is a mistake.

Clients whose rows are dealt out of one pool are different (`ClientData.dealt`): with another deal a record would come
to a client whose ledger does not hold what was spent on it. Their rows must be exactly those of the charges before.

The hashes never leave this machine, and without the salt say nothing of the records.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedlora.encoding.client_data import ClientData
from fedlora.errors import LedgerError
from fedlora.storage.files import secret_key, write_durably

SIZE = 16  # bytes of a record's hash


class KnownRecords:
    """The records of a ledger: `ledger.salt` and `ledger.records` in its folder."""

    def __init__(self, folder: Path, data: ClientData) -> None:
        self._salt, self._path, self._data = folder / "ledger.salt", folder / "ledger.records", data

    def check(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Raise `LedgerError` where the ledger with these lines is not of the client's data."""
        last = _last(entries)
        if "records" not in last:
            self._check_by_fingerprint(last)
        elif not self._salt.exists():
            raise LedgerError(
                f"{self._salt} is missing, by which the ledger knows its records; put it back from a copy"
            )
        elif last["data"] != self._now[1]:
            self._check_overlap(last)

    def learn(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Write down the records that are new, and return what a charge's line says of the data."""
        last, (hashes, data) = _last(entries), self._now
        if last.get("data") == data and "records" in last:
            return {key: last[key] for key in ("data", "records", "records_hash")}
        known = self._known(last) if "records" in last else frozenset()
        old = self._bytes(last) if "records" in last else b""
        content = old + b"".join(sorted(hashes - known))
        write_durably(self._path, content, mode=0o600)  # what lines count stays in front: a crash here changes nothing
        return {"data": data, "records": len(content) // SIZE, "records_hash": sha256(content).hexdigest()}

    def _check_overlap(self, last: Mapping[str, Any]) -> None:
        """Raise `LedgerError` for rows that another deal brought here, or that share none with those of before."""
        if self._data.dealt:
            raise LedgerError(
                f"{self._path.parent} is of another data set, or of the same one dealt otherwise among the clients; "
                "keep the data, clients, data.partition, data.limit and data.eval_share of its first run, as in a new "
                "ledger records that were charged would begin anew"
            )
        if self._known(last).isdisjoint(self._now[0]):
            raise LedgerError(
                f"{self._path.parent} is of another data set: none of these {len(self._now[0])} records was charged "
                "there; give them the ledger that they have, or a new one if they were in no run"
            )

    @cached_property
    def _now(self) -> tuple[frozenset[bytes], str]:
        """The keyed hashes of the client's records, and one of them all."""
        hashes = self._data.keyed_hashes(secret_key(self._salt))
        return frozenset(hashes), sha256(b"".join(sorted(hashes))).hexdigest()

    def _known(self, last: Mapping[str, Any]) -> frozenset[bytes]:
        """The keyed hashes of the records that were charged."""
        content = self._bytes(last)
        return frozenset(content[i : i + SIZE] for i in range(0, len(content), SIZE))

    def _bytes(self, last: Mapping[str, Any]) -> bytes:
        """The content of the file, as far as this line counts it. Raises `LedgerError` for another content."""
        try:
            content = self._path.read_bytes()[: last["records"] * SIZE]
        except OSError:
            content = b""
        if sha256(content).hexdigest() != last["records_hash"]:
            raise LedgerError(f"{self._path} is missing or was altered; put it back from a copy")
        return content

    def _check_by_fingerprint(self, last: Mapping[str, Any]) -> None:
        """Raise `LedgerError` where lines of version 0.1 are not of these training records, or of all records."""
        if "data" in last and last["data"] not in (self._data.fingerprint, self._data.whole_fingerprint):
            raise LedgerError(
                f"{self._path.parent} is of another data set, or of the same one split otherwise by an earlier version "
                "of fedlora; to go on with it set data.split = sample, and seed, data.limit and data.holdout as they "
                "were"
            )


def ledger_folder(ledgers: Path, number: int, data: ClientData) -> Path:
    """Return the folder in `ledgers` of the records' ledger: that of the client's number, or one that knows them.

    A site has another number in another federation, and its records' ledger goes with the records.
    """
    own = ledgers / str(number)
    if (own / "ledger.head").exists() or data.dealt:
        return own
    return next((folder for folder in sorted(ledgers.glob("*")) if _knows(folder, data)), own)


def _knows(folder: Path, data: ClientData) -> bool:
    """Were most of these records charged in the ledger of this folder?"""
    salt, path = folder / "ledger.salt", folder / "ledger.records"
    if not (salt.exists() and path.exists()):
        return False
    content, hashes = path.read_bytes(), frozenset(data.keyed_hashes(secret_key(salt)))
    known = {content[i : i + SIZE] for i in range(0, len(content), SIZE)}
    return 2 * len(hashes & known) > len(hashes)


def _last(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The last line that says of which data it is; an empty one where none does."""
    return next((entry for entry in reversed(entries) if "data" in entry), {})
