"""Training of many clients on a GPU: serial, stacked, and with the model built in every call, as plain apps do.

    bash benchmarks/gpu.sh                                  # or: python -m benchmarks.gpu --json gpu.json

A language model of Llama's architecture and 1.2 billion random weights, in bfloat16 and in four bits a weight; 50
clients of 8 rows of 16 tokens, and of 128, one step each. What is built in every call is measured with two clients.
Tokens a second, the share of the card's matrix rate at the base's own shapes (see benchmarks/limit.py), and the peak of
the card's memory. Whatever would begin after `--minutes` is left out and said to be. `--smoke` does it in seconds with
a tiny model on the CPU.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.limit import ENGINES, clock, matrix_rate, tasks_of, useful_operations
from benchmarks.process_usage import machine
from benchmarks.tables import markdown
from benchmarks.tiny_models import WORDS, tokenizer
from fedlora import config as configuration
from fedlora.client import training
from fedlora.client.training import TrainingTask
from fedlora.config import Config
from fedlora.models.model import Model
from fedlora.run.setup import RunSetup, mute_transformers, prepare

ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
LARGE = {  # the shape of Llama 3.2 1B
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS, BUILT = 8, 2  # rows of a client's step; clients for each of whom the model is built


@dataclass(frozen=True)
class Cell:
    """A line of the table: how the base is held, the tokens of a row, and the way of training."""

    base: str
    tokens: int
    way: str


def make_model(shape: Mapping[str, Any], folder: Path) -> Path:
    """Save a language model of Llama's architecture with random weights in bfloat16, and a tokenizer of 64 words."""
    import transformers

    auto: Any = transformers  # untyped
    config = auto.LlamaConfig(**ENDS, **shape)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        auto.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer(config).save_pretrained(folder)
    return folder


def write_texts(path: Path, count: int, words: int) -> None:
    """Texts of so many words, a row each."""
    with path.open("w", newline="", encoding="utf-8") as f:
        texts = (" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(words)) for i in range(count))
        csv.writer(f).writerows([("text",), *((text,) for text in texts)])


def setup_of(given: argparse.Namespace, folder: Path, base: str, tokens: int) -> RunSetup:
    """The model and the clients' examples: rows that are all of one length."""
    data = folder / f"{tokens}.csv"
    write_texts(data, given.clients * ROWS, words=tokens - 2)  # and a token at each end
    return prepare(config_of(given, base, tokens, str(folder / "model"), str(data)))


def config_of(given: argparse.Namespace, base: str, tokens: int, model: str, data: str) -> Config:
    """The settings of a run."""
    four_bits = {"model.quantize": "4bit"} if base == "four bits" else {}
    numbers = {"model.dtype": "float32" if given.smoke else "bfloat16"}
    named = {"model.path": model, "data.path": data, "clients": given.clients, "cohort": given.clients}
    shape = {"model.max_length": tokens, "data.partition": "iid", "data.eval_share": 0.0, "model.task": "lm"}
    work = {"train.steps": 1, "train.batch_size": ROWS, "lora.targets": "q_proj,v_proj"}
    return configuration.build(named, shape, work, numbers, four_bits)


def measure(given: argparse.Namespace, setup: RunSetup, cell: Cell) -> dict[str, float]:
    """What a cell comes to: the median of several rounds."""
    model, tasks = setup.model, tasks_of(setup)
    _forget_peak(model)
    if cell.way == "built in every call":
        tasks = tasks[:BUILT]
        seconds = [_built(setup.config, tasks, setup)]
    else:
        ENGINES[cell.way](model, tasks)
        seconds = [_timed(cell.way, model, tasks) for _ in range(1 if given.smoke else 3)]
    took = median(seconds)
    speed = useful_operations(model, tasks) / took
    share = speed / matrix_rate(model, rows=16 if given.smoke else 4096) if cell.base == "bfloat16" else float("nan")
    count = len(tasks) * ROWS * cell.tokens
    return {"seconds": took, "tokens a second": count / took, "share": share, "peak": _peak(model)}


def _timed(way: str, model: Model, tasks: Sequence[TrainingTask]) -> float:
    began = clock(model.device)
    ENGINES[way](model, tasks)
    return clock(model.device) - began


def _built(config: Config, tasks: Sequence[TrainingTask], setup: RunSetup) -> float:
    """Seconds of training with a model that is loaded for each task."""
    began = clock(setup.model.device)
    for task in tasks:
        training.perform(Model(config.model, config.lora, setup.data.schema, config.seed), task)
    return clock(setup.model.device) - began


def _forget_peak(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)


def _peak(model: Model) -> float:
    """Bytes of the card that were in use at once; not known of a CPU."""
    return float(torch.cuda.max_memory_allocated(model.device)) if model.device.type == "cuda" else float("nan")


def results(given: argparse.Namespace, folder: Path) -> Iterator[tuple[Cell, dict[str, float]]]:
    """Measure cell after cell, as long as there is time."""
    ends = time.monotonic() + 60 * given.minutes
    for base in bases():
        for tokens in (16, 128):
            setup = setup_of(given, folder, base, tokens)
            for way in ("stacked", "serial", "built in every call"):
                if time.monotonic() > ends:
                    print(f"no time left for {base}, {tokens} tokens, {way}")
                    continue
                cell = Cell(base, tokens, way)
                yield cell, measure(given, setup, cell)


def bases() -> list[str]:
    """How the base is held; in four bits only on a GPU, and where bitsandbytes is installed."""
    both = torch.cuda.is_available() and find_spec("bitsandbytes")
    return ["bfloat16", "four bits"] if both else ["bfloat16"]


HEAD = ("base", "tokens of a row", "way", "s a round", "tokens a second", "of the matrix rate", "peak memory")


def table(found: Mapping[Cell, Mapping[str, float]]) -> str:
    """All cells in Markdown."""
    return markdown(HEAD, [_row(cell, numbers) for cell, numbers in found.items()])


def _row(cell: Cell, numbers: Mapping[str, float]) -> tuple[str, ...]:
    speed, share, peak = numbers["tokens a second"], numbers["share"], numbers["peak"]
    known = "" if isnan(peak) else f"{peak / 1e9:.1f} GB"
    shown = (f"{numbers['seconds']:.3f}", f"{speed:,.0f}", "" if isnan(share) else f"{100 * share:.0f} %", known)
    return (cell.base, str(cell.tokens), cell.way, *shown)


def main() -> None:
    """Parse, measure, print, write."""
    given = arguments()
    mute_transformers()
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_model(TINY if given.smoke else LARGE, folder / "model")
        found = dict(results(given, folder))
    about = machine() | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    print(table(found))
    if given.json:
        cells = [{**vars(cell), **numbers} for cell, numbers in found.items()]
        given.json.write_text(json.dumps({"machine": about, "cells": cells}, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="after which nothing new is begun")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="see in seconds that it runs, on a CPU")
    given = parser.parse_args()
    if not given.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke sees that the benchmark runs")
    return given


if __name__ == "__main__":
    main()
