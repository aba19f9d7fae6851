"""What members of secure aggregation say in each step, read: what is not of its form is that member's failure alone.

    join      three keys of 32 bytes in hexadecimal, and two whole numbers: its examples and its records
    share     for each other member, 60 bytes in hexadecimal: sealed shares
    reveal    for members of the roster, 16 bytes in hexadecimal: a share of one secret of each

Whatever does not hold raises `WireError`. A member counts no more examples than it said it has when it joined the run.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedlora.errors import WireError
from fedlora.jobs import Client, Job
from fedlora.privacy.masked_update import keys_of
from fedlora.privacy.secure_aggregation import KEY, SEALED, SEED, Keys, is_public_key

KEYS = "sealing", "masking", "mark"
COUNTS = "examples", "records"


@dataclass(frozen=True)
class Joined:
    """What a member that joins a round says."""

    keys: Keys
    count: int  # of examples, or of records in a private run: what its weight is made of


def read_joined(said: Mapping[str, str], job: Job, client: Client) -> Joined:
    """Return the keys and the count of a member; `client` is what it said of itself when it joined the run."""
    _check_names(said, {*KEYS, *COUNTS})
    sealing, masking, mark = (said[name] for name in KEYS)
    for name in KEYS:
        _check_hex(said[name], KEY, f"its {name}")
    keys = keys_of(sealing, masking, mark)
    if not (is_public_key(keys.sealing) and is_public_key(keys.masking)):
        raise WireError("one of its keys is not a public key")
    examples, records = (_count(said[name], name) for name in COUNTS)
    count = min(records, client.records) if job.privacy else min(examples, client.examples)
    if count < 1:
        raise WireError("it joined the run with nothing to train on; give it records, or leave it out")
    return Joined(keys, count)


def read_sealed(said: Mapping[str, str], others: Collection[int]) -> Mapping[int, str]:
    """Return a member's sealed shares, for each of these others one, in hexadecimal."""
    _check_names(said, set(map(str, others)))
    for name, sealed in said.items():
        _check_hex(sealed, SEALED, f"its message for {name}")
    return {int(name): sealed for name, sealed in said.items()}


def read_shares(said: Mapping[str, str], owners: Collection[int]) -> Mapping[int, bytes]:
    """Return the shares that a member reveals, by the member whose secret was shared: one or more of these owners."""
    if not said or not set(said) <= set(map(str, owners)):
        raise WireError("it reveals shares of who is no member, or of nobody")
    for name, share in said.items():
        _check_hex(share, SEED, f"its share of {name}")
    return {int(name): bytes.fromhex(share) for name, share in said.items()}


def repeated_keys(joined: Mapping[int, Joined]) -> set[int]:
    """Return the members that advertise one key twice, or one that another advertises too."""
    owners: dict[bytes, list[int]] = {}
    for i, member in joined.items():
        for key in (member.keys.sealing, member.keys.masking, member.keys.commitment):
            owners.setdefault(key, []).append(i)
    return {i for sharing in owners.values() if len(sharing) > 1 for i in sharing}


def _check_names(said: Mapping[str, str], names: set[str]) -> None:
    if set(said) != names:
        raise WireError(f"its answer has {len(said)} entries, not the {len(names)} that were asked for, or other names")


def _check_hex(text: str, size: int, what: str) -> None:
    if not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text):
        raise WireError(f"{what} is not {size} bytes in hexadecimal")


def _count(text: str, name: str) -> int:
    """Return a whole number of 0 or more that is written as one, of up to 12 digits."""
    if not re.fullmatch("0|[1-9][0-9]{0,11}", text):
        raise WireError(f"its number of {name} is no whole number")
    return int(text)
