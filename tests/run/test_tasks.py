"""Runs of every task from files: they learn, and deliver what was evaluated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import simulate
from fedlora.config import build
from fedlora.models.peft_files import load_adapter
from fedlora.run.directory import RunDirectory
from fedlora.run.setup import prepare
from tests.support import encoder_decoders, models

Row = dict[str, Any]


def regression(i: int) -> Row:
    return {"text": f"w{i % 7} w{i // 7 + 10}", "label": (i % 7) / 2 - 1}


def several_labels(i: int) -> Row:
    there = [k for k in range(3) if i >> k & 1]
    return {"text": " ".join([f"w{i // 8 + 10}", *(f"w{k}" for k in there)]), "label": ["abc"[k] for k in there]}


def response(i: int) -> Row:
    return {"prompt": f"w{i % 7} w{i % 5}", "response": f"w{i % 5} w{i % 7}"}


TASKS: dict[str, tuple[Callable[[int], Row], str, set[str]]] = {
    "regression": (regression, "bert", {"loss", "mse", "pearson", "spearman"}),
    "multilabel": (several_labels, "bert", {"loss", "micro_f1", "macro_f1", "subset_accuracy"}),
    "seq2seq": (response, "t5", {"loss", "perplexity", "token_accuracy"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"bert": models.make, "t5": encoder_decoders.make}
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind, make in made.items()}


@pytest.mark.parametrize("strategy", ["fedavg", "fedex_lora"])
@pytest.mark.parametrize("task", TASKS)
def test_a_run_learns_and_delivers_what_was_evaluated(
    task: str, strategy: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    row, kind, figures = TASKS[task]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row(i)) + "\n" for i in range(60)))
    settings = {"rounds": 2, "clients": 3, "cohort": 3, "strategy": strategy, "train.lr": 0.01, "train.epochs": 4}
    done = simulate(settings, model=folders[kind], data=data, eval_data=data, out=tmp_path / "out", progress=False)
    assert done.evaluation.keys() == figures
    assert done.evaluation["loss"] < done.before["loss"]
    assert loss_of_the_adapter(done.adapter, tmp_path / "out") == pytest.approx(done.evaluation["loss"], rel=1e-4)


@torch.no_grad()
def loss_of_the_adapter(adapter: Path, run: Path) -> float:
    """The mean loss on the evaluation's rows of a fresh base with this adapter, which PEFT loads."""
    setup = prepare(build(RunDirectory(run).config()))
    net = load_adapter(setup.config.model, setup.model.schema, adapter).eval()
    batch = setup.model.encoder.collate(setup.evaluation)
    logits = net(**{name: t for name, t in batch.items() if name != "labels"}).logits
    losses = setup.model.objective.losses(*setup.model.objective.aligned(logits, batch))
    return float(losses.sum()) / setup.model.targets(setup.evaluation)
