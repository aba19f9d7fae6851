"""A fine-tuned classifier keeps the order of its own classes."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForSequenceClassification

from fedlora.data.schema import Schema
from fedlora.models.class_order import in_checkpoint_order
from fedlora.models.model import Model
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import tokenizer

NAMES = ("contradiction", "neutral", "entailment")
JOINED = "contradiction, neutral, entailment"
SMALL = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}


def folder(tmp_path: Path, names: tuple[str, ...] = NAMES) -> Path:
    torch.manual_seed(0)
    id2label = dict(enumerate(names))
    net = LlamaForSequenceClassification(
        LlamaConfig(**SMALL, pad_token_id=0, id2label=id2label, label2id={v: k for k, v in id2label.items()})
    )
    net.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def model(path: Path, *labels: str) -> Model:
    return Model(ModelConfig(path=str(path)), LoRAConfig(rank=2), Schema("label", ("text", "label"), labels), seed=0)


def test_a_run_may_keep_the_order_of_its_data(tmp_path: Path) -> None:
    """As a run does that is older than this order."""
    config = ModelConfig(path=str(folder(tmp_path)), class_order="data")
    schema = Schema("label", ("text", "label"), tuple(sorted(NAMES)))
    assert in_checkpoint_order(config, schema).class_order == tuple(sorted(NAMES))


@pytest.mark.parametrize("spelled", [str, str.upper, str.title, lambda name: f"{name} "])
def test_names_in_another_order_and_spelling_are_the_checkpoints_outputs(
    tmp_path: Path, spelled: Callable[[str], str]
) -> None:
    mine = [spelled(name) for name in NAMES]
    built = model(folder(tmp_path), *sorted(mine))
    assert built.schema.class_order == tuple(mine)
    assert {int(e["labels"]): name for name in mine for e in built.encoder([{"text": "w1", "label": name}])} == dict(
        enumerate(mine)
    )
    assert built.net.config.id2label == dict(enumerate(mine))


def test_a_number_in_the_data_is_the_place_among_the_labels_of_the_data(tmp_path: Path) -> None:
    """Whoever sets data.labels says by it what 0, 1 and 2 stand for."""
    built = model(folder(tmp_path), *sorted(NAMES))
    (example,) = built.encoder([{"text": "w1", "label": 1}])
    assert sorted(NAMES)[1] == "entailment"
    assert int(example["labels"]) == NAMES.index("entailment")


@pytest.mark.parametrize("labels", [("no", "yes", "maybe"), ("entailment", "neutral"), ("0", "1", "2")])
def test_other_names_than_the_checkpoints_keep_the_order_of_the_data(tmp_path: Path, labels: tuple[str, ...]) -> None:
    assert model(folder(tmp_path), *labels).schema.class_order == labels


def test_what_becomes_of_the_checkpoints_head_is_told(tmp_path: Path) -> None:
    path = folder(tmp_path)
    assert model(path, *NAMES).notes == ()
    assert model(path, *sorted(NAMES)).notes == (f"the checkpoint's own order of these classes is kept: {JOINED}",)
    assert "was for contradiction" in model(path, "ham", "spam", "eggs").notes[0]
    assert "a new one is learned" in model(path, "ham", "spam").notes[0]
    assert model(folder(tmp_path / "unnamed", ("LABEL_0", "LABEL_1")), "ham", "spam").notes == ()


words = st.text("abcdefgh", min_size=1, max_size=4)
spellings = st.sampled_from([str, str.upper, str.title, "_{}".format, "{}-".format, " {} ".format])


@settings(max_examples=60, deadline=None)
@given(names=st.lists(words, min_size=2, max_size=6, unique=True), spelled=spellings, data=st.data())
def test_whatever_the_names_a_class_is_the_output_that_the_checkpoint_calls_so(
    names: list[str], spelled: Callable[[str], str], data: st.DataObject
) -> None:
    """By its name, and by its place among the labels of the data; without weights, as the configuration has it all."""
    labels = data.draw(st.permutations([spelled(name) for name in names]))
    with TemporaryDirectory() as place:
        config = {"model_type": "bert", "id2label": dict(enumerate(names))}
        (Path(place) / "config.json").write_text(json.dumps(config))
        schema = in_checkpoint_order(ModelConfig(path=place), Schema("label", ("text", "label"), tuple(labels)))
    numbers = schema.classes()
    assert [numbers[spelled(name)] for name in names] == [*range(len(names))]
    assert [numbers[str(i)] for i in range(len(labels))] == [numbers[label] for label in labels]
    assert schema.class_order == tuple(map(spelled, names))
