"""Runs of every task from files: they learn, and deliver what was evaluated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fedlora import simulate
from fedlora.config import build
from fedlora.errors import ConfigError, DataError
from fedlora.lora import LoRA
from fedlora.models.peft_files import load_adapter
from fedlora.run.agreement import agreement_for_clients
from fedlora.run.directory import RunDirectory
from fedlora.run.setup import for_client, for_server, prepare
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


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shapes(lora: LoRA) -> list[tuple[str, str, torch.Size]]:
    return [(side, module, t.shape) for side, module, t in lora.matrices()]


DEPLOYED: dict[str, dict[str, Any]] = {  # what a server without data says of them, and a client of its own
    "regression": {"model.task": "regression"},
    "multilabel": {"model.task": "multilabel", "data.labels": "a, b, c"},
    "seq2seq": {"model.task": "seq2seq"},
}


@pytest.mark.parametrize("task", DEPLOYED)
def test_a_server_without_data_and_a_client_have_the_same_model(
    task: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    row, kind, _ = TASKS[task]
    data = write(tmp_path / "rows.jsonl", [row(i) for i in range(12)])
    said = DEPLOYED[task] | {"model.path": str(folders[kind])}
    server = for_server(build({"clients": 2, "rounds": 1, **said}), 2)
    mine = {key: value for key, value in said.items() if key != "model.task"} | {"data.path": str(data)}
    party = for_client(agreement_for_clients(server).settings, mine, 0)
    assert party.model.objective == server.model.objective
    assert shapes(party.model.get_adapter()) == shapes(server.start)
    assert party.client_data.train


def test_a_clients_whole_numbers_are_numbers_where_the_run_is_a_regression(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A server that finds fractions in its own data says so: a client could take its own for classes."""
    rows = write(tmp_path / "eval.jsonl", [regression(i) for i in range(8)])
    said = {"model.path": str(folders["bert"]), "clients": 2, "rounds": 1}
    server = for_server(build(said, {"data.eval": str(rows)}), 2)
    whole = write(tmp_path / "whole.jsonl", [{"text": "w1", "label": i % 3} for i in range(6)])
    mine = {"model.path": str(folders["bert"]), "data.path": str(whole)}
    party = for_client(agreement_for_clients(server).settings, mine, 0)
    assert party.model.schema.target == "number"
    assert [float(e["labels"]) for e in party.client_data.train] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("task", "what"), [("regression", "numbers"), ("multilabel", "several labels")])
def test_rows_without_one_class_are_not_dealt_by_class(
    task: str, what: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    row, kind, _ = TASKS[task]
    data = write(tmp_path / "rows.jsonl", [row(i) for i in range(12)])
    with pytest.raises(ConfigError, match=f'"label" holds {what}; choose iid, size or natural:COLUMN'):
        prepare(build({"model.path": str(folders[kind]), "data.path": str(data), "data.partition": "dirichlet:1"}))


def test_an_evaluation_in_columns_of_0_and_1_is_that_of_lists(folders: dict[str, Path], tmp_path: Path) -> None:
    """Jigsaw's form, a column for each label, beside the same rows with lists of names."""
    lists = [several_labels(i) for i in range(16)]
    flags = [{"text": row["text"]} | {name: int(name in row["label"]) for name in "abc"} for row in lists]
    given = {"model.path": str(folders["bert"]), "clients": 2, "data.labels": "a, b, c"}
    wide = {"data.path": str(write(tmp_path / "wide.jsonl", flags)), "data.eval": str(tmp_path / "wide.jsonl")}
    long = {"data.path": str(write(tmp_path / "long.jsonl", lists)), "data.eval": str(tmp_path / "long.jsonl")}
    one, other = (prepare(build(given, form)).evaluation for form in (wide, long))
    assert [e["labels"].tolist() for e in one] == [e["labels"].tolist() for e in other]


def test_a_class_that_no_training_row_has_is_refused_among_several_labels(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [several_labels(i) for i in range(16)])
    other = write(tmp_path / "eval.jsonl", [{"text": "w1", "label": ["a", "d"]}])
    given = {"model.path": str(folders["bert"]), "data.path": str(data), "data.eval": str(other), "clients": 2}
    with pytest.raises(DataError, match=r'eval\.jsonl line 1: label "d" is no class of the training data'):
        prepare(build(given))


def test_the_clients_scores_of_a_regression_are_told_without_its_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [regression(i) for i in range(40)])
    settings = {"rounds": 1, "clients": 2, "cohort": 2, "data.holdout": 0.3, "strategy": "fedsa_lora"}
    done = simulate(settings, model=folders["bert"], data=data, out=tmp_path / "out", progress=False)
    assert done.rounds[-1]["eval_clients"]["metric"] == "mse"
    told = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert told["data"]["numbers"][0] == -1 and told["data"]["numbers"][2] == 2 and not told["data"]["classes"]


def test_findings_in_a_column_of_text_are_several_labels_of_an_image(tmp_path: Path) -> None:
    """The form of public chest X-rays: a file's name, and findings between bars."""
    findings = ["Effusion|Mass", "Mass", "No Finding", "Effusion"]
    for i in range(4):
        Image.new("L", (9, 7), 40 * i).save(tmp_path / f"{i}.png")
    rows = [{"file": str(tmp_path / f"{i}.png"), "found": findings[i]} for i in range(4)]
    data = {"data.image": "file", "data.label": "found", "data.label_separator": "|", "data.eval_share": 0.0}
    files = {
        "data.path": str(write(tmp_path / "rows.jsonl", rows)),
        "model.path": str(models.make("vit", tmp_path / "m")),
    }
    setup = prepare(build(data | files | {"clients": 1}))
    assert setup.config.data.labels == ("Effusion", "Mass", "No Finding")
    assert {tuple(e["labels"].tolist()) for e in setup.clients_data[0].train} == {
        (1, 1, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1, 0, 0),
    }
