"""What privacy costs on SST-2's six label-skewed clients with MiniLM: epsilon 3 and none, five strategies, head frozen.

    python -m benchmarks.sst2_private --model MINILM --sst2 sst2 --out sst2_private.json

MINILM is made by `python -m benchmarks.models minilm MINILM`, sst2 has client_*.jsonl and val.jsonl; every strategy is
in sst2_strategies.toml. Each of the five has the same grid of learning rates and, where it is private, of clips, up to
the rate from which its loss rises; the pair with the lowest mean of the clients' losses on examples that they hold out
is shown, with its accuracy on val.jsonl after the last round. Plain SGD, under which FedSVD and FFA-LoRA with an
orthonormal A are one process from the second round on. Noise comes from the seed, so that the table can be made again:
these runs are NOT PRIVATE, and the choice of rate and clip would not be if they were. Runs that are in the file already
are not repeated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from benchmarks import federations
from benchmarks.federations import SST2, Place, carry_out, check_only, config_of, outcome
from benchmarks.sweep import Results, sweep
from benchmarks.tables import markdown, percent, starred
from fedlora.errors import FedloraError

RATES = (1.0, 3.0, 9.0)
CLIPS = (1.0, 3.0)
EPSILON = 3.0
OWN = 120  # examples at most, of those that a client holds out
SETTINGS: Mapping[str, Any] = {
    "data.holdout": 0.05,
    "model.head": "frozen",
    "model.head_scale": 10.0,  # a smaller head asks the frozen model for larger changes
    "lora.targets": [f"layer.{i}.attention.self.{name}" for i in (4, 5) for name in ("query", "value")],
    "rounds": 15,
    "train.optimizer": "sgd",
    "train.schedule": "linear",
    "train.steps": 2,
    "train.batch_size": 16,
    "train.accumulate": 4,
    "server.eval_every": 15,
}


@dataclass(frozen=True)
class Line:
    """A strategy with its options, private or not."""

    name: str
    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    epsilon: float | None = None

    @property
    def key(self) -> str:
        return f"{self.name}, {'none' if self.epsilon is None else f'epsilon {self.epsilon:g}'}"


@dataclass(frozen=True)
class PrivateRun:
    """One run of the grid."""

    of_line: Line
    lr: float
    clip: float

    @property
    def line(self) -> str:
        return self.of_line.key

    @property
    def name(self) -> str:
        return f"{self.lr:g}" if self.of_line.epsilon is None else f"{self.lr:g}, clip {self.clip:g}"


STRATEGIES = (
    Line("FedIT", "fedavg"),
    Line("FFA-LoRA, A by Kaiming", "ffa_lora"),
    Line("FFA-LoRA, A orthonormal", "ffa_lora", {"option.orthonormal": True}),
    Line("FedSVD", "fedsvd"),
    Line("FedEx-LoRA", "fedex_lora"),
)


def lines(only: Sequence[str] = ()) -> list[Line]:
    """Every strategy without privacy and with it; of these those whose strategy is named."""
    check_only(only, {line.strategy for line in STRATEGIES})
    chosen = [line for line in STRATEGIES if not only or line.strategy in only]
    return [replace(line, epsilon=epsilon) for line in chosen for epsilon in (None, EPSILON)]


def grid(line: Line) -> Iterator[PrivateRun]:
    """Yield a run for every rate; for a private line, one for every rate and clip."""
    for lr in RATES:
        for clip in CLIPS if line.epsilon else (0.0,):
            yield PrivateRun(line, lr, clip)


def ready(chosen: Sequence[Line], results: Results) -> Iterator[PrivateRun]:
    """Yield the runs that are not done, one rate after another, but none for a line whose loss rose with the rate."""
    for lr in RATES:
        for line in chosen:
            done = results.get(line.key, {})
            if not rose(done, lr):
                yield from _untried(line, lr, done)


def _untried(line: Line, lr: float, done: Mapping[str, Any]) -> list[PrivateRun]:
    return [run for run in grid(line) if run.lr == lr and run.name not in done]


def rose(done: Mapping[str, Mapping[str, Any]], lr: float) -> bool:
    """Was the lowest loss of any clip already higher at one rate below this than at the rate before that?"""
    losses: dict[float, list[float]] = {}
    for run in _succeeded(done):
        losses.setdefault(run["lr"], []).append(run["own"]["loss"])
    lowest = [min(losses[rate]) for rate in sorted(losses) if rate < lr]
    return any(after > before for before, after in pairwise(lowest))


def _succeeded(done: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [run for run in done.values() if "own" in run]


def measure(place: Place, run: PrivateRun) -> dict[str, Any]:
    """Do one run in this process, and return its record."""
    private = {"dp.epsilon": run.of_line.epsilon, "dp.clip": run.clip, "dp.seeded": True, "dp.metrics": True}
    chosen = {"strategy": run.of_line.strategy, "train.lr": run.lr, **(private if run.of_line.epsilon else {})}
    config = config_of(place, SST2, SETTINGS, chosen, run.of_line.options)
    return {"lr": run.lr, "clip": run.clip, **carry_out(place, SST2, config, most=OWN)}


def best(done: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The run with the lowest mean of the clients' losses; none where all failed."""
    return min(_succeeded(done), key=lambda run: (run["own"]["loss"], run["lr"], run["clip"]), default=None)


COLUMNS = ("strategy", "epsilon", "rate", "clip", "val, last round", "clients' own", "loss", "sigma", "spent")


def table(chosen: Sequence[Line], results: Results) -> str:
    """The chosen runs in Markdown; a star where a better rate may lie beyond the grid."""
    return markdown(COLUMNS, [_row(line, best(results.get(line.key, {}))) for line in chosen])


def _row(line: Line, run: Mapping[str, Any] | None) -> tuple[str, ...]:
    if run is None:
        return (line.name, "not run", *[""] * (len(COLUMNS) - 2))
    last = run["rounds"][-1]
    return (
        line.name,
        "none" if line.epsilon is None else f"{line.epsilon:g}",
        starred(run["lr"], RATES),
        f"{run['clip']:g}" if line.epsilon else "",
        percent(last["eval"]["accuracy"]),
        percent(run["own"]["mean"]),
        f"{run['own']['loss']:.4f}",
        *_privacy(run.get("noise", ()), last),
    )


def _privacy(noise: Sequence[float], last: Mapping[str, Any]) -> tuple[str, str]:
    """The range of the clients' noise multipliers, and the epsilon that was spent; empty without privacy."""
    return (f"{min(noise):.2f} to {max(noise):.2f}", f"{last['epsilon']:.2f}") if noise else ("", "")


def _settings(place: Place) -> dict[str, Any]:
    """The settings that all results of a file have in common, whatever the paths of model and data."""
    grid = {"rates": RATES, "clips": CLIPS, "epsilon": EPSILON, "own": OWN, "smoke": place.smoke}
    return {"file": SST2.toml.name, **SETTINGS, **grid}


def _said(run: PrivateRun, done: Mapping[str, Any]) -> str:
    return f"{run.line} at {run.name}: {outcome(done)}"


def main() -> None:
    """Parse, run, print."""
    given = federations.parser(__doc__ or "").parse_args()
    try:
        with federations.place_of(given) as place:
            chosen, file = lines(federations.named(given)), (given.out, _settings(place))
            results = sweep(partial(ready, chosen), partial(measure, place), _said, file, given.jobs)
    except FedloraError as e:
        raise SystemExit(str(e)) from e
    print(table(chosen, results))


if __name__ == "__main__":
    main()
