"""The stacked engine gives serial's answer: for every client its own, whatever became of the others."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from fedlora.checks.small_models import small_model
from fedlora.client.policy import ClientPolicy
from fedlora.client.stacked import together
from fedlora.encoding.client_data import ClientData
from fedlora.errors import Failure
from fedlora.jobs import Job, PrivacyTerms, Update
from fedlora.lora import LoRA, map_factors
from fedlora.run.plan import Plan, RoundResult
from fedlora.sections import MessageConfig, SecureConfig, Training
from fedlora.server.rounds import Fleet, fit
from fedlora.simulations.serial import Serial
from fedlora.simulations.stacked import Stacked
from fedlora.strategies.dual import Dual
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedsa_lora import FedSALoRA
from fedlora.strategies.fslora import FSLoRA
from fedlora.strategy import Strategy
from tests.support.float64 import in_float64

SMALL = small_model("bert")
RANKS = (2, 2, 2)
PLAN = Plan(rounds=3, cohort=3, training=Training(lr=1e-2, batch_size=3))
TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=2, delta=1e-3, seeded=True)


def furthest(one: LoRA, other: LoRA) -> float:
    return max(float((t - other.side(s)[m]).abs().max()) for s, m, t in one.matrices())


def fleets(folder: Path) -> list[Fleet]:
    return [kind(SMALL.model, SMALL.clients, RANKS, folder / kind.__name__) for kind in (Serial, Stacked)]


def played(strategy: Strategy[Any], plan: Plan, folder: Path) -> list[list[RoundResult]]:
    """The rounds of either engine, in float64."""
    with in_float64(SMALL.model):
        start = map_factors(torch.Tensor.double, SMALL.start)
        return [list(fit(strategy, fleet, start, plan)) for fleet in fleets(folder)]


@pytest.mark.parametrize(
    ("strategy", "changed"),
    [
        (FedAvg(), {}),
        (FedSALoRA(), {"evaluate_clients": True}),  # what clients keep is on their disks, and goes on
        (Dual(), {"evaluate_clients": True}),  # and so are rows of the rank
        (FSLoRA(), {}),  # a sketch
        (FedAvg(), {"secure": SecureConfig(aggregation=True)}),
        (FSLoRA(), {"secure": SecureConfig(aggregation=True)}),
        (Dual(), {"secure": SecureConfig(aggregation=True)}),
    ],
    ids=["fedavg", "kept sides", "kept rows", "sketches", "masked", "masked sketches", "masked, with kept rows"],
)
def test_a_run_comes_to_what_serial_comes_to(strategy: Strategy[Any], changed: dict[str, Any], tmp_path: Path) -> None:
    serial, together = played(strategy, replace(PLAN, **changed), tmp_path)
    for one, other in zip(serial, together, strict=True):
        assert furthest(strategy.adapter(one.state), strategy.adapter(other.state)) < 1e-7
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-9)
        assert (one.bytes_up, one.bytes_down, one.asked) == (other.bytes_up, other.bytes_down, other.asked)
        assert one.eval_clients == pytest.approx(other.eval_clients)


def test_updates_travel_in_a_byte_with_what_is_left_over_kept(tmp_path: Path) -> None:
    """A rounding to 8 bits turns a difference of 1e-12 into one of a step here and there, but the mean stays near."""
    serial, together = played(FedAvg(), replace(PLAN, messages=MessageConfig(up="int8")), tmp_path)
    assert furthest(serial[-1].state, together[-1].state) < 1e-3
    assert [done.bytes_up for done in serial] == [done.bytes_up for done in together]
    assert all(list((tmp_path / "Stacked" / str(i)).glob("left-*")) for i in range(3))


def jobs(number: int = 3, **changed: Any) -> dict[int, Job]:
    job = Job(SMALL.start, training=PLAN.training, **changed)
    return dict.fromkeys(range(number), job)


def updates(fleet: Stacked, asked: dict[int, Job]) -> dict[int, Update]:
    answers = dict(fleet.train(asked))
    assert all(isinstance(answer, Update) for answer in answers.values()), answers
    return {i: answer for i, answer in answers.items() if isinstance(answer, Update)}


def test_blocks_of_any_size_come_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_float64(SMALL.model):
        whole = updates(Stacked(SMALL.model, SMALL.clients, RANKS, tmp_path / "a"), jobs())
        monkeypatch.setattr(together, "MOST_BYTES", 0)  # one client at a time
        each = updates(Stacked(SMALL.model, SMALL.clients, RANKS, tmp_path / "b"), jobs())
    assert max(furthest(whole[i].lora, each[i].lora) for i in whole) < 1e-7


def test_a_round_that_is_done_again_has_the_same_bits(tmp_path: Path) -> None:
    """With dropout and in float32, whatever was trained in between: a run that was killed ends as one that was not."""
    first = updates(Stacked(SMALL.model, SMALL.clients, RANKS, tmp_path / "a"), jobs(round=1, rounds=3))
    again = Stacked(SMALL.model, SMALL.clients, RANKS, tmp_path / "b")
    updates(again, jobs(2, seed=5))
    torch.manual_seed(99)
    second = updates(again, jobs(round=1, rounds=3))
    assert max(furthest(first[i].lora, second[i].lora) for i in first) == 0


def test_a_client_that_fails_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    """One has nothing to learn, one a start that is no number; each answer is told once."""
    told = list[int]()
    data = [*SMALL.clients, ClientData(SMALL.model.encoder, [])]
    asked = jobs(4)
    broken = {m: b + float("inf") for m, b in SMALL.start.B.items()}
    asked[1] = replace(asked[1], start=LoRA(B=broken).over(SMALL.start))
    with in_float64(SMALL.model):
        answers = dict(Stacked(SMALL.model, data, [2] * 4, tmp_path, told.append).train(asked))
        alone = updates(Stacked(SMALL.model, data, [2] * 4, tmp_path / "alone"), {i: asked[i] for i in (0, 2)})
    assert sorted(told) == [0, 1, 2, 3]
    assert isinstance(answers[1], Failure) and "the loss is nan" in answers[1].reason
    assert isinstance(answers[3], Failure) and "no examples to train on" in answers[3].reason
    for i in (0, 2):
        answer = answers[i]
        assert isinstance(answer, Update) and furthest(answer.lora, alone[i].lora) < 1e-7


def test_what_cannot_be_told_apart_is_trained_one_after_another_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = small_model("llama", "vera")
    fleet = Stacked(small.model, small.clients, RANKS, tmp_path)
    with caplog.at_level(logging.WARNING, "fedlora"):
        for t in range(2):
            updates(fleet, dict.fromkeys(range(3), Job(small.start, training=PLAN.training, round=t)))
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "one after another: lora.kind = vera" in said[0]


def private(folder: Path, data: Sequence[ClientData], **own: Any) -> tuple[Stacked, dict[int, Job]]:
    fleet = Stacked(SMALL.model, data, [2] * len(data), folder, policy=ClientPolicy(**own))
    return fleet, jobs(len(data), privacy=TERMS)


def test_private_jobs_are_charged_once_each(tmp_path: Path) -> None:
    fleet, asked = private(tmp_path, SMALL.clients)
    first = updates(fleet, asked)
    again = updates(fleet, asked)  # as after a crash of the server: each has the answer that it had
    assert all(u.spent is not None and u.spent.charges == 1 for u in (*first.values(), *again.values()))
    assert max(furthest(first[i].lora, again[i].lora) for i in first) == 0


def test_clients_of_one_ledger_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    """The second, whose records are the first one's, finds the ledger that the first has just charged."""
    same = [SMALL.clients[0], SMALL.clients[0]]
    fleet, asked = private(tmp_path / "state", same, ledgers=tmp_path / "ledgers")
    asked[1] = replace(asked[1], seed=1)
    assert [u.spent and u.spent.charges for u in updates(fleet, asked).values()] == [1, 2]


def test_a_ledger_by_two_names_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a site is two clients, and its folder lies there by either number."""
    monkeypatch.setattr("fedlora.client.ledger.file_lock", lambda path: FileLock(path, timeout=1))  # not for ever
    ledgers = tmp_path / "ledgers"
    (ledgers / "0").mkdir(parents=True)
    (ledgers / "1").symlink_to("0")
    fleet, asked = private(tmp_path / "state", [SMALL.clients[0], SMALL.clients[0]], ledgers=ledgers)
    asked[1] = replace(asked[1], seed=1)
    assert [u.spent and u.spent.charges for u in updates(fleet, asked).values()] == [1, 2]
