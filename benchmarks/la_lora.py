"""LA-LoRA's claim on SST-2's six label-skewed clients with MiniLM: more accuracy under noise, the more the noise is.

    python -m benchmarks.la_lora --model MINILM --sst2 sst2 --out la_lora.json

MINILM is made by `python -m benchmarks.models minilm MINILM`, sst2 has client_*.jsonl and val.jsonl. Without privacy,
at epsilon 3 and at epsilon 1: FedIT, FFA-LoRA, RoLoRA, and LA-LoRA with its filter and without, each at the rate of
one grid, up to the rate from which its loss rises, that has the lowest mean of the clients' losses on one half of what
they hold out. And LA-LoRA without its filter at 0.52 of the rate at which it is best with it: white noise, and a
signal whose features have no order, keep 0.27 = 0.52^2 of their squares in the filter, so that it may be no more than
a lower rate. Each chosen rate is then measured over three seeds, on val.jsonl after the last round and by the clients
on the other half. Plain SGD, under which a filter can be a rate at all. Noise comes from the seed, so that the table
can be made again: these runs are NOT PRIVATE. Runs that are in the file already are not repeated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

from benchmarks import federations
from benchmarks.federations import SST2, Place, carry_out, check_only, config_of, outcome
from benchmarks.sweep import Results, sweep
from benchmarks.tables import markdown, percent, starred
from fedlora.errors import FedloraError

RATES = (0.1, 0.3, 1.0, 3.0, 9.0)
EPSILONS = (None, 3.0, 1.0)
SEEDS = (0, 1, 2)
AS_A_RATE = 0.52  # the root of 70 / 256, by which the filter shortens what has no order along the features
OWN = 120  # examples at most, in each half of what a client holds out
HEAD = 10.0  # times transformers' random head, which is frozen: a smaller one asks for larger changes of the model
SETTINGS: Mapping[str, Any] = {
    "data.holdout": 0.05,
    "model.head": "frozen",
    "lora.targets": [f"layer.{i}.attention.self.{name}" for i in (4, 5) for name in ("query", "value")],
    "rounds": 15,
    "train.optimizer": "sgd",
    "train.schedule": "linear",
    "train.steps": 4,  # two of either side
    "train.batch_size": 16,
    "train.accumulate": 2,
    "dp.clip": 1.0,
    "server.eval_every": 15,
}

SMOKE: Mapping[str, Any] = {"lora.targets": ["query", "value"]}


@dataclass(frozen=True)
class Line:
    """A line of the table: a strategy with its options, private or not."""

    name: str
    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    of: str = ""  # the line by whose rate this one goes, at 0.52 of it; its own rate, where there is none
    epsilon: float | None = None
    rates: tuple[float, ...] = RATES

    @property
    def key(self) -> str:
        """The line's name in the file."""
        return _key(self.name, self.epsilon)


def _key(name: str, epsilon: float | None) -> str:
    return f"{name}, {'none' if epsilon is None else f'epsilon {epsilon:g}'}"


@dataclass(frozen=True)
class ClaimRun:
    """One run: of the grid, or one of those that are measured."""

    of_line: Line
    lr: float
    seed: int | None = None  # of a run that is measured

    @property
    def line(self) -> str:
        """The line that the run is of."""
        return self.of_line.key

    @property
    def name(self) -> str:
        """The run's name among those of its line."""
        return f"{self.lr:g}" if self.seed is None else f"seed {self.seed}"


FILTERED = "LA-LoRA"
STRATEGIES = (
    Line("FedIT", "fedavg"),
    Line("FFA-LoRA", "ffa_lora"),
    Line("RoLoRA", "rolora"),
    Line("LA-LoRA without filter", "la_lora", {"option.smoothing": False}),
    Line(FILTERED, "la_lora"),
    Line(f"LA-LoRA without filter, rate x {AS_A_RATE}", "la_lora", {"option.smoothing": False}, of=FILTERED),
)


def lines(only: Sequence[str] = (), smoke: bool = False) -> list[Line]:
    """Every line without privacy and at each epsilon; of these those whose strategy is named."""
    check_only(only, {line.strategy for line in STRATEGIES})
    chosen = [line for line in STRATEGIES if not only or line.strategy in only]
    rates, epsilons = (RATES[:1], EPSILONS[::2]) if smoke else (RATES, EPSILONS)
    return [replace(line, epsilon=epsilon, rates=rates) for epsilon in epsilons for line in chosen]


def ready(chosen: Sequence[Line], seeds: Sequence[int], results: Results) -> Iterator[ClaimRun]:
    """Yield the runs that can be done now: rates in rising order until the loss rises, then the best of a line."""
    for line in chosen:
        done = results.get(line.key, {})
        rates = () if line.of else _untried(line, done)
        yield from (ClaimRun(line, lr) for lr in rates)
        rate = 0.0 if rates else rate_of(line, results)
        yield from (ClaimRun(line, rate, seed) for seed in seeds if rate and f"seed {seed}" not in done)


def _untried(line: Line, done: Mapping[str, Mapping[str, Any]]) -> tuple[float, ...]:
    """The next rate of the grid, if the loss has not risen; one at a time, as the next depends on it."""
    left = [lr for lr in line.rates if f"{lr:g}" not in done]
    losses = [done[f"{lr:g}"]["choice"]["loss"] for lr in line.rates if "choice" in done.get(f"{lr:g}", {})]
    return () if any(after > before for before, after in pairwise(losses)) else tuple(left[:1])


def rate_of(line: Line, results: Results) -> float:
    """The rate at which a line is measured; 0 as long as the grid that it depends on is not done."""
    done = results.get(_key(line.of or line.name, line.epsilon), {})
    tried = {run["lr"]: run["choice"]["loss"] for name, run in done.items() if name[:4] != "seed" and "choice" in run}
    if not tried or _untried(line, done):
        return 0.0
    best = float(min(sorted(tried), key=lambda lr: tried[lr]))
    return AS_A_RATE * best if line.of else best


def measure(place: Place, run: ClaimRun) -> dict[str, Any]:
    """Do one run in this process, and return its record."""
    line = run.of_line
    level = {"dp.noise": 1.0} if place.smoke else {"dp.epsilon": line.epsilon}  # given noise needs no reckoning
    private = {**level, "dp.seeded": True, "dp.metrics": True} if line.epsilon else {}
    chosen = {"strategy": line.strategy, "train.lr": run.lr, "seed": run.seed or 0, **private}
    smoke = SMOKE if place.smoke else {}
    config = config_of(place, SST2, SETTINGS, chosen, line.options, smoke)
    return {"lr": run.lr, **carry_out(place, SST2, config, most=OWN, head=HEAD)}


COLUMNS = ("strategy", "epsilon", "rate", "val, last round", "of seeds", "clients' own", "sent by a client a round")


def table(chosen: Sequence[Line], results: Results) -> str:
    """The measured runs in Markdown, the mean of the seeds; a star where a better rate may lie beyond the grid."""
    return markdown(COLUMNS, [_row(line, results.get(line.key, {})) for line in chosen])


def _row(line: Line, done: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    runs = [run for name, run in done.items() if name[:4] == "seed" and "own" in run]
    name = line.name, "none" if line.epsilon is None else f"{line.epsilon:g}"
    if not runs:
        return (*name, "not run", *[""] * (len(COLUMNS) - 3))
    accuracies = [run["rounds"][-1]["eval"]["accuracy"] for run in runs]
    last = runs[0]["rounds"][-1]
    return (
        *name,
        f"{runs[0]['lr']:g}" if line.of else starred(runs[0]["lr"], RATES),
        percent(fmean(accuracies)),
        f"{percent(min(accuracies))} to {percent(max(accuracies))}",
        percent(fmean(run["own"]["mean"] for run in runs)),
        f"{last['bytes_up'] / last['clients'] / 1000:.1f} kB",
    )


def _settings(place: Place) -> dict[str, Any]:
    """The settings that all results of a file have in common, whatever the paths of model and data."""
    return {"file": SST2.toml.name, **SETTINGS, "rates": RATES, "own": OWN, "head": HEAD, "smoke": place.smoke}


def _said(run: ClaimRun, done: Mapping[str, Any]) -> str:
    return f"{run.line} at {run.lr:g}{'' if run.seed is None else f', seed {run.seed}'}: {outcome(done)}"


def main() -> None:
    """Parse, run, print."""
    given = federations.parser(__doc__ or "").parse_args()
    try:
        with federations.place_of(given) as place:
            chosen = lines(federations.named(given), place.smoke)
            runs = partial(ready, chosen, SEEDS[:1] if place.smoke else SEEDS)
            results = sweep(runs, partial(measure, place), _said, (given.out, _settings(place)), given.jobs)
    except FedloraError as e:
        raise SystemExit(str(e)) from e
    print(table(chosen, results))


if __name__ == "__main__":
    main()
