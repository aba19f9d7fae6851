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

The catch: the server brings the public keys. One that makes up members, hands out keys of its own or gives all weight
to one member is not honest-but-curious, and is not held off. Nor is anything hidden that the sum itself gives away.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
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

from fedlora.errors import SecureError

Ring = NDArray[np.uint32]  # (n,), integers mod 2^32
FEWEST = 3  # members: of two, each could subtract its own vector from the sum and have the other's
KEY = 32  # bytes of a key
SEED = 16  # bytes of a shared seed: the length Shamir's scheme takes, as hard to guess as X25519 is to break
NONCE = 12  # bytes of a nonce of AES-GCM


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
        """Return the one share that unmasking needs: of the self-mask if the owner stays, else of its masking key."""
        return self._replace(masking=b"") if stays else self._replace(own=b"")


@dataclass(frozen=True)
class Roster:
    """The roster of one round, the same for all members: made by the server, and checked by every member that gets it.

    Raises `SecureError` for a roster that would not protect its members.
    """

    context: str  # run and round
    keys: Mapping[int, Keys]  # of every member that joined
    threshold: int  # shares that reconstruct a secret

    def __post_init__(self) -> None:
        n = len(self.keys)
        # A server could tell one half of the members that v survived and the other half that v dropped out, and so
        # get shares of both of v's secrets. No two groups without a common member both have more than half. With c
        # members in league with the server, the threshold must exceed (n + c) / 2.
        least = max(FEWEST, n // 2 + 1)
        public = self._public_keys()
        if n < FEWEST:
            raise SecureError(f"{self.context}: {n} members joined; a sum hides a vector from {FEWEST} members on")
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

        `inbox` maps each member whose shares arrived to its encrypted message.
        """
        if not self.roster or not self.masking:
            raise self._refuses("it masks one vector, after it has shared its secrets", "join a new round")
        if vector.dtype != np.uint32:
            raise self._refuses(f"a mask hides numbers of uint32, not of {vector.dtype}", "encode the vector")
        self.roster.enough(len(inbox) + 1, "shared their secrets")
        shares = {sender: self._open(self.roster, sender, sealed) for sender, sealed in inbox.items()}
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
        revealed = {i: shares.masking + shares.own for i, shares in kept.items()}  # of which one is empty
        if not all(revealed.values()):
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
        try:
            key = _agree(self.sealing, roster.keys[sender].sealing, "seal", roster.name, sender, self.id)
            shares = AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], None)
        except (KeyError, ValueError, InvalidTag) as error:
            why = f"shares from {sender} are damaged, or of another round, roster or receiver"
            raise self._refuses(why, "begin a new round") from error
        return Shares(masking=shares[:SEED], own=shares[SEED:])

    def _refuses(self, why: str, remedy: str) -> SecureError:
        return SecureError(f"{self.context}: member {self.id} refuses: {why}; {remedy}")


def unmask(
    roster: Roster, total: Ring, survivors: Collection[int], revealed: Mapping[int, Mapping[int, bytes]]
) -> Ring:
    """Return the sum of the survivors' vectors, given the sum of their masked vectors.

    `revealed` maps members to the shares that each revealed, by the member whose secret was shared. Raises
    `SecureError` where these are too few, or reconstruct a secret that does not fit its owner's keys.
    """
    stay = set(survivors)
    owners = _owners(roster, stay, revealed)
    holders = sorted(revealed)[: roster.threshold]
    plain = total.copy()
    for owner in owners:
        seed = Shamir.combine([(roster.places[i], revealed[i][owner]) for i in holders], False)
        if owner in stay:
            plain -= _self_mask(roster, owner, seed, plain.size)
        else:
            plain += _missing_masks(roster, owner, seed, stay, plain.size)
    return plain


def _owners(roster: Roster, stay: set[int], revealed: Mapping[int, Mapping[int, bytes]]) -> set[int]:
    """Return the members that masked their vectors with one another, dropped out since or not.

    Raises `SecureError` for revealed shares that are too few, malformed or not of these members.
    """
    roster.enough(len(revealed), "revealed their shares")
    owners = set[int]().union(*revealed.values())
    if not set(revealed) <= stay <= owners <= set(roster.keys):
        sets = f"{sorted(revealed)} revealed, {sorted(stay)} survived, {sorted(owners)} shared"
        raise SecureError(f"{roster.context}: {sets}, and not each within the next; begin a new round")
    for member, shares in revealed.items():
        if set(shares) != owners or {len(share) for share in shares.values()} != {SEED}:
            raise SecureError(f"{roster.context}: what member {member} revealed is malformed; leave it out")
    return owners


def _self_mask(roster: Roster, owner: int, seed: bytes, size: int) -> Ring:
    """Return the self-mask of a member that stayed, from its reconstructed seed."""
    if _derive(seed, "mark", roster.context, owner) != roster.keys[owner].commitment:
        raise _misfit(roster, owner)
    return _stream(_derive(seed, "self-mask", roster.context, owner), size)


def _missing_masks(roster: Roster, owner: int, seed: bytes, stay: Collection[int], size: int) -> Ring:
    """Return the pairwise masks that a member which dropped out would have added, so that those of the others cancel.

    `seed` is the reconstructed seed of its masking key.
    """
    if _public(_masking_key(seed, roster.context, owner)) != roster.keys[owner].masking:
        raise _misfit(roster, owner)
    missing = np.zeros(size, np.uint32)
    for other in stay:
        missing += _pairwise(seed, roster, me=owner, other=other, size=size)
    return missing


def _misfit(roster: Roster, owner: int) -> SecureError:
    return SecureError(f"{roster.context}: the shares revealed of {owner} do not fit it; begin a new round")


def _read_roster(raw: Mapping[str, Any]) -> Roster:
    """Return the roster that a member's state holds as JSON."""
    keys = {int(i): Keys(**{name: bytes.fromhex(key) for name, key in k.items()}) for i, k in raw["keys"].items()}
    return Roster(raw["context"], keys, raw["threshold"])


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
