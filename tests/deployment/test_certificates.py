"""The server's certificate: OpenSSL takes it from those who trust the authority, and it is renewed when it must be."""

import socket
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from fedlora.deployment.certificates import hosts_of, server
from fedlora.deployment.provision import names_for, provision, read_clients
from fedlora.errors import ConfigError

HOSTS = ["fed.example.org", "10.0.0.5"]
LOCAL = ["localhost", "127.0.0.1", "::1"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    provision(tmp_path / "out", HOSTS, names_for(2))
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def server_certificate(out: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((out / "server" / "server.crt").read_bytes())


def shake(server: Path, ca: Path, host: str) -> str | None:
    """One TLS handshake on loopback, as strict as Python can be; the version that was agreed on."""
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(server / "server.crt", server / "server.key")
    asking = ssl.create_default_context(cafile=str(ca))
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=answer, args=(listener, serving))
        thread.start()
        try:
            raw = socket.create_connection(listener.getsockname(), 10)
            with raw, asking.wrap_socket(raw, server_hostname=host) as tls:
                return tls.version() if tls.recv(2) == b"ok" else None
        finally:
            thread.join(10)


def answer(listener: socket.socket, context: ssl.SSLContext) -> None:
    raw, _ = listener.accept()
    try:
        with context.wrap_socket(raw, server_side=True) as tls:
            tls.sendall(b"ok")
    except OSError:  # the other side did not trust us
        raw.close()


@pytest.mark.parametrize("host", [*HOSTS, *LOCAL])
def test_a_client_that_trusts_the_authority_reaches_the_server_by_each_of_its_hosts(out: Path, host: str) -> None:
    assert shake(out / "server", out / "clients" / "client-1" / "ca.crt", host) == "TLSv1.3"


@pytest.mark.parametrize("host", ["other.example.org", "10.0.0.6"])
def test_a_server_is_not_taken_for_another(out: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake(out / "server", out / "ca.crt", host)


def test_a_client_of_another_authority_does_not_trust_the_server(out: Path, tmp_path: Path) -> None:
    provision(tmp_path / "other", HOSTS, [])
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        shake(out / "server", tmp_path / "other" / "ca.crt", "localhost")


def test_a_server_cannot_sign_for_others(out: Path) -> None:
    leaf, root = server_certificate(out), x509.load_pem_x509_certificate((out / "ca.crt").read_bytes())
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    uses = root.extensions.get_extension_for_class(x509.KeyUsage).value
    assert uses.key_cert_sign and uses.crl_sign and not uses.digital_signature


def test_a_new_host_is_added_to_those_that_were(out: Path) -> None:
    before = contents(out)
    assert hosts_of(server_certificate(out)) == HOSTS + LOCAL
    (said,) = provision(out, ["B.example.org", "[2001:DB8::1]"], [])
    added = ["b.example.org", "2001:db8::1"]
    assert hosts_of(server_certificate(out)) == HOSTS + LOCAL + added and "was not for b.example.org, 2001" in said
    assert {name for name, was in before.items() if contents(out)[name] != was} == {"server/server.crt"}
    assert shake(out / "server", out / "ca.crt", "b.example.org")


def test_a_certificate_holds_as_long_as_was_said_and_from_yesterday(out: Path) -> None:
    made, now = server_certificate(out), datetime.now(UTC)
    assert abs(made.not_valid_after_utc - now - timedelta(days=825)) < timedelta(minutes=5)
    assert abs(now - made.not_valid_before_utc - timedelta(days=1)) < timedelta(minutes=5)
    root = x509.load_pem_x509_certificate((out / "ca.crt").read_bytes())
    assert abs(root.not_valid_after_utc - now - timedelta(days=3650)) < timedelta(minutes=5)


def test_a_certificate_that_ends_within_a_month_is_made_anew_and_another_is_not(tmp_path: Path) -> None:
    provision(tmp_path, HOSTS, [], days=29)
    old = server_certificate(tmp_path)
    (said,) = provision(tmp_path, [], [], days=31)
    new = server_certificate(tmp_path)
    assert f"ends on {old.not_valid_after_utc.date()}" in said and hosts_of(new) == HOSTS + LOCAL
    provision(tmp_path, [], [])
    assert server_certificate(tmp_path) == new and new.public_key() == old.public_key()


def test_a_certificate_that_has_ended_is_refused_and_made_anew(out: Path) -> None:
    pems = [(out / name).read_bytes() for name in ("ca.key", "ca.crt")]
    key, issuer = load_pem_private_key(pems[0], None), x509.load_pem_x509_certificate(pems[1])
    public = server_certificate(out).public_key()
    assert isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(public, ec.EllipticCurvePublicKey)
    ended = server(LOCAL, public, issuer, key, days=0)
    (out / "server" / "server.crt").write_bytes(ended.public_bytes(Encoding.PEM))
    time.sleep(1.1)  # its end counts in whole seconds
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake(out / "server", out / "ca.crt", "localhost")
    provision(out, [], [])
    assert shake(out / "server", out / "ca.crt", "localhost")


def test_a_certificate_is_made_anew_when_asked(out: Path) -> None:
    old = server_certificate(out)
    assert "as was asked" in provision(out, [], [], renew=True)[0]
    assert server_certificate(out).serial_number != old.serial_number
    assert shake(out / "server", out / "ca.crt", "localhost")


def test_a_stolen_server_key_is_replaced_with_its_certificate(out: Path) -> None:
    (out / "server" / "server.key").unlink()
    assert "its key is new" in provision(out, [], [])[0]
    assert shake(out / "server", out / "ca.crt", "localhost")


def test_a_new_authority_signs_again_and_its_certificate_goes_to_all(out: Path) -> None:
    for gone in ("ca.key", "ca.crt", "server/ca.crt"):
        (out / gone).unlink()
    assert "the authority is new" in provision(out, [], [])[1]
    assert shake(out / "server", out / "clients" / "client-1" / "ca.crt", "localhost")


@pytest.mark.parametrize("host", ["", "https://a", "a:8443", "*.a.org", "10.0.0.300", "a..b", "ä.org", "fe80::1%eth0"])
def test_a_host_that_is_not_one_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a name nor an IP address"):
        provision(tmp_path, [host], [])


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_a_lifetime_that_is_none_is_refused(tmp_path: Path, days: int) -> None:
    with pytest.raises(ConfigError, match="give it 1 to 3650"):
        provision(tmp_path, HOSTS, [], days=days)


def test_clients_are_added_while_the_authoritys_key_is_elsewhere_and_certificates_are_not(out: Path) -> None:
    (out / "ca.key").unlink()
    provision(out, [], names_for(3))
    assert len(read_clients(out / "server")) == 3
    with pytest.raises(ConfigError, match=r"ca\.key could not be read"):
        provision(out, ["new.example.org"], [])


def test_an_authority_that_clients_trust_is_not_replaced_in_silence(out: Path, tmp_path: Path) -> None:
    (out / "ca.crt").unlink()
    with pytest.raises(ConfigError, match=r"ca\.crt is gone, and clients trust it: copy"):
        provision(out, [], [])
    provision(tmp_path / "other", HOSTS, [])
    (out / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    with pytest.raises(ConfigError, match=r"ca\.key is not the key of"):
        provision(out, [], [])
