"""A head learns a number or several labels, by transformers' own losses, and is the same where it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from fedlora.data.schema import Schema
from fedlora.models.model import Model
from fedlora.models.peft_files import load_adapter, save_peft
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import make, random_adapter

NAMES = ("joy", "anger", "fear")
SCHEMAS = {
    "regression": Schema("label", ("text", "label"), target="number"),
    "several labels": Schema("label", ("text", "label"), NAMES, target="labels"),
}
TEXTS = ["w1 w2", "w3 w4 w5 w6", "w7", "w8 w9 w10"]
VALUES: dict[str, list[Any]] = {"regression": [0.5, "-1.25", 3, 2.0], "several labels": [["joy"], [], NAMES, ["fear"]]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in ("bert", "llama-cls")}


def build(folder: Path, task: str) -> Model:
    return Model(ModelConfig(path=str(folder)), LoRAConfig(rank=3), SCHEMAS[task], seed=1)


def rows(task: str) -> list[dict[str, Any]]:
    return [{"text": text, "label": value} for text, value in zip(TEXTS, VALUES[task], strict=True)]


@pytest.mark.parametrize("kind", ["bert", "llama-cls"])
@pytest.mark.parametrize("task", SCHEMAS)
def test_the_loss_is_the_one_that_transformers_has_for_the_task(folders: dict[str, Path], kind: str, task: str) -> None:
    model = build(folders[kind], task)
    batch = model.encoder.collate(model.encoder(rows(task)))
    model.net.eval()
    with torch.no_grad():
        wanted = float(model.net(**batch).loss)  # the mean over the batch
        got = model.losses(batch)
    assert float(got.mean()) == pytest.approx(wanted, rel=1e-5)
    assert model.metrics(model.encoder(rows(task))).values()["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("task", SCHEMAS)
def test_the_delivered_adapter_gives_the_trained_scores(folders: dict[str, Path], task: str, tmp_path: Path) -> None:
    model = build(folders["bert"], task)
    model.set_adapter(random_adapter(model, 1))
    batch = model.encoder.collate(model.encoder(rows(task)))
    model.net.eval()
    wanted = model.net(**batch).logits
    save_peft(model, model.get_adapter(), tmp_path / "adapter")
    fresh = load_adapter(ModelConfig(path=str(folders["bert"])), SCHEMAS[task], tmp_path / "adapter").eval()
    assert_close(fresh(**batch).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("task", "classes"), [("regression", 1), ("several labels", 3)])
def test_a_merged_model_is_loaded_by_others_for_the_same_task(
    folders: dict[str, Path], task: str, classes: int, tmp_path: Path
) -> None:
    net: Any = build(folders["bert"], task).net
    net.merge_and_unload().save_pretrained(tmp_path)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(str(tmp_path))
    problems = {"regression": "regression", "several labels": "multi_label_classification"}
    assert (loaded.config.num_labels, loaded.config.problem_type) == (classes, problems[task])


def test_several_labels_are_counted_where_their_scores_are_above_zero(folders: dict[str, Path]) -> None:
    model = build(folders["bert"], "several labels")
    examples = model.encoder(rows("several labels"))
    with torch.no_grad():
        scores, truth = model.logits(model.encoder.collate(examples))
    got = model.metrics(examples)
    guess = scores > 0
    assert got.label_counts is not None
    assert got.label_counts[:, 0].tolist() == (guess & (truth > 0)).sum(0).tolist()
    assert got.correct == int((guess == (truth > 0)).all(1).sum())


@pytest.mark.parametrize("task", SCHEMAS)
def test_a_row_of_a_head_asks_for_one_prediction(folders: dict[str, Path], task: str) -> None:
    encoded = build(folders["bert"], task).encoder.encoded(rows(task))
    assert [row.learned for row in encoded] == [1] * len(TEXTS)
