"""`fedlora server`: a SuperLink with its door, a SuperExec, and a run, watched until the adapter is there.

    clients ──TLS──▶ gate (fleet paths alone) ──▶ SuperLink (loopback) ◀── SuperExec ──▶ ServerApp ──▶ run directory

Whatever dies is started again. A ServerApp that crashed is begun anew and goes on from the last finished round, as does
this command itself with the same directory.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from fedlora import config as configuration
from fedlora.config import CHANGEABLE_ON_RESUME, Config, absolute, over_defaults
from fedlora.deployment.processes import (
    Process,
    Tail,
    exclusive,
    flwr_home,
    free_port,
    is_alive,
    kill_marked,
    program,
    wait_for_port,
)
from fedlora.deployment.provision import check_private, read_clients
from fedlora.deployment.supervisor import Supervisor
from fedlora.errors import ConfigError, RoundFailed
from fedlora.server.deployment.handoff import FOLDER, PARENT, Handoff, RunOrder, Status
from fedlora.server.deployment.superlink import Control, ControlError
from fedlora.storage.files import write_durably

TRIES = 5  # ServerApps that may crash one after another without a finished round between them
COMES = 300.0  # seconds that a submitted run is given until its ServerApp says something
LOOKS = 20.0  # seconds between two looks at what the SuperLink says of the run


@dataclass(frozen=True)
class ServerOptions:
    """What `fedlora server` was asked for."""

    run: Path
    credentials: Path | None  # the server's folder of `fedlora provision`; none: no TLS, and whoever comes is let in
    host: str = "0.0.0.0"
    port: int = 8443
    superlink: str = ""  # host:port of one that runs elsewhere, behind a proxy of its own
    metrics: str = ""  # host:port

    @property
    def certificate(self) -> Path | None:
        return self.credentials / "ca.crt" if self.credentials else None


def serve(asked: ServerOptions, file: Path | None, given: Mapping[str, Any]) -> None:
    """Run it to its end. Raises the error of a run that failed."""
    handoff = Handoff(asked.run)
    names = read_clients(asked.credentials) if asked.credentials else {}
    with exclusive(handoff.flower):
        config = _settings(asked.run, file, given, len(names))
        if _is_done(asked.run, config):
            print(f"{asked.run}: all {config.rounds} rounds are done; the adapter is in {asked.run / 'adapter'}")
            return
        _end_what_is_left(handoff)
        if not asked.credentials:
            print(
                "INSECURE: no TLS, no keys: anyone who reaches this port can read, join and command. For trials only."
            )
        with _started(asked, handoff) as (control, supervisor):
            nodes = _registered(control, asked.credentials, names) if asked.credentials else None
            given = configuration.flatten(config)
            handoff.put_order(RunOrder(given, names, nodes, asked.metrics))
            _tell(asked, names, config)
            SubmittedRun(control, handoff, supervisor, config, Tail(handoff.screen)).run()


def _settings(run: Path, file: Path | None, given: Mapping[str, Any], registered: int) -> Config:
    """The run's settings: those it began with, if it has begun; else the file's under the command line's."""
    asked = {"clients": registered} | dict(given) if registered else dict(given)
    if not (run / "config.toml").is_file():
        config = absolute(over_defaults(configuration.read(file) if file else {}, asked))
        if not config.clients:
            raise ConfigError("how many clients are there to be? without keys, say --clients")
        return replace(config, engine="flower")
    begun = configuration.read(run / "config.toml")
    before = configuration.build(begun)
    config = absolute(configuration.build(begun, configuration.read(file) if file else {}, given))
    was, now = configuration.flatten(before), configuration.flatten(config)
    fixed = [k for k in now if now[k] != was.get(k) and k not in CHANGEABLE_ON_RESUME and not k.startswith("server.")]
    if fixed:
        key = fixed[0]
        raise ConfigError(f"{key} was {was.get(key)} when the run in {run} began; choose another --out for {now[key]}")
    return config


def _is_done(run: Path, config: Config) -> bool:
    """Of a run that stopped early, as of patience, too; more rounds may have been asked for since."""
    handoff = Handoff(run)
    status = handoff.status()
    return status is not None and status.state == "finished" and handoff.order().given["rounds"] >= config.rounds


def _end_what_is_left(handoff: Handoff) -> None:
    """ServerApps of an attempt before, or of a command that was killed: they would write into the same directory."""
    kill_marked("flwr-serverapp", FOLDER, str(handoff.run.absolute()))


def _registered(control: Control, folder: Path, names: Mapping[str, int]) -> dict[str, int]:
    """Each registered node's client, after these and no others are let in."""
    nodes = control.register({name: folder / "clients" / f"{name}.pub" for name in names})
    return {str(node): names[name] for name, node in nodes.items()}


@contextmanager
def _started(asked: ServerOptions, handoff: Handoff) -> Iterator[tuple[Control, Supervisor]]:
    """SuperLink, gate and SuperExec, ended at the end, whatever it is."""
    inner = asked.superlink or f"127.0.0.1:{free_port()}"
    control, secret = Control(inner, asked.certificate), _secret(asked, handoff)
    with _ending(handoff), Supervisor() as supervisor:
        if asked.superlink:
            control.wait(300)
        else:
            link, gate = _link(asked, handoff, inner, secret), _gate(asked, handoff, inner)
            supervisor.start(link)
            control.wait(180, lambda: link.alive)
            supervisor.start(gate)
            wait_for_port(asked.port, gate, "127.0.0.1" if asked.host == "0.0.0.0" else asked.host)
        control.stop_all()
        supervisor.start(_superexec(asked, handoff, inner, secret))
        yield control, supervisor


@contextmanager
def _ending(handoff: Handoff) -> Iterator[None]:
    try:
        yield
    finally:
        _end_what_is_left(handoff)


def _superexec(asked: ServerOptions, handoff: Handoff, address: str, secret: Path) -> Process:
    tls = ["--root-certificates", str(asked.certificate)] if asked.certificate else ["--insecure"]
    command = [program("flower-superexec"), "--runtime-api-address", address, *tls]
    command += ["--superexec-auth-secret-file", str(secret)]
    environment = {FOLDER: str(asked.run.absolute()), PARENT: str(os.getpid()), **flwr_home(handoff.flower)}
    return Process("SuperExec", command, handoff.flower / "superexec.log", environment)


def _link(asked: ServerOptions, handoff: Handoff, address: str, secret: Path) -> Process:
    host, _, port = address.rpartition(":")
    command = [program("flower-superlink"), "--host", host, "--port", port, "--isolation", "process"]
    command += [
        "--database",
        str((handoff.flower / "superlink.db").absolute()),
        "--disable-runtime-dependency-installation",
    ]
    command += ["--superexec-auth-secret-file", str(secret)]
    if folder := asked.credentials:
        command += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt")]
        command += ["--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"]
    else:
        command += ["--insecure"]
    return Process("SuperLink", command, handoff.flower / "superlink.log", flwr_home(handoff.flower))


def _gate(asked: ServerOptions, handoff: Handoff, inner: str) -> Process:
    command = [sys.executable, "-m", "fedlora.server.deployment.gate", "--host", asked.host, "--port", str(asked.port)]
    command += ["--superlink", inner, "--log", str(asked.run / "gate.log")]
    if folder := asked.credentials:
        command += ["--ca", str(folder / "ca.crt"), "--cert", str(folder / "server.crt")]
        command += ["--key", str(folder / "server.key")]
    else:
        command += ["--insecure"]
    return Process("gate", command, handoff.flower / "gate.out.log")


def _secret(asked: ServerOptions, handoff: Handoff) -> Path:
    """By which the SuperLink knows its SuperExec."""
    if asked.credentials:
        for name in ("server.key", "superexec.secret"):
            check_private(asked.credentials / name)
        return asked.credentials / "superexec.secret"
    path = handoff.flower / "superexec.secret"
    if not path.exists():
        write_durably(path, token_hex(32).encode(), mode=0o600)
    return path


def _tell(asked: ServerOptions, names: Mapping[str, int], config: Config) -> None:
    who = (
        f"{len(names)} clients' keys: {', '.join(list(names)[:8])}" if names else f"{config.clients} clients, unchecked"
    )
    where = f"behind {asked.superlink}" if asked.superlink else f"on {asked.host}:{asked.port}"
    print(f"run directory {asked.run}; serving {where} for {who}", flush=True)


@dataclass
class SubmittedRun:
    """A run from its submission to its end; a ServerApp that ends before the run does is begun anew."""

    control: Control
    handoff: Handoff
    supervisor: Supervisor
    config: Config
    screen: Tail
    _run: int = 0
    _tries: int = 0
    _rounds: int = -1
    _since: float = 0.0
    _looked: float = 0.0

    def run(self) -> None:
        """Until the run is finished. Raises `RoundFailed` with the reason of one that failed."""
        self._submit("")
        try:
            while not self._look():
                time.sleep(0.3)
        except BaseException as e:
            with suppress(ControlError):
                self.control.stop(self._run)
            if isinstance(e, KeyboardInterrupt):
                print("interrupted; the same command goes on after the last finished round", flush=True)
            raise
        finally:
            self.screen.show()

    def _look(self) -> bool:
        """Is it finished? Whatever is dead meanwhile is begun anew."""
        self.screen.show()
        self.supervisor.look()
        status = self.handoff.status() or Status("submitted")
        if status.state == "finished":
            return True
        if status.state == "failed":
            raise RoundFailed(status.why)
        why = self._lost(status)
        if why:
            self._submit(why)
        return False

    def _lost(self, status: Status) -> str:
        """Why the ServerApp must be begun anew; empty where it need not."""
        if status.state == "crashed":
            return status.why
        if status.state == "running" and not is_alive(status.pid, "flwr-serverapp"):
            return "its process was killed"
        if status.state == "submitted" and time.monotonic() - self._since > COMES:
            return f"nothing was heard of it in {COMES:.0f} s"
        if time.monotonic() - self._looked < LOOKS:
            return ""
        self._looked = time.monotonic()
        with suppress(ControlError):  # a SuperLink that is away for a moment
            if ended := self.control.ended(self._run):
                time.sleep(1)  # it may just have finished
                after = self.handoff.status() or status
                return "" if after.state in ("finished", "failed") else f"the SuperLink says {ended}"
        return ""

    def _submit(self, why: str) -> None:
        rounds = self.handoff.rounds()
        self._tries = self._tries + 1 if rounds == self._rounds else 1
        self._rounds = rounds
        if why:
            print(f"the ServerApp ended: {why}; it goes on after round {rounds}", flush=True)
            with suppress(ControlError):
                self.control.stop(self._run)
            _end_what_is_left(self.handoff)
            if self._tries > TRIES:
                raise RoundFailed(f"the ServerApp ended {TRIES} times without a finished round, last: {why}")
            time.sleep(2.0**self._tries)  # a machine that is too slow for it now may be less so later
        self.handoff.put_status(Status("submitted", attempt=self._tries))
        self._run = self._patiently()
        self._since = self._looked = time.monotonic()

    def _patiently(self) -> int:
        """Submit; a SuperLink that has just died is waited for."""
        end = time.monotonic() + 90
        while True:
            try:
                return self.control.submit({"deadline": float(self.config.server.deadline)})
            except ControlError:
                if time.monotonic() > end:
                    raise
                self.supervisor.look()
                time.sleep(1)
