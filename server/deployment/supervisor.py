"""`fedlora server`: a SuperLink behind its gate, a SuperExec, and a run, watched until the adapter is there.

    clients ──TLS──▶ gate (fleet paths alone) ──▶ SuperLink (loopback) ◀── SuperExec ──▶ ServerApp ──▶ run directory

A process that ends is started again. A ServerApp that ends before its run does is begun anew and goes on from the last
finished round; so does this command, when it is given the same directory again.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from secrets import token_hex
from typing import Any

from fedlora import config as configuration
from fedlora.config import Config, absolute, over_defaults
from fedlora.deployment.addresses import host_of, join_address
from fedlora.deployment.processes import (
    Process,
    Tail,
    flwr_home,
    free_port,
    is_alive,
    kill_marked,
    listen,
    program,
    wait_for_port,
)
from fedlora.deployment.provision import check_private, read_clients
from fedlora.deployment.supervisor import Restart, Supervisor, restart_later
from fedlora.environment import no_proxy
from fedlora.errors import ConfigError, RoundFailed
from fedlora.run.refused import empty_if_refused
from fedlora.run.trackers import check_trackers
from fedlora.server.deployment.handoff import FOLDER, PARENT, Handoff, RunOrder, Status
from fedlora.server.deployment.refused_keys import RefusedKeys
from fedlora.server.deployment.superlink import Control, ControlError
from fedlora.storage.files import only_writer, write_durably

GATE = "gate"  # the name of its process
TRIES = 5  # ServerApps that may end one after another without a finished round between them
SILENCE = 300.0  # seconds that a submitted run is given until its ServerApp writes its first status
LOOKS = 20.0  # seconds between two questions to the SuperLink about the run
FEW = 10  # clients that are all asked in every round, unless the settings say otherwise
ENDED = {"failed": RoundFailed, "refused": ConfigError}  # by the state: what the command raises
SUBMITS = 90.0  # seconds that a SuperLink which is down is given to take the run


@dataclass(frozen=True)
class ServerOptions:
    """What the command line of `fedlora server` asks for, besides the run's settings."""

    run: Path
    credentials: Path | None  # the server's folder of `fedlora provision`; none: no TLS, and whoever comes is let in
    host: str = "0.0.0.0"
    port: int = 8443
    superlink: str = ""  # HOST:PORT of one that runs elsewhere, behind a proxy of its own; empty: start one here
    metrics: str = ""  # HOST:PORT for Prometheus' metrics; empty: none

    @property
    def certificate(self) -> Path | None:
        """The authority's certificate; none without TLS."""
        return self.credentials / "ca.crt" if self.credentials else None


def serve(options: ServerOptions, file: Path | None, given: Mapping[str, Any]) -> None:
    """Run federated training to its end, by the settings in `file` and, before those, in `given`.

    Raises `RoundFailed` for a run that failed, `ConfigError` for one that was refused, which leaves nothing where no
    client has worked yet.
    """
    handoff = Handoff(options.run)
    names = read_clients(options.credentials) if options.credentials else {}
    os.environ.update(no_proxy(host_of(options.superlink)) | flwr_home(handoff.flower))
    with only_writer(options.run), empty_if_refused(options.run):
        config = _settings(options.run, file, given, len(names))
        check_trackers(config.report_to)
        if _is_done(handoff, config):
            print(f"{options.run}: all {config.rounds} rounds are done; the adapter is in {options.run / 'adapter'}")
            return
        if not options.superlink:
            listen(options.host, options.port).close()  # one that is taken is said before anything is started
        _kill_server_apps(handoff)
        if not options.credentials:
            print(
                "INSECURE: no TLS, no keys: anyone who reaches this port can read, join and command. For trials only."
            )
        with _started(options, handoff) as (control, supervisor):
            nodes = _register(control, options.credentials, names) if options.credentials else None
            handoff.put_order(RunOrder(configuration.flatten(config), names, nodes, options.metrics))
            _print_start(options, names, config)
            refused = RefusedKeys(options.credentials) if options.credentials else None
            SubmittedRun(control, handoff, supervisor, config, refused).watch()


def _settings(run: Path, file: Path | None, given: Mapping[str, Any], registered: int) -> Config:
    """The run's settings: those that it began with, if it has begun; else the file's under the command line's."""
    from_file = configuration.read(file) if file else {}
    if (run / "config.toml").exists() or (run / "checkpoint").exists():
        return _resumed_settings(run, from_file, given)
    clients = {"clients": registered} if registered else {}
    config = absolute(over_defaults(from_file, clients | dict(given)))
    if not config.clients:
        raise ConfigError("how many clients are there to be? without keys, say --clients")
    return replace(config, engine="flower", cohort=config.cohort or _cohort(config.clients))


def _cohort(clients: int) -> int:
    """How many clients are asked in a round where nobody says it: all, if they are few; 0, a fifth of them, if not."""
    return clients if clients <= FEW else 0


def _resumed_settings(run: Path, from_file: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """The settings that the run began with, and those that may change. Raises `ConfigError` for any other change."""
    from fedlora.run.directory import RunDirectory  # slow: it loads torch, which this process can do without

    begun = RunDirectory(run).config()
    before = configuration.flatten(configuration.build(begun))
    config = absolute(configuration.build(begun, from_file, given))
    for key, value in configuration.flatten(config).items():
        if value != before.get(key) and not configuration.may_change(key):
            raise ConfigError(
                f"{key} was {before.get(key)} when the run in {run} began; choose another --out for {value}"
            )
    return config


def _is_done(handoff: Handoff, config: Config) -> bool:
    """Has the run finished all rounds that are asked for now? A run that stopped early, out of patience, has too."""
    status = handoff.status()
    return status is not None and status.state == "finished" and handoff.ordered_rounds() >= config.rounds


def _kill_server_apps(handoff: Handoff) -> None:
    """End the ServerApps that an earlier attempt or a killed command left: they write into the same directory."""
    kill_marked("flwr-serverapp", FOLDER, str(handoff.run.absolute()))


def _register(control: Control, folder: Path, names: Mapping[str, int]) -> dict[str, int]:
    """Let in these clients and no others; return the client's number for each node."""
    nodes = control.register({name: folder / "clients" / f"{name}.pub" for name in names})
    return {str(node): names[name] for name, node in nodes.items()}


@contextmanager
def _started(options: ServerOptions, handoff: Handoff) -> Iterator[tuple[Control, Supervisor]]:
    """Start SuperLink, gate and SuperExec; at the end of the `with`, end them and the ServerApp."""
    address = options.superlink or f"127.0.0.1:{free_port()}"
    control, secret = Control(address, options.certificate), _secret(options, handoff)
    try:
        with Supervisor(_restart) as supervisor:
            if options.superlink:
                control.wait(300)
            else:
                _start_superlink(options, handoff, control, supervisor, secret)
            control.stop_all()
            supervisor.start(_superexec(options, handoff, address, secret))
            yield control, supervisor
    finally:
        _kill_server_apps(handoff)


def _start_superlink(
    options: ServerOptions, handoff: Handoff, control: Control, supervisor: Supervisor, secret: Path
) -> None:
    """Start a SuperLink, and the gate before it, and wait until both listen."""
    link, gate = _superlink(options, handoff, control.address, secret), _gate(options, handoff, control.address)
    supervisor.start(link)
    control.wait(180, lambda: link.alive)
    supervisor.start(gate)
    wait_for_port(options.port, gate)


def _restart(process: Process) -> Restart:
    """Why a process ended, and when it is started again.

    Raises `ConfigError` for a gate that says what is wrong: its port is taken, say, and starting it again is of no use.
    """
    last = process.log_tail(1)
    if process.name == GATE and last.startswith("error: "):
        raise ConfigError(last.removeprefix("error: "))
    return restart_later(process)


def _superexec(options: ServerOptions, handoff: Handoff, address: str, secret: Path) -> Process:
    tls = ["--root-certificates", str(options.certificate)] if options.certificate else ["--insecure"]
    command = [program("flower-superexec"), "--runtime-api-address", address, *tls]
    command += ["--superexec-auth-secret-file", str(secret)]
    environment = {FOLDER: str(options.run.absolute()), PARENT: str(os.getpid())}
    return Process("SuperExec", command, handoff.flower / "superexec.log", environment)


def _superlink(options: ServerOptions, handoff: Handoff, address: str, secret: Path) -> Process:
    host, _, port = address.rpartition(":")
    database = (handoff.flower / "superlink.db").absolute()
    command = [program("flower-superlink"), "--host", host, "--port", port, "--isolation", "process"]
    command += ["--database", str(database), "--disable-runtime-dependency-installation"]
    command += ["--superexec-auth-secret-file", str(secret)]
    if folder := options.credentials:
        command += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt")]
        command += ["--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"]
    else:
        command += ["--insecure"]
    return Process("SuperLink", command, handoff.flower / "superlink.log")


def _gate(options: ServerOptions, handoff: Handoff, superlink: str) -> Process:
    command = [sys.executable, "-m", "fedlora.server.deployment.gate"]
    command += ["--host", options.host, "--port", str(options.port)]
    command += ["--superlink", superlink, "--log", str(options.run / "gate.log")]
    if folder := options.credentials:
        command += ["--ca", str(folder / "ca.crt"), "--cert", str(folder / "server.crt")]
        command += ["--key", str(folder / "server.key"), "--clients", str(folder)]
    else:
        command += ["--insecure"]
    return Process(GATE, command, handoff.flower / "gate.out.log")


def _secret(options: ServerOptions, handoff: Handoff) -> Path:
    """The file with the secret by which the SuperLink knows its SuperExec; without credentials, one made here."""
    if options.credentials:
        for name in ("server.key", "superexec.secret"):
            check_private(options.credentials / name)
        return options.credentials / "superexec.secret"
    path = handoff.flower / "superexec.secret"
    if not path.exists():
        write_durably(path, token_hex(32).encode(), mode=0o600)
    return path


def _print_start(options: ServerOptions, names: Mapping[str, int], config: Config) -> None:
    """Print where the server is and which clients it serves."""
    clients = f"{config.clients} clients, unchecked"
    if names:
        clients = f"{len(names)} clients' keys: {', '.join(list(names)[:8])}"
    place = f"behind {options.superlink}" if options.superlink else f"on {join_address(options.host, options.port)}"
    print(f"run directory {options.run}; serving {place} for {clients}", flush=True)


class SubmittedRun:
    """A run from its submission to its end; a ServerApp that ends before its run does is begun anew."""

    def __init__(
        self,
        control: Control,
        handoff: Handoff,
        supervisor: Supervisor,
        config: Config,
        refused: RefusedKeys | None = None,
    ) -> None:
        """`refused` says which clients the gate, if it is one that is started here, does not let in."""
        self._control, self._handoff, self._supervisor = control, handoff, supervisor
        self._refused, self._gate_log = refused, Tail(handoff.run / "gate.log")
        self._deadline = config.server.deadline if config.server.deadline < inf else 0.0  # 0: none for a client's work
        self._screen = Tail(handoff.screen)
        self._id = 0  # Flower's, of the run that was submitted last
        self._rounds = -1  # finished when that run was submitted
        self._tries = 0  # submissions since the last finished round
        self._submitted = self._asked = 0.0  # when it was submitted, and when the SuperLink was asked last

    def watch(self) -> None:
        """Submit the run and return when it has finished. Raises `RoundFailed` or `ConfigError` as it ended."""
        self._submit()
        try:
            while not self._is_finished():
                time.sleep(0.3)
        except BaseException as e:
            self._stop()
            if isinstance(e, KeyboardInterrupt):
                print("interrupted; the same command goes on after the last finished round", flush=True)
            raise
        finally:
            self._screen.show()

    def _is_finished(self) -> bool:
        """Show what is new, start again whatever ended before its time, and say whether the run has finished."""
        self._screen.show()
        if self._refused:
            for words in self._refused.news(self._gate_log.new()):
                print(words, flush=True)
        self._supervisor.look()
        status = self._handoff.status() or Status("submitted")
        if status.state == "finished":
            return True
        if status.state in ENDED:
            raise ENDED[status.state](status.why)
        if why := self._why_lost(status) or self._why_ended(status):
            self._begin_anew(why)
        return False

    def _why_lost(self, status: Status) -> str:
        """Why the ServerApp must be begun anew, as far as its own status and its process tell; empty if it need not."""
        if status.state == "crashed":
            return status.why
        if status.state == "running" and not is_alive(status.pid, "flwr-serverapp"):
            return "its process was killed"
        if status.state == "submitted" and time.monotonic() - self._submitted > SILENCE:
            return f"nothing was heard of it in {SILENCE:.0f} s"
        return ""

    def _why_ended(self, status: Status) -> str:
        """The same as far as the SuperLink tells, which is asked now and then."""
        if time.monotonic() - self._asked < LOOKS:
            return ""
        self._asked = time.monotonic()
        ended = None
        with suppress(ControlError):  # a SuperLink that is away for a moment
            ended = self._control.ended(self._id)
        if not ended:
            return ""
        time.sleep(1)  # the ServerApp may just have finished
        after = self._handoff.status() or status
        return "" if after.state in ("finished", *ENDED) else f"the SuperLink says {ended}"

    def _begin_anew(self, why: str) -> None:
        """End what is left of the ServerApp and submit the run again. Raises `RoundFailed` after too many tries."""
        print(f"the ServerApp ended: {why}; it goes on after round {self._handoff.rounds()}", flush=True)
        self._stop()
        _kill_server_apps(self._handoff)
        self._submit(why)

    def _submit(self, why: str = "") -> None:
        """Submit the run; `why` the last ServerApp ended, if there was one."""
        rounds = self._handoff.rounds()
        self._tries = self._tries + 1 if rounds == self._rounds else 1
        self._rounds = rounds
        if self._tries > TRIES:
            raise RoundFailed(f"the ServerApp ended {TRIES} times without a finished round, last: {why}")
        if why:
            time.sleep(2.0**self._tries)  # a machine that is too slow for it now may be less so later
        self._handoff.put_status(Status("submitted", attempt=self._tries))
        self._id = self._submit_patiently()
        self._submitted = self._asked = time.monotonic()

    def _submit_patiently(self) -> int:
        """Submit the run and return its id; wait for a SuperLink that has just ended and is started again."""
        end = time.monotonic() + SUBMITS
        while True:
            try:
                return self._control.submit({"deadline": self._deadline})
            except ControlError:
                if time.monotonic() > end:
                    raise
                self._supervisor.look()
                time.sleep(1)

    def _stop(self) -> None:
        with suppress(ControlError):
            self._control.stop(self._id)
