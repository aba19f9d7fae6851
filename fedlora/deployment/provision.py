"""The keys of a deployment: a certificate authority, the server's certificate, and a pair of keys for every client.

    DIR/ca.key  ca.crt                       the key stays with whoever provisions
    DIR/server/port.json                     if it is not the usual one
    DIR/server/ca.crt  server.crt  server.key  superexec.secret
    DIR/server/clients.json  removed.json  clients/NAME.pub  clients.map
    DIR/clients/NAME/ca.crt  client.key  client.json
    DIR/server/client-ca.crt  clients/NAME.crt  DIR/clients/NAME/tls.key  tls.crt     with client certificates

`clients.json` holds each client's number; `removed.json` holds the numbers of clients that were removed, which are
never given again, and `removed_keys.json` the fingerprints of their keys, by which the server names one that comes
back. A client's public key is written last, so that the next `provision` completes what a killed one left undone.
`clients.map` says the public keys again, as nginx reads them. Private files can be read by their owner alone from the
moment they exist. Where `client-ca.crt` is, the gateway asks each connection for its client's certificate.
"""

import json
import re
import secrets
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.errors import ConfigError, nearest
from fedlora.storage.files import hold_lock, replace_file

from . import certificates
from .addresses import PORT, join_address, server_address

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")  # of a client; no command line can take one for an option
_PEM = serialization.Encoding.PEM
_MEND = "put back the one that fedlora provision made"
T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What client.json tells a client about itself."""

    name: str
    id: int  # the client's number, Flower's partition-id
    server: str  # the server's name or address, with its port if that is not the usual one


@dataclass(frozen=True)
class _Members:
    """The clients of a deployment, as the server's folder has them."""

    numbers: dict[str, int]  # name -> number, of clients.json
    removed: dict[str, str]  # number, as a key of JSON -> name, of removed.json

    @property
    def present(self) -> dict[str, int]:
        """The clients that are not removed; `numbers` holds more where a removal was cut short."""
        return {name: id for name, id in self.numbers.items() if str(id) not in self.removed}

    def next_number(self) -> int:
        """A number that no client ever had."""
        return max([*self.numbers.values(), *map(int, self.removed)], default=-1) + 1


def provision(
    out: Path,
    hosts: Sequence[str],
    names: Sequence[str],
    days: int = 825,
    renew: bool = False,
    *,
    port: int = 0,
    client_certificates: bool = False,
) -> list[str]:
    """Make the keys and certificates that are missing; return what was done, a line each. Raises `ConfigError`.

    New clients dial the server at `port`; 0: at the port that was given last, or at the usual one.

    What is there is kept. The server's certificate holds for `days`. It is made anew, for the same key, if a host is
    new, if it ends within 30 days, if the key or the authority is new, or with `renew`; hosts that it was for stay. To
    drop a host delete server.crt first; after a theft, server.key; for a new authority ca.key, ca.crt and
    server/ca.crt. Once there are `client_certificates`, all clients have them, later ones too; to do without them again
    delete server/client-ca.crt.
    """
    hosts = [certificates.host(host) for host in hosts]
    _check(out, hosts, names, days)
    with _alone(out):
        done = [*_authority(out), *_server(out, hosts, days, renew), *_secret(out / "server" / "superexec.secret")]
        dialled = hosts or certificates.hosts_of(_certificate(out / "server" / "server.crt"))
        address = _dialled(out / "server", dialled[0], port)
        for name, id in _enrol(out, list(dict.fromkeys(names))).items():
            done += _client(out, Identity(name, id, address))
        done += _client_certificates(out, client_certificates)
        _put(out / "server" / "clients.map", _as_map(out / "server"))
    return done or [f"{out} is complete; nothing was changed"]


def next_step(out: Path, done: Sequence[str]) -> list[str]:
    """What whoever provisions does now, as a line, if anything was made; a server that runs knows nothing of it."""
    if not any(line.startswith("made ") for line in done):
        return []
    return [f"now copy {out / 'server'} to the server, and start fedlora server there, again if it is running"]


def listen_port(server: Path) -> int:
    """The port at which clients dial the server, by the server's folder. Raises `ConfigError` for a damaged file."""
    path = server / "port.json"
    port = _read(path, json.loads) if path.exists() else PORT
    if not (_is_number(port) and 0 < port < 2**16):
        raise ConfigError(f"{path} is damaged: it is not a port; {_MEND}")
    return int(port)


def _dialled(server: Path, host: str, port: int) -> str:
    """What clients dial: the host, with its port if that is not the usual one. Keeps a `port` that is given."""
    if port:
        _put(server / "port.json", _as_json(port))
    port = listen_port(server)
    return host if port == PORT else join_address(host, port)


def _check(out: Path, hosts: Sequence[str], names: Sequence[str], days: int) -> None:
    """Raises `ConfigError` for a name, a number of days or hosts with which nothing can be made."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f'"{name}" cannot name a client: give 1 to 64 of a-z, A-Z, 0-9, "_", and inside "." and "-"'
            )
    if not 1 <= days <= 3650:
        raise ConfigError(f"the server's certificate cannot hold for {days} days; give it 1 to 3650")
    if not hosts and not (out / "server" / "server.crt").exists():
        raise ConfigError(f"{out} has no server's certificate yet: give --host, the name or address that clients dial")


def remove(out: Path, name: str) -> list[str]:
    """Remove a client: delete the client's keys here, and never give the client's number again. Raises `ConfigError`.

    A SuperLink that runs lets the client in until the server's folder is copied to the server and `fedlora server` is
    started again, which unregisters every key that `read_clients` no longer names.
    """
    server = out / "server"
    members = roster(server)
    if name not in members.present:
        raise ConfigError(f'{server / "clients.json"} has no client "{name}"; {nearest(name, members.numbers)}')
    number = members.numbers[name]
    with _alone(out):
        removed = roster(server).removed | {str(number): name}
        _write(server / "removed.json", _as_json(removed))  # from here on the client is removed
        _enrol(out, [])
        _put(server / "clients.map", _as_map(server))
    return [f"removed {name} (client {number}): copy {server} to the server, and start fedlora server again"]


def names_for(n: int) -> list[str]:
    """Names for `n` clients that have no names of their own.

    >>> names_for(2)
    ['client-1', 'client-2']
    """
    return [f"client-{i}" for i in range(1, n + 1)]


def read_clients(folder: Path) -> dict[str, int]:
    """The clients that may take part, by name, with their numbers. Raises `ConfigError` for a damaged server's folder.

    A client's public key is clients/NAME.pub in that folder; other files there belong to nobody.
    """
    clients = roster(folder).present
    for name in clients:
        public_key(folder / "clients" / f"{name}.pub")
    return clients


def read_client(folder: Path) -> Identity:
    """The client that a folder belongs to.

    Raises `ConfigError` for a file that is missing or damaged, and for a private key that everyone can read.
    """
    path = folder / "client.json"
    fields = _read(path, json.loads)
    try:
        who = Identity(**fields)
        if not (_NAME.fullmatch(who.name) and _is_number(who.id) and server_address(who.server)):
            raise TypeError("its number is not one")
    except (TypeError, AttributeError, ConfigError) as e:
        raise ConfigError(f"{path} is damaged ({e}); take it again from what fedlora provision made") from e
    _certificate(folder / "ca.crt")
    check_private(folder / "client.key")
    _key(folder / "client.key")
    return who


def check_private(path: Path) -> None:
    """Raises `ConfigError` for a secret that everyone on this machine can read.

    The file's group may read it: in containers a secret often belongs to root and to the group of the program.
    """
    mode = path.stat().st_mode if path.exists() else 0
    if mode & 0o007:
        raise ConfigError(f"{path} is open to everyone on this machine (mode {mode & 0o777:o}): chmod 600 {path}")


def public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A client's public key, read from a file in OpenSSH's form. Raises `ConfigError`."""
    key = _read(path, serialization.load_ssh_public_key)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path} is not an ECDSA key, and Flower takes no other; {_MEND}")
    return key


def key_header(key: ec.EllipticCurvePublicKey) -> bytes:
    """The value of the header with which a SuperNode of Flower's sends this public key."""
    return b64encode(key.public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo))


def key_fingerprint(header: bytes) -> str:
    """A short name of the key in this header of a SuperNode's, for logs; empty without a key."""
    return sha256(header).hexdigest()[:16] if header else ""


def names_by_fingerprint(server: Path) -> dict[str, str]:
    """The names of the clients that have a key, and of those that had one, by the server's folder.

    Raises `ConfigError` for a damaged one.
    """
    return _removed_keys(server) | {_fingerprint(server, name): name for name in read_clients(server)}


def _fingerprint(server: Path, name: str) -> str:
    return key_fingerprint(key_header(public_key(server / "clients" / f"{name}.pub")))


def _removed_keys(server: Path) -> dict[str, str]:
    """The names of the clients that were removed, by the fingerprints of the keys that they had."""
    path = server / "removed_keys.json"
    names = _read(path, json.loads) if path.exists() else {}
    if not isinstance(names, dict):
        raise ConfigError(f"{path} is damaged: it is not keys with their names; {_MEND}")
    return names


def _as_map(server: Path) -> bytes:
    """The clients that may take part, as the lines of a map of nginx': what the key's header says, and the name."""
    files = [(name, server / "clients" / f"{name}.pub") for name in roster(server).present]
    lines = [f'"{key_header(public_key(path)).decode()}" "{name}";\n' for name, path in files if path.exists()]
    return "".join(["# Made by fedlora provision: public keys of the clients, and their names.\n", *lines]).encode()


def _authority(out: Path) -> list[str]:
    """Make the authority's key and certificate, if there is none; return what was done."""
    path, copy = out / "ca.crt", out / "server" / "ca.crt"
    if path.exists():
        return []
    if copy.exists():
        raise ConfigError(f"{path} is gone, and clients trust it: copy {copy} there")
    _write(path, certificates.authority(_key(out / "ca.key", make=True)).public_bytes(_PEM))
    return [f"made a certificate authority, {path}; keep {out / 'ca.key'} away from the server and the clients"]


def _server(out: Path, hosts: Sequence[str], days: int, renew: bool) -> list[str]:
    """Make the server's key and certificate, if they are missing or no longer good; return what was done."""
    folder, issuer = out / "server", _certificate(out / "ca.crt")
    _put(folder / "ca.crt", (out / "ca.crt").read_bytes())
    path, key = folder / "server.crt", _key(folder / "server.key", make=True).public_key()
    old = _certificate(path) if path.exists() else None
    old_hosts = certificates.hosts_of(old) if old else []
    hosts = list(dict.fromkeys([*old_hosts, *hosts, *certificates.ALWAYS]))
    reason = certificates.reissue_reason(old, issuer, key, hosts) if old else "as there was none"
    if not reason and not renew:
        return []
    made = certificates.server(hosts, key, issuer, _signer(out, issuer), days)
    _write(path, made.public_bytes(_PEM))
    until = made.not_valid_after_utc.date()
    return [f"made the server's certificate, {reason or 'as was asked'}: for {', '.join(hosts)}, until {until}"]


def _signer(out: Path, issuer: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    """The authority's key. Raises `ConfigError` for a key of another authority, and for an authority that ends soon."""
    signer = _key(out / "ca.key")
    if signer.public_key() != issuer.public_key():
        raise ConfigError(f"{out / 'ca.key'} is not the key of {out / 'ca.crt'}; {_MEND}")
    if certificates.ends_soon(issuer):
        raise ConfigError(f"{out / 'ca.crt'} ends on {issuer.not_valid_after_utc.date()}; provision a new folder")
    return signer


def _secret(path: Path) -> list[str]:
    """Make the secret by which the SuperLink knows its SuperExec, if there is none; return what was done.

    No line break ends the file, as Flower takes every byte of it.
    """
    if path.exists():
        return []
    _write(path, b64encode(secrets.token_bytes(32)), mode=0o600)
    return [f"made the SuperExec secret, {path}"]


def roster(folder: Path) -> _Members:
    """The clients by clients.json and removed.json in the server's folder. Raises `ConfigError` for damaged files."""
    path, removed_path = folder / "clients.json", folder / "removed.json"
    numbers = _read(path, json.loads)
    removed = _read(removed_path, json.loads) if removed_path.exists() else {}
    if not _are_numbers_by_name(numbers):
        raise ConfigError(f"{path} is damaged: it is not names with their numbers; {_MEND}")
    if len(set(numbers.values())) < len(numbers):
        raise ConfigError(f"{path} is damaged: two clients have the same number; {_MEND}")
    if not isinstance(removed, dict) or not all(id.isdecimal() for id in removed):
        raise ConfigError(f"{removed_path} is damaged: it is not numbers with their names; {_MEND}")
    return _Members(numbers, removed)


def _are_numbers_by_name(value: Any) -> TypeGuard[dict[str, int]]:
    if not isinstance(value, dict):
        return False
    return all(_NAME.fullmatch(name) and _is_number(id) for name, id in value.items())


def _enrol(out: Path, names: Sequence[str]) -> dict[str, int]:
    """Give these clients numbers, delete the keys of removed ones, and return all that may take part."""
    server = out / "server"
    _begin_list(server)
    members = roster(server)
    for name in members.numbers.keys() - members.present.keys():
        _forget_key(server, name)
        (server / "clients" / f"{name}.crt").unlink(missing_ok=True)
        (out / "clients" / name / "client.key").unlink(missing_ok=True)
    clients = _Members(members.present, members.removed)
    for name in names:
        if name not in clients.numbers:
            _check_case(name, clients.numbers)
            clients.numbers[name] = clients.next_number()
    _put(server / "clients.json", _as_json(clients.numbers))
    return clients.numbers


def _forget_key(server: Path, name: str) -> None:
    """Delete the public key of a client that was removed; its fingerprint stays, by which the server names it."""
    path = server / "clients" / f"{name}.pub"
    if path.exists():
        with suppress(ConfigError):  # a key that is damaged has no fingerprint
            _put(server / "removed_keys.json", _as_json(_removed_keys(server) | {_fingerprint(server, name): name}))
        path.unlink()


def _begin_list(server: Path) -> None:
    """Begin clients.json. Raises `ConfigError` where there was one: its clients' numbers must not be given again."""
    path = server / "clients.json"
    if path.exists():
        return
    if any(server.glob("clients/*.pub")) or (server / "removed.json").exists():
        raise ConfigError(f"{path} is gone, and clients have their numbers from it; {_MEND}")
    _write(path, _as_json({}))


def _check_case(name: str, known: Iterable[str]) -> None:
    for twin in known:
        if twin.lower() == name.lower():
            raise ConfigError(f'"{name}" and "{twin}" are one file on some disks; give the client another name')


def _client(out: Path, who: Identity) -> list[str]:
    """Make a client's own folder, unless it was made before and may be on the client's machine by now.

    Returns what was done. The public key comes last: with it the folder counts as made.
    """
    folder, published = out / "clients" / who.name, out / "server" / "clients" / f"{who.name}.pub"
    if published.exists():
        if folder.exists():
            _put(folder / "ca.crt", (out / "ca.crt").read_bytes())
        return []
    _put(folder / "ca.crt", (out / "ca.crt").read_bytes())
    _write(folder / "client.json", _as_json(asdict(who)))
    key = _key(folder / "client.key", make=True).public_key()
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(published, line + f" {who.name}\n".encode())
    return [f"made {who.name} (client {who.id}): give {folder} to it, by a way that nobody else can read"]


def _client_certificates(out: Path, wanted: bool) -> list[str]:
    """Make the clients' certificates that are missing, if they are wanted or there are some; return what was done."""
    server, issuer = out / "server", _certificate(out / "ca.crt")
    if not wanted and not (server / "client-ca.crt").exists():
        return []
    done = []
    for name in roster(server).present:
        issued = server / "clients" / f"{name}.crt"
        if not issued.exists() or not certificates.is_issued_by(_certificate(issued), issuer):
            folder = out / "clients" / name
            key = _key(folder / "tls.key", make=True).public_key()
            made = certificates.client(name, key, issuer, _signer(out, issuer)).public_bytes(_PEM)
            _put(folder / "ca.crt", issuer.public_bytes(_PEM))
            _write(folder / "tls.crt", made)
            _write(issued, made)  # last: with it the client has its certificate
            done.append(f"made the certificate of {name}: give tls.crt and tls.key in {folder} to it")
    _put(server / "client-ca.crt", issuer.public_bytes(_PEM))
    return done


def has_certificate(folder: Path) -> bool:
    """Does a client's folder hold a certificate for its connections?

    Raises `ConfigError` for the key of one that everyone can read.
    """
    check_private(folder / "tls.key")
    return (folder / "tls.crt").exists()


def _key(path: Path, make: bool = False) -> ec.EllipticCurvePrivateKey:
    """Read a private key, or `make` it if there is none.

    A client's key is in OpenSSH's form, which Flower wants; others are in PKCS 8, which TLS wants.
    """
    form, load = serialization.PrivateFormat.PKCS8, serialization.load_pem_private_key
    if path.name == "client.key":
        form, load = serialization.PrivateFormat.OpenSSH, serialization.load_ssh_private_key
    if make and not path.exists():
        fresh = ec.generate_private_key(ec.SECP384R1()).private_bytes(_PEM, form, serialization.NoEncryption())
        _write(path, fresh, mode=0o600)
    key = _read(path, lambda content: load(content, None))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an ECDSA key; {_MEND}")
    return key


def _certificate(path: Path) -> x509.Certificate:
    return _read(path, x509.load_pem_x509_certificate)


def _read(path: Path, load: Callable[[bytes], T]) -> T:
    """The content of a file as `load` reads it. Raises `ConfigError` for a file that is missing or damaged."""
    try:
        return load(path.read_bytes())
    except OSError as e:
        raise ConfigError(f"{path} could not be read ({e.strerror}); {_MEND}") from e
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ConfigError(f"{path} is damaged; {_MEND}") from e


def _is_number(value: object) -> bool:
    return type(value) is int and value >= 0


def _as_json(value: object) -> bytes:
    return f"{json.dumps(value, indent=2)}\n".encode()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Let one process at a time work in the folder: two at once could give a number twice. Raises `ConfigError`."""
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        with hold_lock(out / ".lock", wait=True):
            for unfinished in out.rglob(".*.new"):  # left by a process that was killed
                unfinished.unlink()
            yield
    except OSError as e:
        raise ConfigError(f"{e.filename or out} could not be written ({e.strerror}); make room, or use --out") from e


def _put(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        _write(path, content)


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace a file whole, in folders that only their owner can open. Raises `OSError`."""
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    replace_file(path, content, mode=mode)
