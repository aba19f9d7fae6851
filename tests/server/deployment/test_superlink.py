"""Who is let in by a real SuperLink over several starts of a run's server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlora.deployment.processes import Process, flwr_home, free_port, program, stop
from fedlora.deployment.provision import provision, read_clients, remove
from fedlora.server.deployment.superlink import Control, ControlError

STARTS = 180.0  # seconds that a SuperLink may take to start on a busy machine


@contextmanager
def superlink(folder: Path) -> Iterator[Control]:
    """A SuperLink as `fedlora server` starts it, on the database that an earlier one left."""
    server, port = folder / "keys" / "server", free_port()
    command = [program("flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    command += ["--database", str(folder / "superlink.db"), "--disable-runtime-dependency-installation"]
    command += ["--superexec-auth-secret-file", str(server / "superexec.secret"), "--enable-supernode-auth"]
    command += ["--ssl-ca-certfile", str(server / "ca.crt"), "--ssl-certfile", str(server / "server.crt")]
    command += ["--ssl-keyfile", str(server / "server.key")]
    process = Process("SuperLink", command, folder / "superlink.log", flwr_home(folder))
    control = Control(f"127.0.0.1:{port}", server / "ca.crt")
    process.start()
    try:
        control.wait(STARTS, lambda: process.alive)
        yield control
    finally:
        stop([process])


def registered(control: Control, folder: Path) -> dict[str, int]:
    """Let in the clients that the server's folder names now."""
    server = folder / "keys" / "server"
    return control.register({name: server / "clients" / f"{name}.pub" for name in read_clients(server)})


def test_clients_are_added_removed_and_added_again_over_several_starts(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    provision(keys, ["localhost"], ["a", "b"])
    removed = (keys / "server" / "clients" / "b.pub").read_bytes()
    with superlink(tmp_path) as control:
        first = registered(control, tmp_path)
        remove(keys, "b")
        assert registered(control, tmp_path) == {"a": first["a"]}
        assert registered(control, tmp_path) == {"a": first["a"]}
        control._unregister(first["b"])
    provision(keys, [], ["c", "b"], renew=True)
    with superlink(tmp_path) as control:
        second = registered(control, tmp_path)
        assert second.keys() == {"a", "b", "c"} and second["a"] == first["a"] and second["b"] != first["b"]
        assert registered(control, tmp_path) == second
        (keys / "server" / "clients" / "b.pub").write_bytes(removed)
        with pytest.raises(ControlError, match=r"b\.pub was removed from this run earlier"):
            registered(control, tmp_path)
