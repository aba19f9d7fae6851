"""Preferences are learned by DPO: the loss is the paper's and TRL's, against the base without the adapter."""

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from fedlora import simulate
from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Example
from fedlora.errors import ModelError
from fedlora.models.behaviour import encoder_for
from fedlora.models.model import Model
from fedlora.models.peft_files import save_peft
from fedlora.privacy.per_sample_gradients import LoopedGradients, OnePassGradients
from fedlora.run.export import export
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import make, random_adapter, tokenizer

PREFERENCE = Schema("preference", ("prompt", "chosen", "rejected"))
ROWS = [
    {"prompt": "w1 w2 w3", "chosen": "w4 w5", "rejected": "w6 w7 w8"},
    {"prompt": "w9", "chosen": "w4 w4 w5 w10", "rejected": "w11"},
    {"prompt": "w12 w13", "chosen": "w14 w15 w4", "rejected": "w15 w16 w17"},
]
BETA = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(folder: Path) -> Model:
    config = ModelConfig(path=str(folder), dpo_beta=BETA, device="cpu", max_length=24)
    return Model(config, LoRAConfig(rank=3), PREFERENCE, seed=1)


def moved(model: Model) -> None:
    model.set_adapter(random_adapter(model, 4), (random_adapter(model, 5),))


@torch.no_grad()
def log_probability(net: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Of the learned tokens of one row, one after another."""
    scores = net.eval()(ids[None]).logits[0].log_softmax(-1)
    return torch.stack([scores[i - 1, ids[i]] for i in range(1, len(ids)) if labels[i] != -100]).sum()


def gained(net: Any, base: Any, example: Example, prefix: str) -> Tensor:
    ids, labels = example[f"{prefix}input_ids"], example[f"{prefix}labels"]
    return log_probability(net, ids, labels) - log_probability(base, ids, labels)


def test_the_loss_is_the_papers(model: Model, folder: Path) -> None:
    """By plain transformers, row by row, with the trained model and with the base as it lies in its folder."""
    examples = model.encoder(ROWS)
    moved(model)
    base = AutoModelForCausalLM.from_pretrained(folder)
    pairs = [(gained(model.net, base, e, ""), gained(model.net, base, e, "rejected_")) for e in examples]
    wanted = torch.stack([-F.logsigmoid(BETA * (chosen - rejected)) for chosen, rejected in pairs])
    assert_close(model.losses(model.encoder.collate(examples)).detach(), wanted, rtol=1e-4, atol=1e-5)
    told = model.metrics(examples).values()
    assert told["loss"] == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert told["margin"] == pytest.approx(float(BETA * sum(c - r for c, r in pairs) / len(pairs)), rel=1e-3)
    assert told["accuracy"] == pytest.approx(sum(bool(c > r) for c, r in pairs) / len(pairs))


@pytest.mark.optional_library("trl")
def test_the_loss_is_trls_on_the_same_batch(model: Model, folder: Path, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    examples = model.encoder(ROWS)
    adapter = random_adapter(model, 4)
    model.set_adapter(adapter)
    save_peft(model, adapter, tmp_path / "adapter")
    bare = AutoModelForCausalLM.from_pretrained(folder)
    trained = PeftModel.from_pretrained(bare, str(tmp_path / "adapter")).merge_and_unload()
    trainer = trl.DPOTrainer(
        model=trained,
        ref_model=AutoModelForCausalLM.from_pretrained(folder),
        args=trl.DPOConfig(output_dir=str(tmp_path), beta=BETA, use_cpu=True, report_to=[], bf16=False),
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator([as_trl(e) for e in examples]))
    assert_close(model.losses(model.encoder.collate(examples)).mean(), theirs, rtol=1e-4, atol=1e-5)


def as_trl(example: Example) -> dict[str, list[int]]:
    start = int((example["labels"] == -100).sum())
    ids, other = example["input_ids"].tolist(), example["rejected_input_ids"].tolist()
    return {"prompt_ids": ids[:start], "chosen_ids": ids[start:], "rejected_ids": other[start:]}


def test_the_reference_is_the_base_whatever_the_run_has_come_to(model: Model) -> None:
    """Encoding in the middle of a run gives the same numbers, and leaves the model as it was."""
    before = model.encoder(ROWS)
    moved(model)
    model.set_trainable("B")
    trainable = [p.requires_grad for p in model.net.parameters()]
    losses = model.losses(model.encoder.collate(before))
    again = model.encoder(ROWS)
    assert_close([e["reference"] for e in again], [e["reference"] for e in before], rtol=0, atol=0)
    assert_close(model.losses(model.encoder.collate(before)), losses, rtol=0, atol=0)
    assert [p.requires_grad for p in model.net.parameters()] == trainable


def test_a_model_that_has_learned_nothing_loses_log_two_and_prefers_neither(model: Model) -> None:
    told = model.metrics(model.encoder(ROWS)).values()
    assert told["loss"] == pytest.approx(log(2), abs=1e-5) and told["margin"] == pytest.approx(0, abs=1e-5)
    assert told["accuracy"] == 0.5


def test_both_answers_of_a_pair_are_one_example_to_a_private_client(model: Model) -> None:
    """One pass over both rows gives the gradient that the pair has alone."""
    examples = model.encoder(ROWS)
    moved(model)
    parameters = model.set_trainable("AB")
    with OnePassGradients(model, parameters) as gradients:
        got = gradients(examples)
    with LoopedGradients(model, parameters) as gradients:
        assert_close(got, gradients(examples), rtol=1e-3, atol=1e-5)


def test_both_answers_keep_the_same_end_of_a_long_prompt(model: Model) -> None:
    row = {"prompt": " ".join(f"w{i}" for i in range(40)), "chosen": "w1", "rejected": "w2 w3 w4 w5"}
    [example] = model.encoder([row])
    start = int((example["labels"] == -100).sum())
    assert start == int((example["rejected_labels"] == -100).sum()) and len(example["rejected_input_ids"]) == 24
    assert torch.equal(example["input_ids"][:start], example["rejected_input_ids"][:start])


def test_answers_that_are_alike_teach_nothing(model: Model) -> None:
    alike = {"prompt": "w1", "chosen": "w2", "rejected": "w2"}
    assert [len(examples) for examples in model.encoder.by_row([alike, ROWS[0]])] == [0, 1]


def test_a_model_that_padding_changes_is_refused(model: Model) -> None:
    hook = model.net.get_submodule("base_model.model.model.norm").register_forward_hook(
        lambda _m, _x, y: y * y.shape[1]
    )
    with pytest.raises(ModelError, match="the two answers of a preference, which are asked together, differ in length"):
        encoder_for(model.net, model.encoder)
    hook.remove()


@pytest.mark.parametrize(
    "settings",
    [{"strategy": "fedex_lora"}, {"strategy": "fedsa_lora"}, {"strategy": "ffa_lora", "dp.noise": 0.1}],
    ids=["offset", "kept", "private"],
)
def test_a_federation_learns_what_is_preferred(folder: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i % 9}", "chosen": "w20 w21", "rejected": f"w{30 + i % 5} w22"} for i in range(48)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = simulate(
        model=folder,
        data=tmp_path / "rows.jsonl",
        out=tmp_path / "run",
        clients=2,
        cohort=2,
        rounds=3,
        progress=False,
        **{"lora.rank": 2, "train.lr": 0.02, "train.batch_size": 4, "data.holdout": 0.2, "dp.metrics": True},
        **settings,
    )
    if settings["strategy"] != "fedsa_lora":  # whose common model has the B of the start
        assert run.evaluation["margin"] > 0.03 and run.evaluation["loss"] < run.before["loss"] - 0.01
    assert run.rounds[-1]["eval_clients"]["metric"] == "accuracy"
    export(run.folder, "adapter")
