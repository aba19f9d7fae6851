"""Secure aggregation: the server learns the sum of the clients' vectors, and no client's own.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning (CCS 2017),
https://eprint.iacr.org/2017/281, its protocol against an honest-but-curious server.

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)   mod 2^32

s_uv is agreed on by members u and v, so the pairwise masks cancel in the sum. Whoever drops out leaves its own behind;
its masking key is then put together from shares that the others hold. Of whoever stays, the self-mask b_u is put
together instead. Nobody gives away both of one member, so a vector that arrives too late stays masked.

    join -> Keys -> share(cohort) -> sealed shares -> mask(vector, inbox) -> y_u -> reveal(survivors) -> unmask

Every member shares with every other. In SecAgg+ (Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead, CCS 2020) it shares with about log n of them, which pays off for hundreds of members and more. Flower's
`pseudo_rand_gen` is not used: it folds a seed to 32 bits and feeds them to a Mersenne Twister, so that its masks can
be found by trying all seeds. Here a mask is a keystream of AES-256.

The catch: the server brings the public keys. One that makes up members, hands out keys of its own or gives all weight
to one member is not honest-but-curious, and is not held off. Nor is what the sum itself gives away.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from secrets import token_bytes

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
FEWEST = 3  # of two, each could take its own vector off the sum and have the other's
KEY = 32  # bytes of a key
SEED = 16  # bytes of a seed that is shared: what Shamir takes, and as hard to guess as X25519 is to break
NONCE = 12  # bytes of AES-GCM's


@dataclass(frozen=True)
class Keys:
    """What a member makes public."""

    sealing: bytes  # X25519, for its shares on their way
    masking: bytes  # X25519, for the pairwise masks
    mark: (
        bytes  # a commitment to the seed of its self-mask: the server sees by it that the seed was put together rightly
    )


@dataclass(frozen=True)
class Roster:
    """Who takes part in one round, the same for all; the server makes it, and every member checks it by making it."""

    context: str  # run and round
    keys: Mapping[int, Keys]  # of every member that joined
    threshold: int  # shares that bring a secret back

    def __post_init__(self) -> None:
        n, public = (
            len(self.keys),
            [k for keys in self.keys.values() for k in (keys.sealing, keys.masking, keys.mark)],
        )
        least = max(FEWEST, n // 2 + 1)
        # A server could tell one half of the members that v survived and the other half that it dropped out, and so
        # get shares of both its secrets. No two groups without a common member both have more than half. With c
        # members in league with the server, threshold must exceed (n + c) / 2.
        if n < FEWEST:
            raise SecureError(f"{self.context}: {n} members joined; a sum hides a vector from {FEWEST} members on")
        if not least <= self.threshold <= n:
            raise SecureError(f"{self.context}: threshold is {self.threshold}; of {n} members, take {least} to {n}")
        if len(set(public)) < len(public) or any(len(k) != KEY for k in public):
            raise SecureError(f"{self.context}: a public key occurs twice or is not of {KEY} bytes; let all join anew")

    @cached_property
    def name(self) -> str:
        """A hash of it all: whoever was shown another roster derives other keys, and opens no share of this one."""
        keys = sorted((i, k.sealing.hex(), k.masking.hex(), k.mark.hex()) for i, k in self.keys.items())
        return sha256(json.dumps([self.context, self.threshold, keys]).encode()).hexdigest()

    @cached_property
    def places(self) -> Mapping[int, int]:
        """Where on the polynomial a member's share lies."""
        return {member: place for place, member in enumerate(sorted(self.keys), 1)}

    def enough(self, count: int, did: str) -> None:
        """Stop where fewer members than `threshold` are left."""
        if count < self.threshold:
            raise SecureError(f"{self.context}: {count} members {did}, {self.threshold} must; begin a new round")


@dataclass(repr=False)
class Participant:
    """A client's side of one round.

    It changes with each of `share`, `mask` and `reveal`, and forgets what it will not need. Between two messages it
    lies on the client's disk: `dumps` must be stored before what a step returned is sent, and no older state used
    again, since a member that forgot what it has sent could be asked for the rest.
    """

    id: int
    context: str
    sealing: bytes  # private X25519 key; forgotten once masked
    masking: bytes  # seed of the private X25519 key for the pairwise masks; forgotten once masked
    own: bytes  # seed of the self-mask; forgotten once masked
    cohort: Roster | None = None  # once shared
    shares: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # of others' `masking` and `own`, or b""

    @classmethod
    def join(cls, id: int, context: str) -> "Participant":
        """Draw the secrets of one round."""
        return cls(id, context, token_bytes(KEY), token_bytes(SEED), token_bytes(SEED))

    @property
    def keys(self) -> Keys:
        """What the others must know; gone once masked."""
        masking = _masking_key(self.masking, self.context, self.id)
        return Keys(_public(self.sealing), _public(masking), _derive(self.own, "mark", self.context, self.id))

    def share(self, cohort: Roster) -> Mapping[int, bytes]:
        """Sealed shares of its two secrets, one message for every other member."""
        if self.cohort:
            raise self._refuses("it has shared its secrets", "join a new round")
        if cohort.context != self.context or cohort.keys.get(self.id) != self.keys:
            raise self._refuses(f"the roster of {cohort.context} has not its keys", "send it the roster it joined")
        k, n = cohort.threshold, len(cohort.keys)
        masking, own = (dict(Shamir.split(k, n, seed, False)) for seed in (self.masking, self.own))
        self.cohort, self.shares = cohort, {self.id: (b"", own[cohort.places[self.id]])}
        return {i: self._seal(cohort, i, masking[x] + own[x]) for i, x in cohort.places.items() if i != self.id}

    def mask(self, vector: Ring, inbox: Mapping[int, bytes]) -> Ring:
        """The vector, masked by itself and with every member whose shares arrived, which are in the inbox by sender."""
        if not self.cohort or not self.masking:
            raise self._refuses("it masks one vector, after it has shared its secrets", "join a new round")
        if vector.dtype != np.uint32:
            raise self._refuses(f"a mask hides numbers of uint32, not of {vector.dtype}", "encode the vector")
        self.cohort.enough(len(inbox) + 1, "shared their secrets")
        shares = {sender: self._open(self.cohort, sender, sealed) for sender, sealed in inbox.items()}
        masked = vector + _stream(_derive(self.own, "self-mask", self.context, self.id), vector.size)
        for other in inbox:
            masked += _pairwise(self.masking, self.cohort, self.id, other, vector.size)
        self.shares |= shares
        self.sealing = self.masking = self.own = b""
        return masked

    def reveal(self, survivors: Collection[int]) -> Mapping[int, bytes]:
        """By member, a share of the self-mask of survivors and of the masking key of those who dropped out.

        The other share of each it forgets; so asked again it answers the same, or not at all.
        """
        if not self.cohort or self.masking:
            raise self._refuses("it has no vector in the sum yet", "ask it to mask its vector")
        if self.id not in survivors or not set(survivors) <= set(self.shares):
            why = f"survivors are {sorted(survivors)}, not it and others of {sorted(self.shares)}"
            raise self._refuses(why, "name the members whose masked vectors arrived")
        self.cohort.enough(len(set(survivors)), "sent a masked vector")
        revealed = {i: pair[i in survivors] for i, pair in self.shares.items()}
        if not all(revealed.values()):
            raise self._refuses(f"it has revealed for survivors other than {sorted(survivors)}", "begin a new round")
        self.shares = {i: (b"", s) if i in survivors else (s, b"") for i, s in revealed.items()}
        return revealed

    def dumps(self) -> bytes:
        """Its state, secrets and all."""
        return json.dumps(asdict(self), default=bytes.hex).encode()

    @classmethod
    def loads(cls, state: bytes) -> "Participant":
        """The member that `dumps` made these bytes of."""
        try:
            raw = json.loads(state)
            raw |= {name: bytes.fromhex(raw[name]) for name in ("sealing", "masking", "own")}
            raw["shares"] = {int(i): (bytes.fromhex(m), bytes.fromhex(s)) for i, (m, s) in raw["shares"].items()}
            if cohort := raw["cohort"]:
                keys = {int(i): Keys(**{k: bytes.fromhex(x) for k, x in v.items()}) for i, v in cohort["keys"].items()}
                raw["cohort"] = Roster(cohort["context"], keys, cohort["threshold"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SecureError(f"a member's state of {len(state)} bytes is damaged; begin a new round") from error

    def _seal(self, cohort: Roster, to: int, shares: bytes) -> bytes:
        key = _agree(self.sealing, cohort.keys[to].sealing, "seal", cohort.name, self.id, to)
        nonce = token_bytes(NONCE)
        return nonce + AESGCM(key).encrypt(nonce, shares, None)  # from whom, to whom and where is in the key

    def _open(self, cohort: Roster, sender: int, sealed: bytes) -> tuple[bytes, bytes]:
        try:
            key = _agree(self.sealing, cohort.keys[sender].sealing, "seal", cohort.name, sender, self.id)
            shares = AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], None)
        except (KeyError, ValueError, InvalidTag) as error:
            why = f"shares from {sender} are damaged, or of another round, roster or receiver"
            raise self._refuses(why, "begin a new round") from error
        return shares[:SEED], shares[SEED:]

    def _refuses(self, why: str, remedy: str) -> SecureError:
        return SecureError(f"{self.context}: member {self.id} refuses: {why}; {remedy}")


def unmask(
    cohort: Roster, total: Ring, survivors: Collection[int], revealed: Mapping[int, Mapping[int, bytes]]
) -> Ring:
    """The sum of the survivors' vectors, from the sum of their masked ones and what enough of them revealed."""
    cohort.enough(len(revealed), "revealed their shares")
    stay, owners = set(survivors), set[int]().union(*revealed.values())  # owners: all that masked for one another
    if not set(revealed) <= stay <= owners <= set(cohort.keys):
        sets = f"{sorted(revealed)} revealed, {sorted(stay)} survived, {sorted(owners)} shared"
        raise SecureError(f"{cohort.context}: {sets}, and not each within the next; begin a new round")
    for member, shares in revealed.items():
        if set(shares) != owners or any(len(share) != SEED for share in shares.values()):
            raise SecureError(f"{cohort.context}: what member {member} revealed is malformed; leave it out")
    plain, some_of = total.copy(), sorted(revealed)[: cohort.threshold]
    for owner in owners:
        seed = Shamir.combine([(cohort.places[i], revealed[i][owner]) for i in some_of], False)
        if owner in stay:
            whole = _derive(seed, "mark", cohort.context, owner) == cohort.keys[owner].mark
            plain -= _stream(_derive(seed, "self-mask", cohort.context, owner), plain.size)
        else:
            whole = _public(_masking_key(seed, cohort.context, owner)) == cohort.keys[owner].masking
            for other in stay:
                plain += _pairwise(seed, cohort, owner, other, plain.size)  # as it would have, so that pairs cancel
        if not whole:
            raise SecureError(f"{cohort.context}: the shares revealed of {owner} do not fit it; begin a new round")
    return plain


def _derive(secret: bytes, *purpose: str | int) -> bytes:
    """A key for one purpose, of which every word is bound into it."""
    return HKDF(SHA256(), KEY, salt=None, info=json.dumps(purpose).encode()).derive(secret)


def _agree(private: bytes, public: bytes, *purpose: str | int) -> bytes:
    try:
        agreed = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of low order, with which whatever is agreed on is zero
        raise SecureError(f"{public.hex()} is not a public key; let that member join anew") from error
    return _derive(agreed, *purpose)


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _masking_key(seed: bytes, context: str, id: int) -> bytes:
    return _derive(seed, "masking key", context, id)


def _stream(key: bytes, size: int) -> Ring:
    """Numbers that nobody without the key tells from uniform ones; a key makes one stream, so the counter is zero."""
    stream = Cipher(AES(key), CTR(bytes(16))).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, "<u4").astype(np.uint32, copy=False)


def _pairwise(seed: bytes, cohort: Roster, me: int, other: int, size: int) -> Ring:
    """What `me` adds to its vector for `other`; the two add up to zero."""
    private, public = _masking_key(seed, cohort.context, me), cohort.keys[other].masking
    mask = _stream(_agree(private, public, "pairwise", cohort.name, min(me, other), max(me, other)), size)
    return mask if me < other else np.uint32(0) - mask
