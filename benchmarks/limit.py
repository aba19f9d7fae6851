"""How near training comes to the machine's matrix rate, and where the rest of the time goes.

    python -m benchmarks.limit --model MINILM --data banking77/train.csv [--clients 50 --json benchmarks/limit.json]

A round of one step of 8 for every client, serial and stacked, alternately. Useful are the operations of every example
alone, without padding, as torch counts them in a serial step. The rate is that of all products of the frozen base,
forward and backward, at the rows that a micro-batch has and in the run's number type, with every layer's own weights.
The share is useful operations over time and rate. On a CPU time is CPU time of one thread, which neighbours change
little. A profile of one round of each engine is kept in the file. `--smoke` does it with a tiny model of its own, and
checks that both engines come to the same updates.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import smoke
from benchmarks.process_usage import machine
from benchmarks.tables import markdown
from fedlora import config as configuration
from fedlora.client import training
from fedlora.client.stacked import cohort
from fedlora.client.training import TrainingTask
from fedlora.encoding.encoder import Example
from fedlora.lora import LoRA, difference, euclidean_norm
from fedlora.models.model import Model
from fedlora.run.compose import compose
from fedlora.run.setup import RunSetup, mute_transformers, prepare

Train = Callable[[Model, Sequence[TrainingTask]], Sequence[Any]]
BLOCK = 1024  # rows of the products whose rate is measured: those of a micro-batch, about
PARTS = {  # of the profile, by words in torch's names of operations; the first that fits
    "products": ("addmm", "::mm", "linear", "mkldnn", "grouped_mm"),
    "small products": ("bmm",),
    "attention": ("attention", "softmax"),
    "dropout": ("dropout", "bernoulli", "random_"),
    "activations": ("gelu", "silu", "tanh"),
    "norms": ("norm",),
    "copies": ("copy", "clone", "cat", "index", "gather", "fill", "zero", "empty", "embedding"),
    "sums and multiples": ("add", "mul", "div", "sub", "sum", "where", "masked"),
}


def serial(model: Model, tasks: Sequence[TrainingTask]) -> Sequence[Any]:
    """One client after another."""
    return [training.perform(model, task) for task in tasks]


ENGINES: Mapping[str, Train] = {"serial": serial, "stacked": cohort.train}
SETTINGS: Mapping[str, Any] = {
    "data.partition": "iid",
    "model.max_length": 64,
    "lora.targets": "query,value",
    "train.steps": 1,
    "train.batch_size": 8,
    "train.lr": 2e-3,
    "threads": 1,
}
SMOKE: Mapping[str, Any] = {"clients": 3, "cohort": 3, "train.optimizer": "sgd", "train.batch_size": 2}


def clock(device: torch.device) -> float:
    """Seconds: of this process's CPU time, or by the clock once a GPU has done all that it was given."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def tasks_of(setup: RunSetup) -> list[TrainingTask]:
    """The first round's training of every client."""
    strategy = compose(setup.config, setup.start, setup.ranks)
    state = strategy.init(setup.start)
    found = []
    for i, data in enumerate(setup.clients_data):
        job = strategy.client_init(state, data.client(i, setup.ranks[i]))
        job = replace(job, training=setup.config.train, seed=setup.config.seed, rounds=1)
        found.append(TrainingTask(client=i, job=job, kept=LoRA(), examples=data.train))
    return found


def seen(task: TrainingTask) -> list[Example]:
    """The examples that a task trains on, as often as it does."""
    chunks = training.chunks(len(task.examples), task.job.training, task.job, task.client)
    return [task.examples[i] for chunk in islice(chunks, task.job.training.steps) for i in chunk]


def useful_operations(model: Model, tasks: Sequence[TrainingTask]) -> int:
    """The floating-point operations of a serial step of every example alone, forward and backward, all together."""
    model.set_adapter(tasks[0].job.start)
    model.set_trainable(tasks[0].job.trains)
    model.begin_training()
    by_length: dict[int, int] = {}
    total = 0
    for example in (example for task in tasks for example in seen(task)):
        length = len(example["input_ids"])
        if length not in by_length:
            by_length[length] = _operations(model, example)
        total += by_length[length]
    return total


def _operations(model: Model, example: Example) -> int:
    with FlopCounterMode(display=False) as counter:
        model.loss(model.encoder.collate([example])).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


@torch.no_grad()
def matrix_rate(model: Model, rows: int = BLOCK) -> float:
    """Operations a second of all products of the frozen base, forward and backward, with so many rows each."""
    weights = base_weights(model)
    inputs, gradients = (_operands(weights, rows, side) for side in (1, 0))
    seconds = []
    for _ in range(5):
        began = clock(model.device)
        for weight in weights:
            nn.functional.linear(inputs[weight.shape[1]], weight)
            gradients[weight.shape[0]] @ weight
        seconds.append(clock(model.device) - began)
    return sum(4 * rows * w.numel() for w in weights) / median(seconds)


def base_weights(model: Model) -> list[torch.Tensor]:
    """The weights of the network's linear layers, without factors and narrow heads where there are larger ones."""
    weights = [module.weight for module in model.net.modules() if isinstance(module, nn.Linear)]
    return [weight for weight in weights if min(weight.shape) > 128] or weights


def _operands(weights: Sequence[torch.Tensor], rows: int, side: int) -> dict[int, torch.Tensor]:
    """A random matrix (rows, width) for every width that the weights have on one side."""
    like = weights[0]
    return {w.shape[side]: torch.randn(rows, w.shape[side], dtype=like.dtype, device=like.device) for w in weights}


@dataclass
class Measurement:
    """An engine's seconds for the tasks, one number a turn, and a profile."""

    seconds: list[float]
    parts: dict[str, float]  # of the profile: shares of the time
    operations: list[tuple[str, float, int]]  # that take longest: name, share, calls


def measure(model: Model, tasks: Sequence[TrainingTask], repeats: int) -> dict[str, Measurement]:
    """Every engine's time, in turns, once each has warmed up; and where it goes."""
    found = {name: Measurement([], *profiled(model, tasks, train)) for name, train in ENGINES.items()}
    for _ in range(repeats):
        for name, train in ENGINES.items():
            began = clock(model.device)
            train(model, tasks)
            found[name].seconds.append(clock(model.device) - began)
    return found


def profiled(
    model: Model, tasks: Sequence[TrainingTask], train: Train
) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Shares of the time by part and by operation; on a GPU of its own time."""
    train(model, tasks)
    on_gpu = model.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        train(model, tasks)
    times = [(e.key, e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count) for e in _events(found)]
    total = sum(seconds for _, seconds, _ in times)
    parts: Counter[str] = Counter()
    for name, seconds, _ in times:
        parts[part_of(name)] += seconds / total
    longest = sorted(times, key=lambda row: -row[1])[:25]
    return dict(parts.most_common()), [(name, seconds / total, count) for name, seconds, count in longest]


def _events(found: Any) -> Any:
    return found.key_averages()


@cache
def part_of(operation: str) -> str:
    """The part of the profile that an operation belongs to."""
    fitting = (part for part, words in PARTS.items() if any(word in operation.lower() for word in words))
    return next(fitting, "everything else")


def distance(model: Model, tasks: Sequence[TrainingTask]) -> float:
    """How far the engines' updates are apart, relative to what training changed: the largest of all clients."""
    stacked, reference = ([update.lora for update, _ in train(model, tasks)] for train in (ENGINES["stacked"], serial))
    pairs = zip(stacked, reference, tasks, strict=True)
    return max(euclidean_norm(difference(a, b)) / euclidean_norm(difference(b, task.job.start)) for a, b, task in pairs)


HEAD = ("", "CPU s: min, median, max", "against serial", "useful GFLOP/s", "of the rate", *PARTS, "everything else")


def table(found: Mapping[str, Measurement], operations: int, rate: float) -> str:
    """The engines in Markdown; parts of the profile in percent of the time."""
    return markdown(HEAD, [_row(name, found, operations, rate) for name in found])


def _row(name: str, found: Mapping[str, Measurement], operations: int, rate: float) -> tuple[str, ...]:
    this = found[name]
    speed = operations / median(this.seconds)
    ratio = median(a / b for a, b in zip(found["serial"].seconds, this.seconds, strict=True))
    return (
        name,
        f"{min(this.seconds):.2f}, {median(this.seconds):.2f}, {max(this.seconds):.2f}",
        f"{ratio:.2f}",
        f"{speed / 1e9:.0f}",
        f"{100 * speed / rate:.0f} %",
        *(f"{100 * this.parts.get(part, 0.0):.0f}" for part in HEAD[5:]),
    )


def main() -> None:
    """Parse, measure, print, write."""
    given = arguments()
    mute_transformers()
    with TemporaryDirectory() as folder:
        setup = prepare(settings_of(given, Path(folder)))
    tasks = tasks_of(setup)
    if given.smoke and not (apart := distance(setup.model, tasks)) <= 1e-4:
        raise SystemExit(f"the engines' updates are {apart:.1e} apart")
    operations, rate = useful_operations(setup.model, tasks), matrix_rate(setup.model)
    found = measure(setup.model, tasks, 1 if given.smoke else given.repeats)
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    print(f"{operations / 1e9:.0f} GFLOP of useful tokens; the base's products at {rate / 1e9:.0f} GFLOP/s")
    print(table(found, operations, rate))
    if given.json:
        about = {"machine": machine(), "operations": operations, "rate": rate, "settings": dict(SETTINGS)}
        given.json.write_text(json.dumps(about | {"engines": {k: vars(v) for k, v in found.items()}}, indent=1) + "\n")


def settings_of(given: argparse.Namespace, folder: Path) -> configuration.Config:
    """The run that is measured; in the small form with a model and data that are made in a folder."""
    named = {"model.path": given.model, "data.path": given.data, "clients": given.clients, "cohort": given.clients}
    if given.smoke:
        model, data = smoke.inputs("classify", folder)
        named |= {"model.path": model, "data.path": f"{data}/train.csv", **SMOKE}
    return configuration.build(SETTINGS, named, {"model.dtype": given.dtype, "lora.targets": given.targets})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of the model, as benchmarks.models writes it")
    parser.add_argument("--data", default="", help="file of the training rows")
    parser.add_argument("--targets", default="query,value", help="modules that are adapted")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="file for figures and profiles")
    parser.add_argument("--smoke", action="store_true", help="see in seconds that it runs and that engines agree")
    return parser.parse_args()


if __name__ == "__main__":
    main()
