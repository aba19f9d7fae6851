"""Two federations of real data, and runs on them in this process: SST-2's six clients, and BANKING77's fifty.

A run trains with the stacked engine. Every client holds out some of its examples: on one half of these a run is judged
where something is chosen by it, as a learning rate; on the other half, and on the test split, it is measured.
"""

import argparse
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import smoke
from fedlora import config as configuration
from fedlora.client.policy import policy_of
from fedlora.config import Config
from fedlora.data.rows import take
from fedlora.encoding.client_data import ClientData
from fedlora.errors import ConfigError, nearest
from fedlora.metrics import Metrics, spread
from fedlora.privacy.record_level import record_level_dp
from fedlora.run.client_ranks import ranks
from fedlora.run.compose import compose
from fedlora.run.plan import Plan
from fedlora.run.setup import RunSetup, prepare
from fedlora.sections import LoRAConfig, ModelConfig
from fedlora.server.rounds import answers_and_failures, fit
from fedlora.simulations.stacked import Stacked
from fedlora.strategy import Strategy

SIMULATIONS = Path(__file__).parents[1] / "simulations"
Layer = Mapping[str, Any]  # settings by their dotted keys


@dataclass(frozen=True)
class Federation:
    """Clients and their data, with the settings of `simulations/NAME.toml` and these over them."""

    name: str
    clients: str  # the clients' files, in its folder
    test: str  # the test split
    settings: Layer = field(hash=False)
    seeds: int  # by which a figure is a mean, where the benchmark is given no other number

    @property
    def toml(self) -> Path:
        return SIMULATIONS / f"{self.name}.toml"


SST2 = Federation(
    name="sst2",
    clients="client_*.jsonl",
    test="val.jsonl",
    settings={
        "rounds": 5,
        "data.holdout": 0.05,
        "train.steps": 8,
        "train.batch_size": 8,
        "train.accumulate": 2,
        "server.eval_every": 5,
    },
    seeds=3,
)
BANKING77 = Federation(
    name="banking77",
    clients="train.csv",
    test="test.csv",
    settings={
        "rounds": 6,
        "cohort": 50,  # all, so that each client's few examples are spent on little noise where there is any
        "data.holdout": 0.1,
        "data.eval_limit": 1540,
        "train.steps": 4,
        "train.batch_size": 8,
        "train.accumulate": 2,
        "server.eval_every": 6,
    },
    seeds=1,
)
FEDERATIONS = {federation.name: federation for federation in (SST2, BANKING77)}
TINY: Layer = {"rounds": 2, "train.steps": 2, "train.batch_size": 2, "data.eval_limit": 8, "data.holdout": 0.4}
FEW: Layer = {"clients": 6, "cohort": 6, "data.partition": "iid"}
SMOKE: Mapping[str, Layer] = {"sst2": TINY, "banking77": {**TINY, **FEW}}


@dataclass(frozen=True)
class Place:
    """The model, the folders of the data, and the machine, which all runs have in common."""

    model: str
    sst2: str
    banking77: str
    threads: int
    smoke: bool

    def folder(self, federation: Federation) -> str:
        """Where the data of this federation are; empty where they were not given."""
        found: str = getattr(self, federation.name)
        return found

    @property
    def federations(self) -> list[Federation]:
        """Those whose data were given."""
        return [federation for federation in FEDERATIONS.values() if self.folder(federation)]


def config_of(place: Place, federation: Federation, *layers: Layer) -> Config:
    """The settings that all runs on the federation have in common, with these layers over them."""
    folder = place.folder(federation)
    return configuration.build(
        configuration.read(federation.toml),
        {"model.path": place.model, "threads": place.threads},
        {"data.path": f"{folder}/{federation.clients}", "data.eval": f"{folder}/{federation.test}"},
        federation.settings,
        *layers,
        SMOKE[federation.name] if place.smoke else {},
    )


def settings(federation: Federation, *, smoke: bool) -> dict[str, Any]:
    """The settings that all runs on the federation have in common, whatever the paths of model and data."""
    small = SMOKE[federation.name] if smoke else {}
    return {**configuration.read(federation.toml), **federation.settings, **small}


def carry_out(place: Place, federation: Federation, config: Config, most: int = 60) -> dict[str, Any]:
    """Do one run in this process, and return its record.

    That is its rounds, how good each client's model is on the examples that the client holds out ("choice": the mean
    on the half by which something may be chosen; "own": on the other half; at most `most` of each), whether clients
    keep a part of it, the noise of a private run, and the CPU time.
    """
    began = time.process_time()
    setup = _setup(place, federation, replace(config.lora, ranks=""), config.model, config.seed)
    halves = [_clients_data(place, federation, config.seed, half, most) for half in (0, 1)]
    client_ranks = ranks(
        config.lora.ranks, largest=config.lora.rank, clients=len(halves[0]), seed=config.seed, memory=setup.model.memory
    )
    strategy = compose(config, setup.start, client_ranks)
    with TemporaryDirectory() as folder:
        choice, other = (
            Stacked(setup.model, data, client_ranks, Path(folder), policy=policy_of(config)) for data in halves
        )
        plan = _plan(config, setup, choice)
        rounds = list(fit(strategy, choice, setup.start, plan))
        chosen, own = (_judged(strategy, rounds[-1].state, fleet, config.rounds - 1) for fleet in (choice, other))
        jobs = [strategy.client_init(rounds[-1].state, client) for client in choice.clients()]
    return {
        "choice": {"loss": _loss(chosen), "mean": spread(chosen)["mean"]},
        "own": spread(own) | {"loss": _loss(own)},
        "personal": any(set(job.trains) - set(job.shares) for job in jobs),
        "rounds": [done.record() for done in rounds],
        "noise": [plan.record_level.terms_for(c).noise for c in choice.clients()] if plan.record_level else [],
        "cpu": round(time.process_time() - began, 1),
    }


def _plan(config: Config, setup: RunSetup, fleet: Stacked) -> Plan:
    """The plan of a run, with the exactness meter where there is no privacy."""
    private = record_level_dp(config.dp, config.train, config.rounds, fleet.clients()) if config.dp.by_record else None
    return Plan(
        rounds=config.rounds,
        cohort=config.cohort,
        seed=config.seed,
        training=config.train,
        policy=config.server,
        evaluate=setup.evaluate,
        exactness=setup.model.scales if config.lora.kind == "lora" and not private else None,
        record_level=private,
    )


def _judged(strategy: Strategy[Any], state: Any, fleet: Stacked, t: int) -> Mapping[int, Metrics]:
    """The metrics of each client's model on what the client holds out.

    The plan has no such evaluation, since its traffic would be counted as that of the training.
    """
    jobs = {c.id: replace(strategy.client_init(state, c), round=t) for c in fleet.clients()}
    return answers_and_failures(jobs, fleet.evaluate(jobs))[0]


def _loss(metrics: Mapping[int, Metrics]) -> float:
    """The mean of the losses of the clients that hold anything out, each counting once."""
    return fmean(m.loss / m.targets for m in metrics.values() if m.targets)


@lru_cache(maxsize=4)
def _setup(place: Place, federation: Federation, lora: LoRAConfig, model: ModelConfig, seed: int) -> RunSetup:
    """The model with this adapter, and the encoded examples; a process makes each once."""
    return prepare(replace(config_of(place, federation), lora=lora, model=model, seed=seed))


@lru_cache(maxsize=8)
def _clients_data(place: Place, federation: Federation, seed: int, half: int, most: int) -> tuple[ClientData, ...]:
    """The clients with one half of the rows they hold out."""

    def halved(client_data: ClientData) -> ClientData:
        rows = client_data.heldout_rows
        return replace(client_data, heldout_rows=take(rows, range(half, len(rows), 2)[:most]))

    plain = config_of(place, federation)
    return tuple(map(halved, _setup(place, federation, plain.lora, plain.model, seed).clients_data))


def outcome(done: Mapping[str, Any]) -> str:
    """A run's error, or how good the clients' models are, in one line."""
    if "error" in done:
        return str(done["error"])
    return (
        "loss {loss:.4f}, accuracy {mean:.4f} of the clients' choice".format(**done["choice"])
        + f", {done['cpu']:.0f} s"
    )


def check_only(only: Sequence[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that no line of the table has."""
    for name in only:
        if name not in known:
            raise ConfigError(f'--only: there is no "{name}"; {nearest(name, known)}')


def parser(about: str) -> argparse.ArgumentParser:
    """The options that benchmarks on these federations have in common."""
    made = argparse.ArgumentParser(description=about.partition("\n")[0])
    made.add_argument("--model", help="folder of all-MiniLM-L6-v2")
    made.add_argument("--sst2", type=Path, help="folder with client_*.jsonl and val.jsonl")
    made.add_argument("--banking77", type=Path, help="folder with train.csv and test.csv")
    made.add_argument("--out", type=Path, required=True, help="file of results, which is gone on with")
    made.add_argument("--only", default="", help="lines of the table, with commas between")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; each has its own model")
    made.add_argument("--smoke", action="store_true", help="a small form with a tiny model and data of its own")
    return made


@contextmanager
def place_of(given: argparse.Namespace) -> Iterator[Place]:
    """The place that the command line names, or a tiny one for as long as it is used. Raises `ConfigError` for none."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    with TemporaryDirectory() as folder:
        if given.smoke:
            model = smoke.federations(Path(folder))
            yield Place(model, folder, folder, threads, smoke=True)
        elif not given.model or not (given.sst2 or given.banking77):
            raise ConfigError("give --model, and --sst2 or --banking77 or both")
        else:
            sst2, banking77 = (str(f.absolute()) if f else "" for f in (given.sst2, given.banking77))
            yield Place(given.model, sst2, banking77, threads, smoke=False)


def named(given: argparse.Namespace) -> list[str]:
    """The lines that --only names."""
    return [name for name in given.only.split(",") if name]
