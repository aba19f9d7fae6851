"""Keys and who has them: Flower takes them, nobody else reads them, and nothing made once is made twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedlora.deployment.provision import (
    Identity,
    listen_port,
    names_for,
    next_step,
    provision,
    read_client,
    read_clients,
    remove,
)
from fedlora.errors import ConfigError
from tests.support.files import open_to_others

HOSTS = ["fed.example.org", "10.0.0.5"]
DIES = """if True:
    import os, sys
    from pathlib import Path
    from fedlora.deployment.provision import provision
    seen = []
    def die(event, args):
        if event == "os.rename":
            seen.append(args)
            if len(seen) > n: os._exit(9)
    for n in range(40):
        child = os.fork()
        if not child:
            sys.addaudithook(die)
            provision(Path(sys.argv[1]) / str(n), ["a"], ["one", "two"])
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
    print(n)"""
WATCHED = """if True:
    import os, sys
    from pathlib import Path
    def watch(event, args):
        assert event != "os.chmod"
        if event == "os.rename" and str(args[1]).endswith((".key", ".secret")):
            assert os.stat(args[0]).st_mode & 0o777 == 0o600
            print(args[1])
    os.umask(0); sys.addaudithook(watch)
    from fedlora.deployment.provision import provision
    provision(Path(sys.argv[1]), ["a"], ["one"])"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    provision(tmp_path / "out", HOSTS, names_for(2))
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_everything_that_a_deployment_needs_is_there(out: Path) -> None:
    client = [f"clients/client-{i}/{name}" for i in (1, 2) for name in ("ca.crt", "client.json", "client.key")]
    public = ["ca.crt", "clients.json", "clients.map", "clients/client-1.pub", "clients/client-2.pub", "server.crt"]
    server = [f"server/{name}" for name in (*public, "server.key", "superexec.secret")]
    assert sorted(contents(out)) == sorted([*client, *server, "ca.crt", "ca.key", ".lock"])
    assert read_clients(out / "server") == {"client-1": 0, "client-2": 1}
    assert read_client(out / "clients" / "client-2") == Identity("client-2", 1, "fed.example.org")


def test_flower_takes_a_clients_keys_and_they_are_a_pair(out: Path) -> None:
    from flwr.supercore.primitives.asymmetric import sign_message, uses_nist_ec_curve, verify_signature

    private = load_ssh_private_key((out / "clients" / "client-1" / "client.key").read_bytes(), None)
    mine, other = (load_ssh_public_key((out / f"server/clients/client-{i}.pub").read_bytes()) for i in (1, 2))
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(mine, ec.EllipticCurvePublicKey) and isinstance(other, ec.EllipticCurvePublicKey)
    assert uses_nist_ec_curve(mine) and mine.curve.key_size == 384
    signature = sign_message(private, b"now")
    assert verify_signature(mine, b"now", signature) and not verify_signature(other, b"now", signature)


def test_flower_takes_the_secret(out: Path, tmp_path: Path) -> None:
    from flwr.supercore.auth import load_superexec_auth_secret

    provision(tmp_path / "other", HOSTS, [])
    secrets = [load_superexec_auth_secret(str(at / "server" / "superexec.secret")) for at in (out, tmp_path / "other")]
    assert secrets[0] != secrets[1] and [len(s or b"") for s in secrets] == [44, 44]


def test_a_secret_is_its_owners_alone_before_anything_is_in_it(tmp_path: Path) -> None:
    """With no umask, and at the moment of each rename; a chmod would come too late."""
    told = subprocess.run([sys.executable, "-c", WATCHED, tmp_path / "out"], check=True, capture_output=True, text=True)
    secrets = ["ca.key", "server/server.key", "server/superexec.secret", "clients/one/client.key"]
    assert told.stdout.split() == [str(tmp_path / "out" / secret) for secret in secrets]
    folders = [tmp_path / "out", *(p for p in (tmp_path / "out").rglob("*") if p.is_dir())]
    assert {p.stat().st_mode & 0o777 for p in folders} == {0o700}


def test_a_second_time_nothing_changes(out: Path) -> None:
    before = contents(out)
    assert provision(out, HOSTS, names_for(2)) == provision(out, [], []) == [f"{out} is complete; nothing was changed"]
    assert contents(out) == before


def test_a_new_client_changes_nothing_for_the_others(out: Path) -> None:
    before = contents(out)
    said = provision(out, [], ["site.b", *names_for(3)])
    after = contents(out)
    assert {name for name in before if after[name] != before[name]} == {"server/clients.json", "server/clients.map"}
    assert read_clients(out / "server") == {"client-1": 0, "client-2": 1, "site.b": 2, "client-3": 3}
    assert read_client(out / "clients" / "site.b").server == "fed.example.org"
    assert [line.split(":")[0] for line in said] == ["made site.b (client 2)", "made client-3 (client 3)"]


def test_a_client_whose_folder_was_handed_over_keeps_its_key(out: Path) -> None:
    (out / "clients" / "client-1").rename(out.parent / "elsewhere")
    before = contents(out)
    provision(out, [], names_for(2))
    assert contents(out) == before


def test_a_removed_client_is_out_and_its_number_with_it(out: Path) -> None:
    stolen = (out / "server" / "clients" / "client-2.pub").read_bytes()
    assert "removed client-2 (client 1)" in remove(out, "client-2")[0]
    assert read_clients(out / "server") == {"client-1": 0}
    assert not [p for p in out.rglob("*") if p.name in ("client-2.pub",) or p.match("client-2/client.key")]
    provision(out, [], ["client-3", "client-2"])
    assert read_clients(out / "server") == {"client-1": 0, "client-3": 2, "client-2": 3}
    assert read_client(out / "clients" / "client-2").id == 3
    assert (out / "server" / "clients" / "client-2.pub").read_bytes() != stolen


def test_a_removal_that_was_cut_short_counts_and_is_finished_later(out: Path) -> None:
    """Killed as soon as removed.json is there: the keys still lie about."""
    key = (out / "clients" / "client-2" / "client.key").read_bytes()
    (out / "server" / "removed.json").write_text('{"1": "client-2"}')
    assert read_clients(out / "server") == {"client-1": 0}
    provision(out, [], ["client-2"])
    assert read_clients(out / "server") == {"client-1": 0, "client-2": 2}
    assert (out / "clients" / "client-2" / "client.key").read_bytes() != key


def test_only_a_client_that_is_in_can_be_removed(out: Path) -> None:
    with pytest.raises(ConfigError, match=r'no client "client-9"; did you mean'):
        remove(out, "client-9")
    remove(out, "client-1")
    with pytest.raises(ConfigError, match='no client "client-1"'):
        remove(out, "client-1")


def test_killed_at_any_moment_the_next_run_completes_it(tmp_path: Path) -> None:
    """Every file comes by a rename: the process dies at the first of them, then at the second, and so on."""
    told = subprocess.run([sys.executable, "-c", DIES, tmp_path], check=True, capture_output=True, text=True)
    assert int(told.stdout) == 17  # one each, and clients.json twice
    for out in (tmp_path / str(n) for n in range(16)):
        provision(out, ["a"], ["one", "two"])
        assert read_clients(out / "server") == {"one": 0, "two": 1}
        for who, id in (("one", 0), ("two", 1)):
            assert read_client(out / "clients" / who) == Identity(who, id, "a")
            private = load_ssh_private_key((out / "clients" / who / "client.key").read_bytes(), None)
            assert private.public_key() == load_ssh_public_key((out / f"server/clients/{who}.pub").read_bytes())
        assert provision(out, ["a"], ["one", "two"]) == [f"{out} is complete; nothing was changed"]


def test_two_at_once_give_no_number_twice(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fedlora.deployment.provision import provision\n"
    code += "for i in range(8): provision(Path(sys.argv[1]), ['a'], [f'{sys.argv[2]}-{i}'])"
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path, who]) for who in ("x", "y")]
    assert [process.wait(60) for process in both] == [0, 0]
    assert sorted(read_clients(tmp_path / "server").values()) == list(range(16))


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "-x", "a/b", "a b", "a\n", "ä", "a" * 65, "../../x", "a\0"])
def test_a_name_that_is_not_one_is_refused_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a client"):
        provision(tmp_path / "out", HOSTS, ["good", name])
    assert not (tmp_path / "out").exists()


def test_names_that_differ_in_case_alone_are_refused(out: Path) -> None:
    with pytest.raises(ConfigError, match='"Client-1" and "client-1" are one file'):
        provision(out, [], ["Client-1"])


def test_the_first_time_a_host_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --host"):
        provision(tmp_path / "out", [], names_for(1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mode", "taken"), [(0o600, True), (0o440, True), (0o604, False), (0o602, False)])
def test_a_key_that_everyone_can_read_is_refused(out: Path, mode: int, taken: bool) -> None:
    folder = out / "clients" / "client-1"
    (folder / "client.key").chmod(mode)
    if taken:
        assert read_client(folder).id == 0
        return
    with pytest.raises(ConfigError, match=f"mode {mode:o}.*chmod 600 {folder / 'client.key'}"):
        read_client(folder)


@pytest.mark.parametrize("name", ["client.json", "client.key", "ca.crt"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\x00", b'{"name": "x"}', b"[]", b"-----BEGIN OPENSSH"])
def test_a_client_folder_with_a_damaged_file_is_refused(out: Path, name: str, content: bytes | None) -> None:
    path = out / "clients" / "client-1" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path} (is damaged|could not be read)"):
        read_client(path.parent)


@pytest.mark.parametrize("name", ["clients.json", "removed.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": "b"}', b'{"x": 0, "y": 0}', b'{"../x": 1}', b'{"x": true}'])
def test_a_damaged_list_of_clients_is_refused(out: Path, name: str, content: bytes) -> None:
    (out / "server" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is damaged"):
        read_clients(out / "server")


def test_a_lost_list_of_clients_is_not_begun_again(out: Path) -> None:
    (out / "server" / "clients.json").unlink()
    with pytest.raises(ConfigError, match=r"clients\.json is gone, and clients have their numbers from it"):
        provision(out, [], names_for(2))


def test_a_client_without_its_public_key_is_named(out: Path) -> None:
    (out / "server" / "clients" / "client-2.pub").unlink()
    with pytest.raises(ConfigError, match=r"client-2\.pub could not be read"):
        read_clients(out / "server")


def test_a_full_disk_says_so_and_leaves_what_was_there(out: Path) -> None:
    before = contents(out)
    code = (
        "import resource, signal, sys; from pathlib import Path; from fedlora.deployment.provision import provision\n"
    )
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
    code += "provision(Path(sys.argv[1]), ['new'], [])"
    told = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True, check=False)
    assert told.returncode and "ConfigError" in told.stderr and "could not be written" in told.stderr
    assert {name: was for name, was in contents(out).items() if not name.endswith(".new")} == before


def test_nothing_heavy_is_needed() -> None:
    code = "import sys, fedlora.deployment.provision; sys.exit(bool({'torch', 'flwr', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0


def test_nginx_has_the_keys_that_supernodes_send(out: Path) -> None:
    """By the header of Flower's own SuperNode; who is removed is in the map no more."""
    from base64 import b64encode

    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    def line(i: int) -> str:
        key = load_ssh_private_key((out / "clients" / f"client-{i}" / "client.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return f'"{b64encode(public_key_to_bytes(key.public_key())).decode()}" "client-{i}";'

    first, second = line(1), line(2)
    assert (out / "server" / "clients.map").read_text().splitlines()[1:] == [first, second]
    remove(out, "client-1")
    assert (out / "server" / "clients.map").read_text().splitlines()[1:] == [second]


def test_what_the_command_makes_its_user_alone_can_read(tmp_path: Path) -> None:
    """Public keys too: the folders of some disks and archives lose their modes."""
    words = ["provision", "--out", str(tmp_path / "out"), "--host", "localhost", "--clients", "2"]
    subprocess.run([sys.executable, "-m", "fedlora", *words], check=True, umask=0o022)
    assert open_to_others(tmp_path / "out") == []


def test_a_port_is_kept_for_clients_that_are_added_later_and_for_the_server(tmp_path: Path) -> None:
    provision(tmp_path, ["fed.example.org"], ["a"], port=9443)
    provision(tmp_path, [], ["b"])
    assert [read_client(tmp_path / "clients" / name).server for name in "ab"] == ["fed.example.org:9443"] * 2
    assert listen_port(tmp_path / "server") == 9443


def test_the_next_step_is_said_after_whatever_was_made(tmp_path: Path) -> None:
    first = provision(tmp_path, ["localhost"], ["a"])
    nothing = provision(tmp_path, [], ["a"])
    renewed = provision(tmp_path, [], [], renew=True)
    added = provision(tmp_path, [], ["b"])
    step = f"now copy {tmp_path / 'server'} to the server, and start fedlora server there, again if it is running"
    assert [next_step(tmp_path, done) for done in (first, nothing, renewed, added)] == [[step], [], [step], [step]]
