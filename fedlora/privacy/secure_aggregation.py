"""Secure aggregation: the server learns the sum of the clients' vectors, and no client's own.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning (CCS 2017),
https://eprint.iacr.org/2017/281, its protocol against an honest-but-curious server.

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)   mod 2^32

x_u is the vector of member u. Members u and v agree on s_uv, so the pairwise masks cancel in the sum. A member that
drops out leaves its pairwise masks in the vectors of the others; its masking key is then reconstructed from shares that
they hold. Of a member that stays, the self-mask b_u is reconstructed instead. No member reveals both secrets of
another, so that a vector which arrives too late stays masked.

    advertise keys:  join -> Keys                        masked input:  mask(vector, inbox) -> y_u
    share keys:      share(roster) -> sealed shares      unmasking:     reveal(survivors) -> shares -> unmask

Every member shares with every other. In SecAgg+ (Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead, CCS 2020) it shares with about log n of them, which pays off for hundreds of members and more. Flower's
`pseudo_rand_gen` is not used: it folds a seed to 32 bits and feeds them to a Mersenne Twister, so that its masks can
be found by trying all seeds. Here a mask is a keystream of AES-256.

A member that deals shares which cannot be opened, or reveals others than it was given, is left out where enough others
hold good ones: a reconstructed secret is held against its owner's keys, and others' shares are tried where it does not
fit. Shares that were dealt so that no secret fits them leave no sum, which is found at the end (`SumLost`).

The catch: the server brings the public keys. One that makes up members or hands out keys of its own is not
honest-but-curious, and is not held off. One that tells members different survivors is, up to the `colluders` that
`least_threshold` counts on. Nor is anything hidden that the sum itself gives away.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from random import Random
from secrets import token_bytes
from typing import Any, NamedTuple

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedlora.errors import SecureError, SumLost

Ring = NDArray[np.uint32]  # (n,), integers mod 2^32
FEWEST = 3  # members: of two, each could subtract its own vector from the sum and have the other's
KEY = 32  # bytes of a key
SEED = 16  # bytes of a shared seed: the length Shamir's scheme takes, as hard to guess as X25519 is to break
NONCE = 12  # bytes of a nonce of AES-GCM
SEALED = NONCE + 2 * SEED + 16  # bytes of a sealed message: two shares, and a tag of AES-GCM
MOST_GROUPS = 200  # of holders whose shares are tried where a secret does not fit its owner
log = logging.getLogger("fedlora")


def fewest_members(colluders: int) -> int:
    """Return how many members a sum needs to hide a vector from the others, `colluders` of whom put theirs together."""
    return max(FEWEST, colluders + 2)


def why_exposed(before: Collection[int], now: Collection[int], *, colluders: int) -> str:
    """Why a second sum of a round may not be read, in a clause; empty where it may.

    Where a round has two sums, each of a linear function of what its members trained (`Job.right`, `Job.left`), the
    first over the members `before` and the second over `now`, the two together give a function of those that are gone:
    with Y = sum_k B_k A_k W over `before` and Z = sum_k Q^T B_k A_k over `now`, Q^T Y - Z W is the sum of
    Q^T B_k A_k W over those. So nobody may be gone, or as many as a sum must have.
    """
    gone, come = set(before) - set(now), set(now) - set(before)
    fewest = fewest_members(colluders)
    if come:
        return f"members {sorted(come)} are in the round's second sum and not in its first"
    if 0 < len(gone) < fewest:
        return (
            f"members {sorted(gone)} are in the round's first sum and not in its second, and from both sums together "
            f"could be told what they trained: none may be missing, or {fewest} and more"
        )
    return ""


def least_threshold(members: int, *, colluders: int) -> int:
    """Return how many shares a secret must take at least, where `colluders` members may be in league with the server.

    A server could tell one half of the members that v survived and the other half that v dropped out, and so get
    shares of both of v's secrets. A member in league with it is in both halves, another one in one alone: of n members,
    c of them in league, two groups of t have 2 t - n or more in common, and one of these is honest if that exceeds c.
    """
    return max(fewest_members(colluders), (members + colluders) // 2 + 1)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The public keys that a member advertises, and its commitment."""

    sealing: bytes  # X25519, with which other members encrypt shares for it
    masking: bytes  # X25519, for the pairwise masks
    commitment: bytes  # to the seed of its self-mask: the server checks the reconstructed seed against it


class Shares(NamedTuple):
    """One member's shares of another's two secrets; b"" for a share that is not held, or was forgotten."""

    masking: bytes  # of the seed of its masking key
    own: bytes  # of the seed of its self-mask

    def revealable(self, stays: bool) -> "Shares":
        """Return the one share that unmasking needs: of the self-mask if the owner stays, else of its masking key.

        Of an owner whose message could not be opened neither is held, and nothing is revealed.
        """
        return self._replace(masking=b"") if stays else self._replace(own=b"")


@dataclass(frozen=True)
class Roster:
    """The roster of one round, the same for all members: made by the server, and checked by every member that gets it.

    Raises `SecureError` for a roster that would not protect its members.
    """

    context: str  # run and round
    keys: Mapping[int, Keys]  # of every member that joined
    threshold: int  # shares that reconstruct a secret
    colluders: int = 0  # members that may be in league with the server, by whoever checks the roster

    def __post_init__(self) -> None:
        n, fewest = len(self.keys), fewest_members(self.colluders)
        least = least_threshold(n, colluders=self.colluders)
        public = self._public_keys()
        if n < fewest:
            raise SecureError(f"{self.context}: {n} members joined; a sum hides a vector from {fewest} members on")
        if not least <= self.threshold <= n:
            raise SecureError(f"{self.context}: threshold is {self.threshold}; of {n} members, take {least} to {n}")
        if len(set(public)) < len(public) or any(len(k) != KEY for k in public):
            raise SecureError(f"{self.context}: a public key occurs twice or is not of {KEY} bytes; let all join anew")

    def _public_keys(self) -> list[bytes]:
        return [key for member in self.keys.values() for key in (member.sealing, member.masking, member.commitment)]

    @cached_property
    def name(self) -> str:
        """Hash of the whole roster: a member that was shown another derives other keys, and opens no share of this."""
        keys = sorted((i, k.sealing.hex(), k.masking.hex(), k.commitment.hex()) for i, k in self.keys.items())
        return sha256(json.dumps([self.context, self.threshold, keys]).encode()).hexdigest()

    @cached_property
    def places(self) -> Mapping[int, int]:
        """The point of the secret-sharing polynomial, from 1, at which each member's share lies."""
        return {member: place for place, member in enumerate(sorted(self.keys), 1)}

    def enough(self, count: int, did: str) -> None:
        """Raise `SecureError` where fewer members than `threshold` did this."""
        if count < self.threshold:
            raise SecureError(f"{self.context}: {count} members {did}, {self.threshold} must; begin a new round")


@dataclass(repr=False)
class Participant:
    """A client's side of one round.

    Each of `share`, `mask` and `reveal` changes the member, which forgets the secrets that it will not need. Between
    two messages a member lies on the client's disk: `dumps` must be stored before the result of a step is sent, and no
    older state may be used again, since a member that forgot what it has sent could be asked for the rest.
    """

    id: int
    context: str
    sealing: bytes  # private X25519 key; forgotten once masked
    masking: bytes  # seed of the private X25519 key for the pairwise masks; forgotten once masked
    own: bytes  # seed of the self-mask; forgotten once masked
    roster: Roster | None = None  # once shared
    shares: dict[int, Shares] = field(default_factory=dict)  # member -> its share of that member's secrets

    @classmethod
    def join(cls, id: int, context: str) -> "Participant":
        """Return a member with freshly drawn secrets for one round."""
        return cls(id, context, sealing=token_bytes(KEY), masking=token_bytes(SEED), own=token_bytes(SEED))

    @property
    def keys(self) -> Keys:
        """Public keys and commitment, to be advertised; they cannot be derived any more once the vector is masked."""
        return Keys(
            sealing=_public(self.sealing),
            masking=_public(_masking_key(self.masking, self.context, self.id)),
            commitment=_derive(self.own, "mark", self.context, self.id),
        )

    def share(self, roster: Roster) -> Mapping[int, bytes]:
        """Return an encrypted message for every other member, with its share of this member's two secrets."""
        if self.roster:
            raise self._refuses("it has shared its secrets", "join a new round")
        if roster.context != self.context or roster.keys.get(self.id) != self.keys:
            raise self._refuses(f"the roster of {roster.context} has not its keys", "send it the roster it joined")
        masking = dict(Shamir.split(roster.threshold, len(roster.keys), self.masking, False))
        own = dict(Shamir.split(roster.threshold, len(roster.keys), self.own, False))
        self.roster = roster
        self.shares = {self.id: Shares(masking=b"", own=own[roster.places[self.id]])}
        return {i: self._seal(roster, i, masking[x] + own[x]) for i, x in roster.places.items() if i != self.id}

    def mask(self, vector: Ring, inbox: Mapping[int, bytes]) -> Ring:
        """Return the vector plus its self-mask and the pairwise mask with each sender in the inbox.

        `inbox` maps each member whose shares arrived to its encrypted message. Of a member whose message cannot be
        opened no share is held; its pairwise mask comes of the roster's keys, and is added all the same.
        """
        if not self.roster or not self.masking:
            raise self._refuses("it masks one vector, after it has shared its secrets", "join a new round")
        if vector.dtype != np.uint32:
            raise self._refuses(f"a mask hides numbers of uint32, not of {vector.dtype}", "encode the vector")
        if self.id in inbox or not set(inbox) <= set(self.roster.keys):
            raise self._refuses("shares came from who is no other member", "send those of the roster's members")
        shares = {sender: self._open(self.roster, sender, sealed) for sender, sealed in inbox.items()}
        self.roster.enough(1 + sum(map(any, shares.values())), "shared their secrets")
        masked = vector + _stream(_derive(self.own, "self-mask", self.context, self.id), vector.size)
        for other in inbox:
            masked += _pairwise(self.masking, self.roster, me=self.id, other=other, size=vector.size)
        self.shares |= shares
        self.sealing = self.masking = self.own = b""
        return masked

    def reveal(self, survivors: Collection[int]) -> Mapping[int, bytes]:
        """Return a share for each member: of the self-mask of a survivor, of the masking key of one that dropped out.

        The other share of each is forgotten, so that a second request gets the same answer or none.
        """
        stay = set(survivors)
        self._check_survivors(stay)
        kept = {i: shares.revealable(i in stay) for i, shares in self.shares.items()}
        revealed = {i: shares.masking + shares.own for i, shares in kept.items() if any(shares)}  # one of two is empty
        if any(i not in revealed for i, shares in self.shares.items() if any(shares)):
            raise self._refuses(f"it has revealed for survivors other than {sorted(survivors)}", "begin a new round")
        self.shares = kept
        return revealed

    def _check_survivors(self, stay: set[int]) -> None:
        """Raise `SecureError` where this member cannot reveal shares yet, or cannot have these survivors."""
        if not self.roster or self.masking:
            raise self._refuses("it has no vector in the sum yet", "ask it to mask its vector")
        if self.id not in stay or not stay <= set(self.shares):
            why = f"survivors are {sorted(stay)}, not it and others of {sorted(self.shares)}"
            raise self._refuses(why, "name the members whose masked vectors arrived")
        self.roster.enough(len(stay), "sent a masked vector")

    def dumps(self) -> bytes:
        """Return the member's whole state, its secrets included, as JSON."""
        return json.dumps(asdict(self), default=bytes.hex).encode()

    @classmethod
    def loads(cls, state: bytes) -> "Participant":
        """Return the member that `dumps` made these bytes of. Raises `SecureError` for any other bytes."""
        try:
            raw = json.loads(state)
            raw |= {name: bytes.fromhex(raw[name]) for name in ("sealing", "masking", "own")}
            raw["shares"] = {int(i): Shares(*map(bytes.fromhex, pair)) for i, pair in raw["shares"].items()}
            raw["roster"] = raw["roster"] and _read_roster(raw["roster"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SecureError(f"a member's state of {len(state)} bytes is damaged; begin a new round") from error

    def _seal(self, roster: Roster, to: int, shares: bytes) -> bytes:
        key = _agree(self.sealing, roster.keys[to].sealing, "seal", roster.name, self.id, to)
        nonce = token_bytes(NONCE)
        return nonce + AESGCM(key).encrypt(nonce, shares, None)  # sender, receiver and roster are bound into the key

    def _open(self, roster: Roster, sender: int, sealed: bytes) -> Shares:
        """Return the sender's shares; empty ones where its message is not what the sender of this roster sealed."""
        key = _agree(self.sealing, roster.keys[sender].sealing, "seal", roster.name, sender, self.id)
        try:
            shares = AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], None)
        except (ValueError, InvalidTag):
            shares = b""
        if len(shares) != 2 * SEED:
            log.warning("shares from %d are damaged, or of another round, roster or receiver; none is held", sender)
            return Shares(masking=b"", own=b"")
        return Shares(masking=shares[:SEED], own=shares[SEED:])

    def _refuses(self, why: str, remedy: str) -> SecureError:
        return SecureError(f"{self.context}: member {self.id} refuses: {why}; {remedy}")


def unmask(
    roster: Roster,
    total: Ring,
    survivors: Collection[int],
    revealed: Mapping[int, Mapping[int, bytes]],
    *,
    owners: Collection[int],
) -> Ring:
    """Return the sum of the survivors' vectors, given the sum of their masked vectors.

    `owners` are the members that masked with one another, dropped out since or not; `revealed` maps members to the
    shares that each revealed, by the member whose secret was shared. A member whose shares are not those it was given
    is left out. Raises `SecureError` where too few revealed theirs, and `SumLost` where no shares of a member's secret
    fit its keys.
    """
    stay = set(survivors)
    if not set(revealed) <= stay <= set(owners) <= set(roster.keys):
        sets = f"{sorted(revealed)} revealed, {sorted(stay)} survived, {sorted(owners)} shared"
        raise SecureError(f"{roster.context}: {sets}, and not each within the next; begin a new round")
    roster.enough(len(revealed), "revealed their shares")
    plain, honest = total.copy(), set(revealed)
    for owner in owners:
        fits = _is_own_seed if owner in stay else _is_masking_seed
        shares = {i: revealed[i][owner] for i in sorted(honest) if len(revealed[i].get(owner, b"")) == SEED}
        seed, wrong = _reconstruct(roster, owner, shares, fits)
        honest -= wrong
        if owner in stay:
            plain -= _stream(_derive(seed, "self-mask", roster.context, owner), plain.size)
        else:
            plain += _missing_masks(roster, owner, seed, stay, plain.size)
    return plain


def _reconstruct(
    roster: Roster, owner: int, shares: Mapping[int, bytes], fits: Callable[[Roster, int, bytes], bool]
) -> tuple[bytes, set[int]]:
    """Return a member's secret, and the holders whose shares are not of it. Raises `SumLost` without such a secret."""

    def combined(holders: Sequence[int]) -> bytes:
        seed: bytes = Shamir.combine([(roster.places[i], shares[i]) for i in holders], False)
        return seed

    for tries, holders in enumerate(_groups(list(shares), roster.threshold)):
        seed = combined(holders)
        if not fits(roster, owner, seed):
            continue
        others = shares.keys() - set(holders) if tries else set[int]()
        wrong = {i for i in others if combined([*holders[1:], i]) != seed}
        if wrong:
            log.warning("%s: shares that %s revealed are not those they were given", roster.context, sorted(wrong))
        return seed, wrong
    raise SumLost(
        f"{roster.context}: no {roster.threshold} of the {len(shares)} shares that were revealed of member {owner} fit "
        "its keys, so the sum stays masked; if it happens again, leave that member out",
        owner,
    )


def _groups(holders: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield groups of this size: the first holders, and then, where there are more, groups drawn from all of them."""
    if len(holders) >= size:
        yield holders[:size]
    if len(holders) > size:
        draw = Random(0)
        yield from (draw.sample(holders, size) for _ in range(MOST_GROUPS))


def _is_own_seed(roster: Roster, owner: int, seed: bytes) -> bool:
    """Is this the seed of the self-mask of this member?"""
    return _derive(seed, "mark", roster.context, owner) == roster.keys[owner].commitment


def _is_masking_seed(roster: Roster, owner: int, seed: bytes) -> bool:
    """Is this the seed of the masking key of this member?"""
    return _public(_masking_key(seed, roster.context, owner)) == roster.keys[owner].masking


def _missing_masks(roster: Roster, owner: int, seed: bytes, stay: Collection[int], size: int) -> Ring:
    """Return the pairwise masks that a member which dropped out would have added, so that those of the others cancel.

    `seed` is the reconstructed seed of its masking key.
    """
    missing = np.zeros(size, np.uint32)
    for other in stay:
        missing += _pairwise(seed, roster, me=owner, other=other, size=size)
    return missing


def is_public_key(key: bytes) -> bool:
    """Can a secret be agreed on with the owner of this key? Not with a point of low order, which makes it zero."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        return False
    return True


def _read_roster(raw: Mapping[str, Any]) -> Roster:
    """Return the roster that a member's state holds as JSON."""
    keys = {int(i): Keys(**{name: bytes.fromhex(key) for name, key in k.items()}) for i, k in raw["keys"].items()}
    return Roster(raw["context"], keys, raw["threshold"], raw.get("colluders", 0))


def _derive(secret: bytes, *purpose: str | int) -> bytes:
    """Return a key for one purpose; every word of the purpose is bound into the key."""
    return HKDF(SHA256(), KEY, salt=None, info=json.dumps(purpose).encode()).derive(secret)


def _agree(private: bytes, public: bytes, *purpose: str | int) -> bytes:
    """Return the key that the owners of both key pairs derive for one purpose."""
    try:
        agreed = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of low order, with which every agreed key is zero
        raise SecureError(f"{public.hex()} is not a public key; let that member join anew") from error
    return _derive(agreed, *purpose)


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _masking_key(seed: bytes, context: str, id: int) -> bytes:
    return _derive(seed, "masking key", context, id)


def _stream(key: bytes, size: int) -> Ring:
    """Return (size,) numbers that nobody without the key can tell from uniform ones.

    Each key is used for one stream, so the counter may begin at zero.
    """
    stream = Cipher(AES(key), CTR(bytes(16))).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, "<u4").astype(np.uint32, copy=False)


def _pairwise(seed: bytes, roster: Roster, *, me: int, other: int, size: int) -> Ring:
    """Return the mask that `me` adds to its vector for `other`; the masks of the two add up to zero."""
    private, public = _masking_key(seed, roster.context, me), roster.keys[other].masking
    mask = _stream(_agree(private, public, "pairwise", roster.name, min(me, other), max(me, other)), size)
    return mask if me < other else np.uint32(0) - mask
