"""Which client signed a request, by the headers that Flower's SuperNode adds to each of its requests.

A SuperNode sends its public key, the time, and its signature of the time (ECDSA over SHA-256). The gateway looks the
key up among the clients of the deployment and verifies the signature before it gives the request a place. Flower is
not loaded here: its names and tolerances are repeated, and tests/server/deployment/test_node_signatures.py holds them
to Flower's own. The signature covers the time alone, and neither path nor body; those the TLS connection guards.
"""

from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.deployment.provision import key_header, public_key, read_clients

KEY_HEADER = "flwr-public-key"
SIGNATURE_HEADER = "flwr-signature"
TIME_HEADER = "flwr-timestamp"
BEHIND = 5.0  # seconds that a client's clock may be ahead of this one
LASTS = 305.0  # seconds for which a signature holds


class NotSigned(Exception):
    """A request that no client of the deployment has signed; its text is the reason in two or three words."""


@dataclass(frozen=True)
class KnownClients:
    """The clients that may take part, by the value of the header with which each sends its public key."""

    by_header: Mapping[bytes, tuple[str, ec.EllipticCurvePublicKey]]

    def signer(self, headers: Mapping[str, bytes], now: float) -> str:
        """The name of the client that signed a request with these headers, at the time `now`. Raises `NotSigned`."""
        known = self.by_header.get(headers.get(KEY_HEADER, b""))
        if known is None:
            raise NotSigned("unknown key")
        name, key = known
        signed = headers.get(TIME_HEADER, b"")
        if not -BEHIND < now - _time(signed) < LASTS:
            raise NotSigned("old signature")
        try:
            signature = b64decode(headers.get(SIGNATURE_HEADER, b""), validate=True)
            key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
        except (Base64Error, InvalidSignature):
            raise NotSigned("false signature") from None
        return name


def known_clients(folder: Path) -> KnownClients:
    """The clients by the server's folder of `fedlora provision`. Raises `ConfigError` for a damaged one."""
    keys = {name: public_key(folder / "clients" / f"{name}.pub") for name in read_clients(folder)}
    return KnownClients({key_header(key): (name, key) for name, key in keys.items()})


def _time(text: bytes) -> float:
    """The seconds since 1970 of a time in ISO 8601 with its zone. Raises `NotSigned` for any other text."""
    try:
        at = datetime.fromisoformat(text.decode("ascii"))
    except ValueError:
        raise NotSigned("no time") from None
    if at.tzinfo is None:
        raise NotSigned("no time")
    return at.timestamp()
