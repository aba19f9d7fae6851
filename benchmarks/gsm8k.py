"""GSM8K over ten clients with a small instruction-tuned model: four strategies, each client alone, and all data in one.

    python -m benchmarks.models smollm2 SMOLLM2
    python -m benchmarks.gsm8k --model SMOLLM2 --data gsm8k --out gsm8k.json

gsm8k is a folder with train.jsonl and test.jsonl. The training questions are dealt out at random. Every run trains on
the same number of examples; at its end the model answers a fixed part of the test questions, greedily, and its loss on
their solutions is measured. Where there is no common model, each client's own is asked its tenth of that part. One run
takes about 22 minutes of CPU time, 12 on two cores. Runs that are in the file already are not repeated.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.sweep import Results, sweep
from benchmarks.tables import markdown, percent
from fedlora import config as configuration
from fedlora.client import training
from fedlora.config import Config
from fedlora.data.rows import Rows, take
from fedlora.errors import FedloraError
from fedlora.lora import LoRA
from fedlora.metrics import Metrics
from fedlora.run.answers import ScoredAnswer, answer_evaluation, means, spread_evenly
from fedlora.run.compose import compose
from fedlora.run.console import size
from fedlora.run.plan import Plan, RoundResult
from fedlora.run.setup import RunSetup, mute_transformers, prepare
from fedlora.server.rounds import fit
from fedlora.simulations.serial import Serial
from fedlora.storage.client_state import ClientState
from fedlora.strategy import Client, Job, Strategy

CLIENTS, STEPS = 10, 2  # clients, all asked in every round, and the steps of each in a round
ASKED = 100  # test questions, evenly spread
SETTINGS: Mapping[str, Any] = {
    "clients": CLIENTS,
    "cohort": CLIENTS,
    "rounds": 4,
    "data.partition": "iid",
    "model.max_length": 320,  # nine of ten solutions are whole
    "train.lr": 2e-3,
    "train.steps": STEPS,
    "train.batch_size": 4,
    "train.schedule": "linear",
    "eval.generate": True,
    "eval.limit": 0,  # all that it is given
    "eval.extract": "number",
    "eval.max_new_tokens": 160,
    "eval.batch_size": 50,
}
SMOKE: Mapping[str, Any] = {
    "rounds": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "data.limit": 40,
    "eval.max_new_tokens": 4,
}


@dataclass(frozen=True)
class Local(Strategy[LoRA]):
    """Local training: every client goes on from its own adapter, and nothing is sent."""

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, trains="ABH", shares="")

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return state

    def adapter(self, state: LoRA) -> LoRA:
        return state


@dataclass(frozen=True)
class ComparedRun:
    """A run, which is a line of the table, and its settings beside those of all."""

    line: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = "run"

    @property
    def trains(self) -> bool:
        return self.line != BEFORE


BEFORE = "before training"
COMPARED = (
    ComparedRun(BEFORE),
    ComparedRun("FedIT", {"strategy": "fedavg"}),
    ComparedRun("FedEx-LoRA", {"strategy": "fedex_lora"}),
    ComparedRun("FFA-LoRA", {"strategy": "ffa_lora", "train.lr": 4e-3}),  # B alone is trained
    ComparedRun("FedSA-LoRA", {"strategy": "fedsa_lora"}),
    ComparedRun("each client alone", {"strategy": "benchmarks.gsm8k:Local"}),
    ComparedRun("all data in one", {"strategy": "fedavg", "clients": 1, "cohort": 1, "train.steps": CLIENTS * STEPS}),
)


@dataclass(frozen=True)
class SharedInputs:
    """The model, the data and the machine, which all runs have in common."""

    model: str
    data: str
    threads: int
    smoke: bool

    def config(self, variant: ComparedRun) -> Config:
        """The settings of a run."""
        return configuration.build(
            SETTINGS,
            {"model.path": self.model, "threads": self.threads},
            {"data.path": f"{self.data}/train.jsonl", "data.eval": f"{self.data}/test.jsonl"},
            variant.settings,
            {key: value for key, value in SMOKE.items() if key not in variant.settings} if self.smoke else {},
        )


def measure(place: SharedInputs, variant: ComparedRun) -> dict[str, Any]:
    """Do one run in this process, and return its record."""
    mute_transformers()
    setup = prepare(place.config(variant))
    asked = spread_evenly(setup.evaluation_rows, CLIENTS if place.smoke else ASKED)
    strategy = compose(setup.config, setup.start, setup.ranks)
    began = time.process_time()
    with TemporaryDirectory() as folder:
        fleet = Serial(setup.model, setup.clients_data, setup.ranks, Path(folder))
        rounds = list(fit(strategy, fleet, setup.start, _plan(setup.config))) if variant.trains else []
        trained = time.process_time()
        scores = _scored(setup, strategy, rounds, Path(folder), asked)
    used = {"trained_cpu_seconds": round(trained - began, 1), "cpu_seconds": round(time.process_time() - began, 1)}
    return scores | used | {"rounds": [done.record() for done in rounds]}


def _plan(config: Config) -> Plan:
    return Plan(
        rounds=config.rounds, cohort=config.cohort, seed=config.seed, training=config.train, policy=config.server
    )


def _scored(
    setup: RunSetup, strategy: Strategy[Any], rounds: Sequence[RoundResult], folder: Path, asked: Rows
) -> dict[str, Any]:
    """The scores of the run's model on the questions; of clients' own models, each on its share of them."""
    state = rounds[-1].state if rounds else strategy.init(setup.start)
    adapters = _own_adapters(setup, strategy, state, len(rounds), folder) or [strategy.adapter(state)]
    shares = [take(asked, range(i, len(asked), len(adapters))) for i in range(len(adapters))]
    parts = [_asked(setup, adapter, share) for adapter, share in zip(adapters, shares, strict=True)]
    answers = [answer for _, of_part in parts for answer in of_part]
    metrics = sum((m for m, _ in parts[1:]), parts[0][0])
    return {"models": len(parts), "asked": len(answers), **metrics.values(), **means(answers)}


def _own_adapters(setup: RunSetup, strategy: Strategy[Any], state: Any, rounds: int, folder: Path) -> list[LoRA]:
    """Every client's own adapter after so many rounds; none where all have the common one."""
    clients = [data.client(i, setup.ranks[i]) for i, data in enumerate(setup.clients_data)]
    jobs = {c.id: replace(strategy.client_init(state, c), round=rounds) for c in clients}
    if not rounds or all(set(job.trains) <= set(job.shares) for job in jobs.values()):
        return []
    return [_own(setup, folder / str(i), job) for i, job in jobs.items()]


def _own(setup: RunSetup, folder: Path, job: Job) -> LoRA:
    """The adapter that a client would use after the run: what it keeps, and the job's for all else."""
    training.load_start(setup.model, job, ClientState(folder).before(job.round))
    return setup.model.get_adapter()


def _asked(setup: RunSetup, adapter: LoRA, rows: Rows) -> tuple[Metrics, list[ScoredAnswer]]:
    """How well the model with this adapter predicts the solutions, and what it answers."""
    setup.model.set_adapter(adapter)
    metrics = setup.model.metrics(setup.model.encoder(rows))
    evaluation = answer_evaluation(setup.model, setup.config.eval, rows)
    assert evaluation  # eval.generate is set
    return metrics, evaluation.answers(adapter)


def ready(chosen: Sequence[ComparedRun], results: Results) -> Iterator[ComparedRun]:
    """Yield the runs that are not done."""
    yield from (variant for variant in chosen if not results.get(variant.line))


HEAD = ("", "loss", "exact match, %", "ROUGE-L", "no end, %", "sent by a client a round", "CPU time")


def table(results: Results) -> str:
    """The runs in Markdown; CPU times are those of training, as a share of FedIT's."""
    done = {variant.line: results.get(variant.line, {}).get("run", {"error": "not run"}) for variant in COMPARED}
    unit = done["FedIT"].get("trained_cpu_seconds", 0.0)
    return markdown(HEAD, [_row(line, record, unit) for line, record in done.items()])


def _row(line: str, done: Mapping[str, Any], unit: float) -> tuple[str, ...]:
    if "error" in done:
        return (line, done["error"], *[""] * (len(HEAD) - 2))
    share, n = done["exact_match"], done["asked"]
    return (
        line + (f" ({done['models']} models)" if done["models"] > 1 else ""),
        f"{done['loss']:.3f}",
        f"{percent(share)} ± {percent(sqrt(share * (1 - share) / n))}",
        f"{done['rouge_l']:.3f}",
        percent(done["unfinished"]),
        _sent(done["rounds"]),
        f"{done['trained_cpu_seconds'] / unit:.2f}" if unit and done["rounds"] else "",
    )


def _sent(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Bytes that a client sends in a round, on the average; nothing where there is nobody to send to."""
    many = [record for record in rounds if record["clients"] > 1]
    return size(round(sum(r["bytes_up"] / r["clients"] for r in many) / len(many))) if many else ""


def main() -> None:
    """Parse, run, print."""
    place, only, out = arguments()
    chosen = [variant for variant in COMPARED if not only or variant.line in only]
    settings = {**SETTINGS, "asked": ASKED, **(SMOKE if place.smoke else {})}
    try:
        results = sweep(partial(ready, chosen), partial(measure, place), _said, (out, settings), jobs=1)
    except FedloraError as e:
        raise SystemExit(str(e)) from e
    print(table(results))


def _said(variant: ComparedRun, done: Mapping[str, Any]) -> str:
    if "error" in done:
        return f"{variant.line}: {done['error']}"
    scores = f"loss {done['loss']:.4f}, exact match {done['exact_match']:.3f}"
    return f"{variant.line}: {scores} in {done['cpu_seconds']:.0f} s of CPU time"


def arguments() -> tuple[SharedInputs, list[str], Path]:
    """The command line's place, names of wanted lines, and file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of SmolLM2, as benchmarks.models writes it")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl of GSM8K")
    parser.add_argument("--out", type=Path, required=True, help="file of results, which is gone on with")
    parser.add_argument("--only", default="", help="lines of the table, with commas between")
    parser.add_argument("--smoke", action="store_true", help="see that everything runs: one step, ten questions")
    given = parser.parse_args()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    place = SharedInputs(given.model, str(given.data.absolute()), os.cpu_count() or 1, given.smoke)
    return place, [name for name in given.only.split(",") if name], given.out


if __name__ == "__main__":
    main()
