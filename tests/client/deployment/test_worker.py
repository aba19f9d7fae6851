"""The warm worker: jobs over a Unix socket, done once, whatever is killed; and a ClientApp that loads no model."""

import filecmp
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from fedlora import config
from fedlora.client.deployment import relay, supervisor
from fedlora.client.deployment.health import is_serving
from fedlora.client.deployment.progress import STALLED
from fedlora.client.deployment.worker import ClientIdentity, run_folder
from fedlora.errors import ReasonCode
from fedlora.messages import codec, envelope
from fedlora.messages.agreement import RunAgreement
from fedlora.messages.envelope import unpack
from fedlora.messages.parts import Parts
from fedlora.run.agreement import agreement_for_clients
from fedlora.run.setup import RunSetup, for_server
from fedlora.sections import Training
from fedlora.server import upload_checks
from fedlora.storage.event_log import entries
from fedlora.strategy import Job, Update
from tests.support.forked import Forked
from tests.support.models import make

ROOT = Path(__file__).parents[3]
HERE = ROOT / "client" / "deployment"
RUN = "20260101-abc"
SETTINGS = {"clients": 1, "cohort": 1, "lora.rank": 3, "model.max_length": 16, "threads": 1, "rounds": 9}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> RunSetup:
    """The server's side."""
    folder = tmp_path_factory.mktemp("model")
    make("llama", folder)
    return for_server(config.build(SETTINGS, {"model.path": str(folder)}), 1)


class Beside:
    """A worker in a process of its own, which can be killed and started again."""

    def __init__(self, folder: Path, model: str, *more: str) -> None:
        rows = [{"text": " ".join(f"w{(i * j) % 50}" for j in range(12))} for i in range(30)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.folder, self.socket, self._model = folder, folder / "s", model
        self._more = more
        self.start()

    def start(self) -> None:
        words = ["worker", "--socket", self.socket, "--state", self.folder / "state", "--id", "0"]
        words += ["--data", self.folder / "data.jsonl", "--model", self._model, "--threads", "1", *self._more]
        self.process = Forked(*words, log=self.folder / "log")

    def ask(self, kind: str, content: RecordDict, run: str = RUN) -> RecordDict:
        return relay.ask(f"unix:{self.socket}", kind, envelope.stamp(content, run), None)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@contextmanager
def joined(folder: Path, setup: RunSetup) -> Iterator[Beside]:
    """A worker that has joined the run; it ends with this."""
    made = Beside(folder, setup.config.model.path)
    try:
        made.ask("who", codec.pack_join_request(agreement_for_clients(setup)))
        yield made
    finally:
        made.process.kill()
        made.process.wait()


@pytest.fixture
def beside(setup: RunSetup, tmp_path: Path) -> Iterator[Beside]:
    """A worker that may be killed."""
    with joined(tmp_path, setup) as made:
        yield made


@pytest.fixture(scope="module")
def shared(setup: RunSetup, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    """A worker that stays for several tests."""
    with joined(tmp_path_factory.mktemp("w"), setup) as made:
        yield made


def job(setup: RunSetup, steps: int = 1, round: int = 0) -> Job:
    return Job(setup.start, training=Training(steps=steps, batch_size=4), round=round, rounds=9)


def letter(setup: RunSetup, a_job: Job) -> RecordDict:
    parts = Parts().of(a_job)
    return codec.JobEncoder(agreement_for_clients(setup).hash).job(a_job, parts, parts)


def update(records: RecordDict, a_job: Job) -> Update:
    read = upload_checks.validated_update(unpack(records), a_job)
    assert isinstance(read, Update)
    return read


def same(x: Update, y: Update) -> bool:
    return all(torch.equal(t, y.lora.side(s)[m]) for s in "ABH" for m, t in x.lora.side(s).items())


def test_a_job_that_comes_again_has_the_same_answer_and_is_done_once(shared: Beside, setup: RunSetup) -> None:
    first = update(shared.ask("train", letter(setup, job(setup))), job(setup))
    again = update(shared.ask("train", letter(setup, job(setup))), job(setup))
    assert same(first, again) and shared.log.count("trained round 1") == 1
    other = update(shared.ask("train", letter(setup, job(setup, round=1))), job(setup, round=1))
    assert not same(first, other)


def test_a_worker_that_is_killed_in_a_job_does_it_after_it_is_back(beside: Beside, setup: RunSetup) -> None:
    """The same socket, the same files: whoever asked waits, asks again, and sees nothing of it."""
    long, answers = job(setup, steps=300), list[RecordDict]()
    asking = Thread(target=lambda: answers.append(beside.ask("train", letter(setup, long))))
    asking.start()
    while not list((beside.folder / "state" / "runs" / RUN / "0").glob("*.part")):
        time.sleep(0.01)
    beside.process.send_signal(signal.SIGKILL)
    beside.process.wait()
    assert asking.is_alive() and not answers
    beside.start()
    asking.join(120)
    assert update(answers[0], long).examples == 30 and beside.log.count("trained round 1") == 1


def test_it_remembers_the_runs_settings_when_it_is_started_again(beside: Beside, setup: RunSetup) -> None:
    before = update(beside.ask("train", letter(setup, job(setup))), job(setup))
    beside.process.kill()
    beside.process.wait()
    beside.start()
    assert same(before, update(beside.ask("train", letter(setup, job(setup))), job(setup)))


def test_what_it_refuses_is_a_code_and_the_sentence_is_in_its_log(shared: Beside, setup: RunSetup) -> None:
    address, refused = f"unix:{shared.socket}", []
    for run, content in (("other-run", letter(setup, job(setup))), ("../../etc", letter(setup, job(setup)))):
        with pytest.raises(relay.WorkerFailed) as failed:
            relay.ask(address, "train", envelope.stamp(content, run), None)
        refused.append(failed.value.code)
    with pytest.raises(relay.WorkerFailed, match="more") as failed:
        shared.ask("train", codec.pack_join_request(RunAgreement()))
    assert [*refused, failed.value.code] == [ReasonCode.MESSAGE] * 3
    for said in ("settings are not known here", "a run's name has up to 40", "a message is no JobHead"):
        assert said in shared.log


def test_a_job_of_many_times_the_model_is_not_taken_in(shared: Beside, setup: RunSetup) -> None:
    """It is refused by what it says of itself, before its bytes are kept."""
    content = letter(setup, job(setup))
    content["array"] = envelope.as_array(bytes(100 * 2**20))
    with pytest.raises(relay.WorkerFailed) as failed:
        shared.ask("train", content)
    assert failed.value.code == ReasonCode.MESSAGE and "at most" in shared.log
    *_, last = entries(shared.folder / "state" / "audit.jsonl")
    assert (last["event"], last["what"], last["reason"]) == ("left", "reason", "message")


def test_a_run_called_ledgers_keeps_away_from_the_ledgers(tmp_path: Path) -> None:
    identity = ClientIdentity(0, tmp_path, {})
    assert run_folder(identity, "ledgers") == tmp_path / "runs" / "ledgers" / "0"
    (tmp_path / "ledgers" / "0").mkdir(parents=True)
    assert run_folder(identity, "ledgers") == tmp_path / "runs" / "ledgers" / "0"


def test_a_run_that_an_older_version_began_stays_where_it_was(tmp_path: Path) -> None:
    (tmp_path / RUN / "0").mkdir(parents=True)
    assert run_folder(ClientIdentity(0, tmp_path, {}), RUN) == tmp_path / RUN / "0"


def test_its_socket_is_its_owners_alone_and_it_says_that_it_serves(shared: Beside) -> None:
    assert shared.socket.stat().st_mode & 0o077 == 0
    assert is_serving(shared.socket) and not is_serving(shared.folder / "nothing")


def test_data_with_a_mistake_end_it_at_once_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"text"\n')
    words = ["worker", "--socket", "s", "--state", "state", "--id", "0", "--data", "bad.jsonl"]
    worker = Forked(*words, cwd=tmp_path)
    said, errors = worker.communicate(timeout=120)
    assert worker.returncode == 2 and "bad.jsonl line 2" in said and "Traceback" not in said + errors


def test_a_worker_whose_job_stands_still_ends_and_says_so(setup: RunSetup, tmp_path: Path) -> None:
    """It loads a model, which takes longer than it is given here; whoever started it starts it again."""
    beside = Beside(tmp_path, setup.config.model.path, "--client.stall", "0.05")
    hello = codec.pack_join_request(agreement_for_clients(setup))
    Thread(target=beside.ask, args=("who", hello), daemon=True).start()
    assert beside.process.wait(120) == supervisor.STALLED == STALLED
    assert "joining the run made no progress for as long as client.stall allows" in beside.log


def test_the_clientapp_loads_neither_torch_nor_transformers() -> None:
    loaded = "import sys, fedlora.client.deployment.app, fedlora.client.deployment.relay"
    code = f"{loaded}; sys.exit(not {{'torch', 'peft'}}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_generated_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    """They are made anew from a wheel's layout: python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. FILE."""
    import grpc_tools
    from grpc_tools import protoc

    place = tmp_path / "fedlora" / "client" / "deployment"
    place.mkdir(parents=True)
    (place / "worker.proto").write_bytes((HERE / "worker.proto").read_bytes())
    include = Path(grpc_tools.__file__).parent / "_proto"
    words: list[Any] = ["protoc", f"-I{tmp_path}", f"-I{include}", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    assert protoc.main([*words, "fedlora/client/deployment/worker.proto"]) == 0
    for name in ("worker_pb2.py", "worker_pb2.pyi"):
        assert filecmp.cmp(place / name, HERE / name, shallow=False), f"{name} is not worker.proto's"


def test_a_job_with_another_policy_than_the_clients_is_refused(setup: RunSetup, tmp_path: Path) -> None:
    from fedlora.client.policy import ClientPolicy
    from fedlora.errors import PrivacyError

    asked = replace(job(setup), shares="AB")
    ClientPolicy(egress=("A *", "B *")).refuse(asked, 10)
    with pytest.raises(PrivacyError, match=r'asks for "B model\S+", which client.egress does not let out'):
        ClientPolicy(egress=("A *",)).refuse(asked, 10)


def test_its_operator_sees_what_it_is_about_to_do_with_its_data(shared: Beside) -> None:
    kept = shared.folder / "state" / "runs" / RUN / "0" / "inputs.json"
    assert "columns used: text" in shared.log and kept.stat().st_mode & 0o077 == 0
    assert json.loads(kept.read_text())["data"]["sizes"] == [30]


def test_each_run_says_so_though_its_agreement_is_that_of_one_before(shared: Beside, setup: RunSetup) -> None:
    shared.ask("who", codec.pack_join_request(agreement_for_clients(setup)), run="another")
    runs = shared.folder / "state" / "runs"
    one, other = ((runs / run / "0" / "inputs.json").read_bytes() for run in (RUN, "another"))
    assert one == other
