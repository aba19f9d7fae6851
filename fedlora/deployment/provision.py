"""Who is who in a deployment: a certificate authority, the server's certificate, and a pair of keys for every client.

    DIR/ca.key  ca.crt                       the key stays with whoever provisions
    DIR/server/ca.crt  server.crt  server.key  superexec.secret  clients.json  removed.json  clients/NAME.pub
    DIR/clients/NAME/ca.crt  client.key  client.json

`clients.json` gives each client its number; `removed.json` has the numbers of those who left, and no number comes
twice. A client's public key is written last, so that whatever a killed `provision` left undone, the next one does.
Private files are their owner's alone from the moment they exist.
"""

import json
import re
import secrets
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.errors import ConfigError, nearest
from fedlora.storage.files import hold_lock, replace_file

from . import certificates

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")  # none that a command line could take for an option
_PEM = serialization.Encoding.PEM
_MEND = "put back the one that fedlora provision made"
T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What a client is told about itself."""

    name: str
    id: int  # its number: Flower's partition-id
    server: str  # a name or an address of the server, without a port


def provision(out: Path, hosts: Sequence[str], names: Sequence[str], days: int = 825, renew: bool = False) -> list[str]:
    """Make what is missing, keep what is there; returns what was done, a line each. Raises `ConfigError`.

    The server's certificate holds for `days`. It is made anew, for the same key, if a host is new, if it ends within
    30 days, if its key or the authority is new, or with `renew`; without hosts it is for those it was for. To drop a
    host delete server.crt first; after a theft, server.key; for a new authority ca.key, ca.crt and server/ca.crt.
    """
    hosts, names = [certificates.host(host) for host in hosts], list(dict.fromkeys(names))
    if wrong := [name for name in names if not _NAME.fullmatch(name)]:
        raise ConfigError(
            f'"{wrong[0]}" cannot name a client: give 1 to 64 of a-z, A-Z, 0-9, "_", and inside "." and "-"'
        )
    if not 1 <= days <= 3650:
        raise ConfigError(f"the server's certificate cannot hold for {days} days; give it 1 to 3650")
    if not hosts and not (out / "server" / "server.crt").exists():
        raise ConfigError(f"{out} has no server's certificate yet: give --host, the name or address that clients dial")
    with _alone(out):
        said = [*_authority(out), *_server(out, hosts, days, renew), *_secret(out / "server" / "superexec.secret")]
        dial = (hosts or certificates.hosts_of(_certificate(out / "server" / "server.crt")))[0]
        for name, id in _enrol(out, names).items():
            said += _client(out, Identity(name, id, dial))
    return said or [f"{out} is complete; nothing was changed"]


def remove(out: Path, name: str) -> list[str]:
    """Revoke a client: its keys are deleted here and its number is never given again. Raises `ConfigError`.

    A SuperLink that runs knows the client until it is told: copy the server's folder to its place and start
    `fedlora server` again, which unregisters every key that `read_clients` no longer names.
    """
    server = out / "server"
    clients, gone = roster(server)
    if name not in clients or str(clients[name]) in gone:
        raise ConfigError(f'{server / "clients.json"} has no client "{name}"; {nearest(name, clients)}')
    with _alone(out):
        _write(server / "removed.json", _as_json(roster(server)[1] | {str(clients[name]): name}))  # now it is out
        _enrol(out, [])
    return [f"removed {name} (client {clients[name]}): copy {server} to the server, and start fedlora server again"]


def names_for(n: int) -> list[str]:
    """Names for clients that have none of their own.

    >>> names_for(2)
    ['client-1', 'client-2']
    """
    return [f"client-{i}" for i in range(1, n + 1)]


def read_clients(folder: Path) -> dict[str, int]:
    """The clients that are in, and their numbers, from the server's folder. Raises `ConfigError` for a damaged one.

    The public key of each is clients/NAME.pub; other files there belong to nobody.
    """
    clients, gone = roster(folder)
    clients = {name: id for name, id in clients.items() if str(id) not in gone}
    for name in clients:
        public_key(folder / "clients" / f"{name}.pub")
    return clients


def read_client(folder: Path) -> Identity:
    """Whose folder this is. Raises `ConfigError` for a file that is missing or damaged, and a key that all can read."""
    path = folder / "client.json"
    told = _read(path, json.loads)
    try:
        who = Identity(**told)
        if not (_NAME.fullmatch(who.name) and _is_number(who.id) and certificates.host(who.server)):
            raise TypeError("its number is not one")
    except (TypeError, AttributeError, ConfigError) as e:
        raise ConfigError(f"{path} is damaged ({e}); take it again from what fedlora provision made") from e
    _certificate(folder / "ca.crt")
    check_private(folder / "client.key")
    _key(folder / "client.key")
    return who


def check_private(path: Path) -> None:
    """Raises `ConfigError` for a secret that everyone on this machine can read.

    Its group may: in containers a secret often is root's, readable by the group that the program runs with.
    """
    if (mode := path.stat().st_mode if path.exists() else 0) & 0o007:
        raise ConfigError(f"{path} is open to everyone on this machine (mode {mode & 0o777:o}): chmod 600 {path}")


def public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A client's public key, from a file as OpenSSH writes it. Raises `ConfigError`."""
    key = _read(path, serialization.load_ssh_public_key)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path} is not an ECDSA key, and Flower takes no other; {_MEND}")
    return key


def _authority(out: Path) -> list[str]:
    path, copy = out / "ca.crt", out / "server" / "ca.crt"
    if path.exists():
        return []
    if copy.exists():
        raise ConfigError(f"{path} is gone, and clients trust it: copy {copy} there")
    _write(path, certificates.authority(_key(out / "ca.key", make=True)).public_bytes(_PEM))
    return [f"made a certificate authority, {path}; keep {out / 'ca.key'} away from the server and the clients"]


def _server(out: Path, hosts: Sequence[str], days: int, renew: bool) -> list[str]:
    """The server's key and certificate, if they are missing or will not do."""
    folder, issuer = out / "server", _certificate(out / "ca.crt")
    _put(folder / "ca.crt", (out / "ca.crt").read_bytes())
    path, key = folder / "server.crt", _key(folder / "server.key", make=True).public_key()
    old = _certificate(path) if path.exists() else None
    hosts = list(dict.fromkeys([*(certificates.hosts_of(old) if old else ()), *hosts, *certificates.ALWAYS]))
    why = certificates.reissue_reason(old, issuer, key, hosts) if old else "as there was none"
    if not (why or renew):
        return []
    signer = _key(out / "ca.key")
    if signer.public_key() != issuer.public_key():
        raise ConfigError(f"{out / 'ca.key'} is not the key of {out / 'ca.crt'}; {_MEND}")
    if certificates.ends_soon(issuer):
        raise ConfigError(f"{out / 'ca.crt'} ends on {issuer.not_valid_after_utc.date()}; provision a new folder")
    made = certificates.server(hosts, key, issuer, signer, days)
    _write(path, made.public_bytes(_PEM))
    until = made.not_valid_after_utc.date()
    return [f"made the server's certificate, {why or 'as was asked'}: for {', '.join(hosts)}, until {until}"]


def _secret(path: Path) -> list[str]:
    """What SuperLink and SuperExec know each other by. Flower takes every byte of the file, so no line ends it."""
    if path.exists():
        return []
    _write(path, b64encode(secrets.token_bytes(32)), mode=0o600)
    return [f"made the SuperExec secret, {path}"]


def roster(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """clients.json, and of removed.json the numbers of those who left, as JSON has them, with their names."""
    path, left = folder / "clients.json", folder / "removed.json"
    clients, gone = _read(path, json.loads), _read(left, json.loads) if left.exists() else {}
    if not isinstance(clients, dict) or not all(_NAME.fullmatch(n) and _is_number(i) for n, i in clients.items()):
        raise ConfigError(f"{path} is damaged: it is not names with their numbers; {_MEND}")
    if len(set(clients.values())) < len(clients):
        raise ConfigError(f"{path} is damaged: two clients have the same number; {_MEND}")
    if not isinstance(gone, dict) or not all(id.isdecimal() for id in gone):
        raise ConfigError(f"{left} is damaged: it is not numbers with their names; {_MEND}")
    return clients, gone


def _enrol(out: Path, names: Sequence[str]) -> dict[str, int]:
    """All who are in, the new ones with numbers that nobody had; the keys of those who left are deleted."""
    server = out / "server"
    path = server / "clients.json"
    if not path.exists():
        if any(server.glob("clients/*.pub")) or (server / "removed.json").exists():
            raise ConfigError(f"{path} is gone, and clients have their numbers from it; {_MEND}")
        _write(path, _as_json({}))
    clients, gone = roster(server)
    for name in [name for name, id in clients.items() if str(id) in gone]:
        (server / "clients" / f"{name}.pub").unlink(missing_ok=True)
        (out / "clients" / name / "client.key").unlink(missing_ok=True)
        del clients[name]
    for name in names:
        twin = next((known for known in clients if known.lower() == name.lower()), name)
        if twin != name:
            raise ConfigError(f'"{name}" and "{twin}" are one file on some disks; give the client another name')
        clients.setdefault(name, max([*clients.values(), *map(int, gone)], default=-1) + 1)
    _put(path, _as_json(clients))
    return clients


def _client(out: Path, who: Identity) -> list[str]:
    """A client's own folder, unless it was made before; then it may have gone to the client's machine."""
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


def _key(path: Path, make: bool = False) -> ec.EllipticCurvePrivateKey:
    """A private key: a client's in OpenSSH's form, which Flower wants, others in PKCS 8, which TLS wants."""
    ssh = path.name == "client.key"
    if make and not path.exists():
        form = serialization.PrivateFormat.OpenSSH if ssh else serialization.PrivateFormat.PKCS8
        fresh = ec.generate_private_key(ec.SECP384R1()).private_bytes(_PEM, form, serialization.NoEncryption())
        _write(path, fresh, mode=0o600)
    load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
    key = _read(path, lambda content: load(content, None))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an ECDSA key; {_MEND}")
    return key


def _certificate(path: Path) -> x509.Certificate:
    return _read(path, x509.load_pem_x509_certificate)


def _read(path: Path, load: Callable[[bytes], T]) -> T:
    """What a file holds. Raises `ConfigError` if it is not there or no loader can make sense of it."""
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
            for unfinished in out.rglob(".*.new"):  # of a process that was killed
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
