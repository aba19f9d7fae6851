"""A loss, a regulariser and an optimizer of the user's own, in the training of one client and of many."""

from dataclasses import replace

import pytest
import torch

from fedlora.checks.small_models import small_model
from fedlora.client import training
from fedlora.client.stacked.support import why_not
from fedlora.config import build
from fedlora.errors import ConfigError, PrivacyError
from fedlora.jobs import Job, PrivacyTerms
from fedlora.lora import LoRA
from fedlora.models.optimizer import of_groups
from fedlora.privacy import preflight
from fedlora.run.own_code_checks import check_metric, check_training
from fedlora.sections import Training
from tests.support import own_training
from tests.support.cohorts import NOTHING, compared, double, filled, furthest, in_one_pass, one_by_one, rounds
from tests.support.float64 import in_float64
from tests.support.own_training import HERE

FAST = Training(lr=0.02, batch_size=3, epochs=2)
TERMS = PrivacyTerms(noise=0.5, clip=0.05, head_share=0.3, rate=0.5, steps=2, delta=1e-5, seeded=True)
OWN = {
    "a loss": replace(FAST, loss=f"{HERE}:focal"),
    "a regulariser": replace(FAST, regulariser=f"{HERE}:ridge"),
    "an optimizer": replace(FAST, optimizer=f"{HERE}:Lion", weight_decay=0.1, lora_plus=2.0, schedule="linear"),
    "an optimizer by the settings": replace(FAST, optimizer=f"{HERE}:by_settings", weight_decay=0.1),
    "all of them": replace(FAST, loss=f"{HERE}:focal", regulariser=f"{HERE}:ridge", optimizer=f"{HERE}:Lion"),
}
SAME = {
    "loss": (replace(FAST, loss=f"{HERE}:task_loss"), FAST),
    "regulariser": (replace(FAST, regulariser=f"{HERE}:near_the_start"), replace(FAST, prox=0.5)),
    "optimizer": (replace(FAST, optimizer="torch.optim:AdamW", weight_decay=0.1), replace(FAST, weight_decay=0.1)),
}


@pytest.mark.parametrize("privacy", [None, TERMS], ids=["plain", "private"])
@pytest.mark.parametrize("settings", OWN.values(), ids=list(OWN))
def test_many_clients_in_one_pass_train_by_it_as_each_does_alone(
    settings: Training, privacy: PrivacyTerms | None
) -> None:
    small = small_model("bert")
    starts = [filled(small.start, i) for i in range(3)]
    assert compared(small, [Job(start, training=settings, privacy=privacy) for start in starts]) < 1e-7


@pytest.mark.parametrize("train", [one_by_one, in_one_pass], ids=["serial", "stacked"])
@pytest.mark.parametrize(("own", "ours"), SAME.values(), ids=list(SAME))
def test_what_is_built_in_is_the_same_by_its_path(own: Training, ours: Training, train: object) -> None:
    small = small_model("llama")
    with in_float64(small.model):
        one, other = (rounds(small, [Job(NOTHING, training=t)] * 3, train, n=1) for t in (own, ours))  # type: ignore[arg-type]
    assert furthest(one, other) < 1e-9


def test_each_changes_what_is_trained() -> None:
    small = small_model("bert")
    start = double(small.start)
    with in_float64(small.model):
        ends = [rounds(small, [Job(start, training=t)] * 3, one_by_one, n=1) for t in (FAST, *OWN.values())]
    assert all(furthest(ends[0], end) > 1e-4 for end in ends[1:])


def test_clients_of_a_loss_that_mixes_targets_train_alone_and_private_ones_not_at_all() -> None:
    small = small_model("bert")
    job = Job(small.start, training=replace(FAST, loss=f"{HERE}:centred"))
    said = "centred gives a target another loss beside others than alone"
    assert said in str(why_not(small.model, job))
    assert training.train(small.model, job, 0, small.clients[0].train, LoRA())[0].loss is not None
    with pytest.raises(PrivacyError, match=said):
        preflight.check(small.model, replace(job, privacy=TERMS))
    assert why_not(small.model, replace(job, training=OWN["a loss"])) is None


def test_a_record_moves_a_private_sum_by_the_clip_whatever_the_loss() -> None:
    small = small_model("bert")
    job = Job(small.start, training=OWN["a loss"], privacy=replace(TERMS, engine="auto"))
    assert preflight.check(small.model, job).sensitivity <= 1.001


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train.loss": "nowhere_at_all:f"}, 'train.loss = "nowhere_at_all:f" could not be imported'),
        ({"train.loss": f"{HERE}:mean"}, "is to give a number for each target"),
        ({"train.loss": f"{HERE}:HERE"}, "is str, and no function"),
        ({"train.regulariser": f"{HERE}:vector"}, r"is to give one number as a tensor, and gave \(3,\)"),
        ({"train.regulariser": f"{HERE}:Lion"}, "Lion failed: "),
        ({"train.optimizer": f"{HERE}:nothing"}, "is to make a torch.optim.Optimizer of the groups that it is given"),
        ({"train.optimizer": "torch.optim:LBFGS"}, "LBFGS takes no step by itself: TypeError"),
        ({"train.optimizer": "torch.optim:SparseAdam"}, "SparseAdam takes no step by itself: RuntimeError"),
        ({"train.loss": "__main__:f", "engine": "flower"}, "could not be imported"),
        ({"eval.target_metric": "lab:accuracy"}, '"accuracy" is the name of a figure of the run'),
        ({"eval.target_metric": "nowhere_at_all:f"}, "could not be imported"),
    ],
)
def test_a_mistake_in_it_is_a_sentence_before_the_first_round(settings: dict[str, str], said: str) -> None:
    small = small_model("bert")
    with pytest.raises(ConfigError, match=said):
        check_metric(build(settings).eval.target_metric)
        check_training(small.model, small.start, build(settings))


def test_a_loss_that_mixes_targets_ends_a_private_run_before_it_begins() -> None:
    small = small_model("bert")
    config = build({"train.loss": f"{HERE}:centred", "dp.epsilon": 3.0})
    with pytest.raises(PrivacyError, match="so that no clip bounds what one record does"):
        check_training(small.model, small.start, config)
    check_training(small.model, small.start, build({"train.loss": f"{HERE}:centred"}))


@pytest.mark.parametrize("key", ["train.loss", "train.regulariser", "train.optimizer", "eval.target_metric"])
def test_what_is_no_path_is_refused_with_the_form(key: str) -> None:
    with pytest.raises(ConfigError, match=f'{key} = "lion": it is .*code of your own, as package.module:name'):
        build({key: "lion"})


def test_rates_of_sides_reach_an_optimizer_of_ones_own() -> None:
    p, q = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    made = of_groups(replace(FAST, optimizer=f"{HERE}:Lion", weight_decay=0.3), [(0.1, p), (0.4, q)])
    assert [(g["lr"], g["full_lr"], g["weight_decay"]) for g in made.param_groups] == [(0.1, 0.1, 0.3), (0.4, 0.4, 0.3)]
    assert isinstance(made, own_training.Lion)
