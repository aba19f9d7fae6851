"""The flower engine gives serial's answer, through Flower's own simulation on Ray."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from fedlora import config
from fedlora.errors import ConfigError, Failure
from fedlora.lora import SIDES, LoRA, average
from fedlora.messages.parts import Parts
from fedlora.metrics import Metrics
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.run.plan import Plan, RoundResult
from fedlora.run.setup import RunSetup, prepare
from fedlora.sections import PrivacyConfig, SecureConfig
from fedlora.server.fleet import FlowerFleet
from fedlora.server.rounds import Fleet, fit
from fedlora.simulations import flower
from fedlora.simulations.serial import Serial
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex_lora import FedEx
from fedlora.strategy import Client, Job, Strategy, Update
from tests.support.models import make

ROOT = Path(__file__).parents[2]
MARK = "FEDLORA_TEST_FLOWER"  # in the environment of all processes of a test, so that those left behind are found
SMALL = {"train.batch_size": 4, "train.lr": 0.01, "lora.rank": 3, "model.max_length": 16, "train.optimizer": "sgd"}


@dataclass(frozen=True)
class Own(FedAvg):
    """A is shared; B and the head are trained and stay with their client."""

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, shares="A")

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return average(updates, weights).over(state)


@dataclass(frozen=True)
class Poisoned(FedAvg):
    """One client is given a start that is not a number."""

    def client_init(self, state: LoRA, client: Client) -> Job:
        bad = {m: a * float("nan") for m, a in state.A.items()}
        return Job(start=LoRA(bad).over(state) if client.id == 1 else state)


class EnoughError(Exception):
    """Raised while the fleet runs; it must come out."""


STRATEGIES: dict[str, Strategy[Any]] = {"fedavg": FedAvg(), "fedex": FedEx(), "poisoned": Poisoned(), "own": Own()}
STRATEGIES |= {"private": Own(), "secure": FedAvg()}
ENOUGH = EnoughError("enough")
ROUNDS = 2  # in the second one clients go on from what they and the server kept


@dataclass
class Seen:
    """What a fleet did."""

    runs: dict[str, list[RoundResult]] = field(default_factory=dict)
    metrics: Mapping[int, Metrics | Failure] = field(default_factory=dict)
    answered: list[int] = field(default_factory=list)
    workers: int = 0
    resent: tuple[bool, int] = (False, 0)  # was there an update, and bytes down
    files: list[Path] = field(default_factory=list)  # of Ray's, afterwards


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small transformer, and text that is in its vocabulary."""
    folder = tmp_path_factory.mktemp("site")
    make("llama", folder / "model")
    draw = Random(0)
    rows = [{"text": " ".join(f"w{draw.randrange(60)}" for _ in range(draw.randint(4, 12)))} for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def setup(site: Path) -> RunSetup:
    where = {"model.path": str(site / "model"), "data.path": str(site / "text.jsonl"), "data.holdout": 0.3}
    return prepare(
        config.build(SMALL, where, {"clients": 4, "cohort": 3, "threads": 1, "engine": "flower", "workers": 2})
    )


def play(setup: RunSetup, fleet: Fleet, seen: Seen) -> None:
    """Two rounds of every strategy, then an evaluation with what the clients kept."""
    plan = Plan(ROUNDS, 3, seed=5, training=replace(setup.config.train, steps=2))
    dp = PrivacyConfig(noise=1.0, delta=1e-4, rate=0.3, seeded=True)
    plans = {
        "private": replace(
            plan, record_level=RecordLevelDP(config=dp, training=plan.training, rounds=ROUNDS), metrics=False
        ),
        "secure": replace(plan, secure=SecureConfig(aggregation=True)),
    }
    for name, strategy in STRATEGIES.items():
        seen.runs[name] = list(fit(strategy, fleet, setup.start, plans.get(name, plan)))
    state = seen.runs["own"][-1].state
    seen.metrics = fleet.evaluate({c.id: Job(state, shares="A", round=ROUNDS - 1) for c in fleet.clients()})


@pytest.fixture(scope="module")
def serial(setup: RunSetup, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    seen = Seen()
    play(
        setup,
        Serial(setup.model, setup.clients_data, setup.ranks, tmp_path_factory.mktemp("serial"), seen.answered.append),
        seen,
    )
    return seen


@pytest.fixture(scope="module")
def ray(setup: RunSetup, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """All that is asked of Flower's simulation, in one start of Ray."""
    seen, folder = Seen(), tmp_path_factory.mktemp("flower")

    def serve(fleet: Fleet) -> None:
        assert isinstance(fleet, FlowerFleet)
        seen.workers = len(fleet._grid._workers())  # type: ignore[attr-defined]
        play(setup, fleet, seen)
        job = Job(setup.start, training=replace(setup.config.train, steps=1), round=9)
        dict(fleet.train({2: job}))
        rmtree(folder / "2")
        before = fleet.traffic.down
        again = dict(fleet.train({2: job}))
        seen.resent = (isinstance(again[2], Update), fleet.traffic.down - before)
        raise ENOUGH

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(dir="/tmp") as scratch:
        patch.setenv(MARK, "ray")
        patch.setattr(tempfile, "tempdir", scratch)
        with pytest.raises(EnoughError) as caught:
            flower.simulate(setup.config, folder, serve, seen.answered.append)
        seen.files = list(Path(scratch).iterdir())
    assert caught.value is ENOUGH
    return seen


def furthest(x: LoRA, y: LoRA) -> float:
    assert all(set(x.side(s)) == set(y.side(s)) for s in SIDES)
    return max(float((t - y.side(s)[m]).abs().max()) for s, m, t in x.matrices())


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_adapter_is_serial_s(name: str, serial: Seen, ray: Seen) -> None:
    """To what float32 allows of sums in another order; bit for bit where clients train one after another."""
    strategy = STRATEGIES[name]
    for x, y in zip(serial.runs[name], ray.runs[name], strict=True):
        apart = furthest(strategy.adapter(x.state), strategy.adapter(y.state))
        assert apart == 0 if name == "private" else apart < 1e-5
        assert x.asked == y.asked
        assert x.train_loss is None is y.train_loss or x.train_loss == pytest.approx(y.train_loss, rel=1e-5)


def test_two_workers_share_the_clients(ray: Seen) -> None:
    assert ray.workers == 2


def test_a_cluster_is_joined_by_its_address_and_needs_to_be_told_how_many_workers(
    setup: RunSetup, tmp_path: Path
) -> None:
    there = replace(setup.config, ray="10.0.0.1:6379", workers=3)
    backend = flower.Flower(there, tmp_path, tmp_path)._backend()
    assert backend["init_args"]["address"] == "10.0.0.1:6379" and "num_cpus" not in backend["init_args"]
    with pytest.raises(ConfigError, match=r"at 10\.0\.0\.1:6379 gives room to is not known; set workers"):
        flower.simulate(replace(there, workers=0), tmp_path, lambda _: None, lambda _: None)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_bytes_are_counted(name: str, serial: Seen, ray: Seen) -> None:
    for x, y in zip(serial.runs[name], ray.runs[name], strict=True):
        assert (x.bytes_up, x.bytes_down) == (y.bytes_up, y.bytes_down)


def test_a_private_clients_ledger_is_read_by_the_server(serial: Seen, ray: Seen) -> None:
    last = ray.runs["private"][-1]
    assert last.spent == serial.runs["private"][-1].spent and len(last.spent) >= 3
    assert sum(s.charges for s in last.spent.values()) == 3 * ROUNDS and last.train_loss is None


def test_a_client_that_raises_is_named_and_the_round_goes_on(serial: Seen, ray: Seen) -> None:
    failed = [r.failed for r in ray.runs["poisoned"]]
    assert failed == [r.failed for r in serial.runs["poisoned"]]
    assert any("the loss is nan" in round[1].reason for round in failed if 1 in round)


def test_what_clients_keep_wins_in_their_evaluation(serial: Seen, ray: Seen) -> None:
    for i, own in serial.metrics.items():
        there = ray.metrics[i]
        assert isinstance(own, Metrics) and isinstance(there, Metrics)
        assert there.loss == pytest.approx(own.loss, rel=1e-5) and there.targets == own.targets
    assert len({m.loss for m in ray.metrics.values() if isinstance(m, Metrics)}) == 4


def test_every_answer_is_told_at_once(serial: Seen, ray: Seen) -> None:
    for i in range(len(STRATEGIES) * ROUNDS):
        assert sorted(ray.answered[3 * i : 3 * i + 3]) == serial.answered[3 * i : 3 * i + 3]


def test_a_client_that_lost_its_parts_is_sent_them_again(setup: RunSetup, ray: Seen) -> None:
    whole = sum(flat.nbytes for flat in Parts().of(Job(setup.start)).values())
    assert ray.resent == (True, whole)


def test_no_process_and_no_file_of_ray_stays(ray: Seen) -> None:
    assert left("ray", wait=20) == []
    assert ray.files == []


def test_ctrl_c_ends_the_run_and_everything(site: Path, tmp_path: Path) -> None:
    """SIGINT to the whole group, as a terminal sends it, in the middle of a round."""
    words = {**SMALL, "model.path": site / "model", "data.path": site / "text.jsonl", "clients": 3, "threads": 1}
    words |= {"rounds": 100, "train.steps": 100, "engine": "flower", "out": tmp_path / "run"}
    command = [sys.executable, "-m", "fedlora", "simulate", *(str(w) for k, v in words.items() for w in (f"--{k}", v))]
    env = os.environ | {MARK: "int", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, env=env, stdout=-1, stderr=-2, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint").is_dir() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=240)  # Ray takes its time on a busy machine
    assert run.returncode == 130, said
    assert "interrupted; go on with" in said and "Traceback" not in said and "ray" not in said.lower()
    assert left("int", wait=5) == []


def left(mark: str, wait: float) -> list[str]:
    """The processes of a test that are still there after so many seconds."""
    end = time.monotonic() + wait
    while (found := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _marked(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found
