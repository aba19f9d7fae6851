"""The certificates of a deployment: the authority's own, and those that it gives to the server and to clients."""

import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import ConfigError

ALWAYS = ("localhost", "127.0.0.1", "::1")  # hosts of every server: health checks dial them on its own machine
SOON = timedelta(days=30)  # a certificate that ends sooner is made anew
YEARS = 10  # that an authority's certificate holds

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The certificate of a new authority, which may sign others' certificates, but not those of other authorities."""
    name = _named(f"fedlora CA {secrets.token_hex(4)}")  # the number tells two authorities apart in error messages
    return (
        _builder(name, name, key.public_key(), 365 * YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_only("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA384())
    )


def server(
    hosts: Sequence[str],
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    """A server's certificate for these hosts (DNS names or IP addresses), signed with the issuer's key.

    The certificate holds for `days`, but ends no later than the issuer's.
    """
    days_of_issuer = (issuer.not_valid_after_utc - datetime.now(UTC)).days
    end = min(days, days_of_issuer)
    return (
        _builder(_named("fedlora server"), issuer.subject, key, end)
        .add_extension(x509.SubjectAlternativeName([_entry(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_only("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )


def client(
    name: str, key: ec.EllipticCurvePublicKey, issuer: x509.Certificate, signer: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    """A client's certificate for its connections, signed with the issuer's key.

    It ends with the issuer's: who may take part is for the list of clients to say.
    """
    days = (issuer.not_valid_after_utc - datetime.now(UTC)).days
    return (
        _builder(_named(name), issuer.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_only("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )


def is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Did this authority issue the certificate?"""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def reissue_reason(
    old: x509.Certificate, issuer: x509.Certificate, key: ec.EllipticCurvePublicKey, hosts: Sequence[str]
) -> str:
    """The reason to reissue the server's certificate, such as "as its key is new"; an empty string if it is good."""
    if old.public_key() != key:
        return "as its key is new"
    if not is_issued_by(old, issuer):
        return "as the authority is new"
    if added := [host for host in hosts if host not in hosts_of(old)]:
        return f"as the last one was not for {', '.join(added)}"
    return f"as the last one ends on {old.not_valid_after_utc.date()}" if ends_soon(old) else ""


def ends_soon(certificate: x509.Certificate) -> bool:
    """Does the certificate end within 30 days, or has it ended already?"""
    return certificate.not_valid_after_utc - datetime.now(UTC) < SOON


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The hosts that a certificate is for, in the order in which they were given. Raises `ConfigError` if none is."""
    try:
        entries = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError) as e:
        raise ConfigError("the server's certificate names no host; delete server.crt and provision with --host") from e
    return [str(entry.value) for entry in entries]


def host(text: str) -> str:
    """The host in its usual form: a DNS name in lower case or an IP address. Raises `ConfigError` for anything else."""
    name = text.strip().strip("[]").lower()
    with suppress(ValueError):
        if "%" not in name:  # an address that holds on one link alone is of no use to others
            return str(ip_address(name))
    if not _is_dns_name(name):
        raise ConfigError(
            f'--host "{text}" is neither a name nor an IP address; give it without https://, a port or *, and a name '
            "in other letters in its xn-- form"
        )
    return name


def _is_dns_name(name: str) -> bool:
    labels = name.split(".")
    is_mistyped_address = labels[-1].isdigit()
    return len(name) <= 253 and not is_mistyped_address and all(_LABEL.fullmatch(label) for label in labels)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    """A certificate with the fields of both kinds. It holds from yesterday, as a client's clock may be behind."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _only(*uses: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in uses for use in _USES})


def _entry(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
