"""A deployed run on loopback, with TLS and keys: the adapter of a simulation, whatever is killed; and no strangers."""

import json
import os
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPSConnection
from pathlib import Path
from random import Random

import httpx
import pytest
import torch
from safetensors.torch import load_file

from fedlora.deployment.processes import free_port, program
from fedlora.environment import QUIET
from tests.cli.test_simulate import fedlora
from tests.support.federation import SLOW, Federation, kill_all, named
from tests.support.files import open_to_others
from tests.support.models import make

CONFIG = """
clients = 3
cohort = 3
rounds = 2
strategy = "fedsa_lora"
threads = 1
[model]
path = "{model}"
max_length = 16
head = "shared"
[lora]
rank = 3
dropout = 0.1
[data]
eval = "{eval}"
holdout = 0.2
split = "sample"
[train]
steps = {steps}
batch_size = 4
lr = 0.01
[server]
quorum = 0.5
wait = 600
eval_every = 0
"""
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # Flower starts its own programs by name
PROTOBUF = {"Content-Type": "application/protobuf"}  # what the SuperLink reads at all
ATTACKS = {
    "start a run": "/v1/control/start-run",
    "list clients": "/v1/control/list-nodes",
    "register a client": "/v1/control/register-node",
    "take a task": "/v1/runtime/acquire-task",
    "take a task by a detour": "/v1/fleet/../runtime/acquire-task",
    "take a task by an encoded detour": "/v1/fleet/%2e%2e/runtime/acquire-task",
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Data, keys and clients; the clients stay for all that follows."""
    folder = tmp_path_factory.mktemp("federation")
    make("llama", folder / "model")
    draw = Random(0)
    for name in ("client_1", "client_2", "client_3", "eval"):
        rows = [{"text": " ".join(f"w{draw.randrange(60)}" for _ in range(draw.randint(4, 12)))} for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.format(model=folder / "model", eval=folder / "eval.jsonl", steps=60)
    (folder / "run.toml").write_text(text)
    made = Federation(folder, folder / "run.toml", folder / "model")
    yield made
    made.end()


@pytest.fixture(scope="module")
def simulated(federation: Federation) -> Path:
    """The same config as a simulation."""
    folder = federation.folder
    words = ["simulate", "--config", federation.config, "--data", folder / "client_*.jsonl", "--engine", "serial"]
    done = fedlora(*map(str, words), "--out", str(folder / "simulated"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "simulated"


@pytest.fixture(scope="module")
def resumed(federation: Federation) -> Path:
    """A run whose server, all of it, is killed in the middle of its second round, and started again."""
    for n in (1, 2, 3):
        federation.client(n)
    first = federation.server("run")
    federation.until(lambda: federation.is_training(1, "run", 2))
    kill_all(first)
    again = federation.server("run")
    assert again.wait(SLOW) == 0, federation.everything()
    return federation.folder / "run"


def test_a_run_that_is_refused_leaves_nothing(federation: Federation) -> None:
    server = federation.server("refused", "--model", str(federation.folder / "nowhere"))
    assert server.wait(SLOW) == 1
    federation.running.remove(server)  # tests that follow count the others
    assert "there is no such folder" in federation.said("refused")
    assert not (federation.folder / "refused").exists()


def test_a_run_whose_server_was_killed_ends_with_the_simulations_adapter(resumed: Path, simulated: Path) -> None:
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (resumed, simulated))
    assert ours.keys() == theirs.keys()
    for name, matrix in theirs.items():
        torch.testing.assert_close(ours[name], matrix, rtol=0, atol=1e-6)


def test_rounds_and_clients_own_models_are_the_simulations(resumed: Path, simulated: Path) -> None:
    """FedSA-LoRA's B and head never leave a client: its own model shows that they were kept over the crash."""
    ours, theirs = ([json.loads(line) for line in (f / "rounds.jsonl").open()] for f in (resumed, simulated))
    for x, y in zip(ours, theirs, strict=True):
        assert (x["round"], x["clients"], x["answered"]) == (y["round"], y["clients"], y["answered"])
        assert x["train_loss"] == pytest.approx(y["train_loss"], abs=1e-6)
        assert x["eval_clients"] == pytest.approx(y["eval_clients"], abs=1e-5)
        assert x["each"].keys() == y["each"].keys()
        for client, own in x["each"].items():
            assert own == pytest.approx(y["each"][client], rel=1e-3)
    assert ours[-1]["eval_clients"]["clients"] == 3


def test_both_sides_log_what_left_and_entered_by_name(resumed: Path, federation: Federation) -> None:
    received = [json.loads(line) for line in (resumed / "audit.jsonl").open()]
    updates = [e for e in received if e["event"] == "received" and e["what"] == "train"]
    assert updates and all(t.startswith("A ") for e in updates for t in e["tensors"]) and updates[0]["bytes"] > 0
    left = [e for e in federation.events(1) if e["event"] == "left" and e["what"] == "update"]
    assert len(left) >= 2 and left[0]["tensors"] == updates[0]["tensors"]


def test_what_server_and_clients_write_their_user_alone_can_read(resumed: Path, federation: Federation) -> None:
    """SuperLink's database and the logs of Flower's programs too."""
    assert (resumed / "flower" / "superlink.db").exists() and (federation.state(1) / "logs" / "supernode.log").exists()
    for folder in (resumed, *(federation.state(n) for n in (1, 2, 3))):
        assert open_to_others(folder) == []


def test_no_job_is_done_twice(resumed: Path, federation: Federation) -> None:
    """The round that the crash cut off was asked for again; its answer lay on the disk, or it had not been done."""
    trained = (federation.state(1) / "logs" / "worker.log").read_text().count("trained round")
    assert trained == 2


def test_what_it_delivered_is_evaluated_and_exported_where_it_lies(resumed: Path) -> None:
    told = fedlora("evaluate", str(resumed), "--json", cwd=resumed)
    assert told.returncode == 0, told.stderr
    last = json.loads((resumed / "rounds.jsonl").read_text().splitlines()[-1])
    assert json.loads(told.stdout)["after"]["loss"] == pytest.approx(last["eval"]["loss"])
    done = fedlora("export", str(resumed), cwd=resumed)
    assert done.returncode == 0 and (resumed / "export-adapter" / "adapter_config.json").exists(), done.stderr


def test_a_killed_client_is_missed_named_and_back(federation: Federation, resumed: Path) -> None:
    client, server = federation.running[1], federation.server("killed", "--server.deadline", "30", "--rounds", "500")
    federation.until(lambda: federation.is_training(2, "killed", 2))
    kill_all(client)
    federation.client(2)
    federation.until(lambda: [r for r in federation.records("killed")[2:] if r["answered"] == 3])
    server.send_signal(signal.SIGINT)
    assert server.wait(SLOW) == 130, federation.everything()
    missed = federation.records("killed")[1]
    assert missed["answered"] == 2 and list(missed["failed"]) == ["1"]


def heartbeats(run: Path, name: str) -> tuple[float, str]:
    """Until when the SuperLink holds a client's node to be there, and when that node was started."""
    with closing(sqlite3.connect(run / "flower" / "superlink.db")) as database:
        found: tuple[float, str] = database.execute(
            "select online_until, last_activated_at from node where name = ?", (name,)
        ).fetchone()
    return found


@pytest.fixture(scope="module")
def serving(federation: Federation, resumed: Path) -> "subprocess.Popen[bytes]":
    """A server in the middle of a run without a deadline; what ends the federation ends it."""
    server = federation.server("attacked", "--rounds", "500")
    federation.until(lambda: federation.records("attacked"))
    return server


def test_a_client_that_was_killed_and_is_back_before_it_was_missed_holds_no_round(
    federation: Federation, serving: "subprocess.Popen[bytes]"
) -> None:
    """The ServerApp is stopped while the last heartbeat runs out, so that it sees the node before and after it."""
    client, run = federation.running[2], federation.folder / "attacked"
    federation.until(lambda: federation.is_training(3, "attacked", len(federation.records("attacked")) + 1))
    cut_off = len(federation.records("attacked")) + 1
    kill_all(client)
    federation.client(3)
    _, started = heartbeats(run, "client-3")
    federation.until(lambda: heartbeats(run, "client-3")[0] - time.time() < 2)
    apps = named(serving.pid, "flwr-serverapp")
    assert apps
    for pid in apps:
        os.kill(pid, signal.SIGSTOP)
    try:
        federation.until(lambda: heartbeats(run, "client-3")[1] != started)
    finally:
        for pid in apps:
            os.kill(pid, signal.SIGCONT)
    federation.until(lambda: len(federation.records("attacked")) >= cut_off)
    assert {record["answered"] for record in federation.records("attacked")} == {3}


@pytest.mark.parametrize("what", ATTACKS)
def test_whoever_has_the_authoritys_certificate_alone_cannot(
    what: str, federation: Federation, serving: object
) -> None:
    """The gateway does not know these paths; they are sent raw, as a client library would mend them."""
    trust = ssl.create_default_context(cafile=str(federation.keys / "server" / "ca.crt"))
    connection = HTTPSConnection("localhost", federation.port, context=trust, timeout=30)
    connection.request("POST", ATTACKS[what], b"")
    answer = connection.getresponse()
    assert answer.status in (400, 404) and not answer.read()


@pytest.mark.parametrize("path", ["activate-node", "pull-messages", "send-node-heartbeat", "get-run", "pull-object"])
def test_nor_speak_for_a_client_without_its_key(path: str, federation: Federation, serving: object) -> None:
    trust = ssl.create_default_context(cafile=str(federation.keys / "server" / "ca.crt"))
    url = f"https://localhost:{federation.port}"
    with httpx.Client(base_url=url, verify=trust, trust_env=False, timeout=30) as http:
        assert http.get("/health").status_code == 200
        assert http.post(f"/v1/fleet/{path}", headers=PROTOBUF).status_code == 401


def supernode(federation: Federation, log: Path, *key: str) -> "subprocess.Popen[bytes]":
    """Flower's own SuperNode, with the authority's certificate."""
    command = [program("flower-supernode"), "--superlink", f"localhost:{federation.port}", "--port", str(free_port())]
    command += ["--root-certificates", str(federation.keys / "server" / "ca.crt"), *key]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | QUIET | {"PATH": PATH})


def test_nor_join_with_a_key_of_nobody(federation: Federation, serving: object, tmp_path: Path) -> None:
    made = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(tmp_path / "key")]
    subprocess.run(made, check=True)
    node = supernode(federation, tmp_path / "log", "--auth-supernode-private-key", str(tmp_path / "key"))
    node.wait(SLOW)  # a SuperNode ends with 0 when it is told 401
    assert "unknown key" in (federation.folder / "attacked" / "gate.log").read_text()
    assert "SuperNode ID" not in (tmp_path / "log").read_text()


def test_nor_join_without_a_key(federation: Federation, serving: object, tmp_path: Path) -> None:
    """It asks to be registered, which the gateway does not know of, and tries on for ever."""
    node = supernode(federation, tmp_path / "log")
    try:
        refused = federation.folder / "attacked" / "gate.log"
        federation.until(lambda: "/v1/fleet/register-node" in refused.read_text())
        assert "SuperNode ID" not in (tmp_path / "log").read_text()
    finally:
        node.kill()
        node.wait()


def test_the_run_goes_on_whatever_was_tried(federation: Federation, serving: object) -> None:
    before = len(federation.records("attacked"))
    federation.until(lambda: len(federation.records("attacked")) > before)
    assert all(record["answered"] == 3 for record in federation.records("attacked"))


def test_ctrl_c_ends_a_server_in_a_run_and_leaves_nothing_behind(
    federation: Federation, serving: "subprocess.Popen[bytes]"
) -> None:
    pids = [pid for process in federation.running for pid in named(process.pid, "")]
    federation.end()
    assert serving.returncode == 130
    federation.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds=10)  # init reaps orphans
