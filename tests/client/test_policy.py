"""What a client allows is its own to say, complete before it connects; nothing that a server names widens it."""

from pathlib import Path
from typing import Any

import pytest

from fedlora import config
from fedlora.checks.small_models import small_model
from fedlora.client.policy import ClientPolicy, client_policy
from fedlora.client.runner import JobRunner
from fedlora.encoding.client_data import ClientData
from fedlora.errors import LedgerError, PrivacyError
from fedlora.messages.agreement import RunAgreement, agreed_settings
from fedlora.sections import Training
from fedlora.strategy import Job

SMALL = small_model("gpt2")
TEXTS = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(12))} for i in range(30)]
HELD = [{"text": " ".join(f"w{(i + j) % 28}" for j in range(9))} for i in range(12)]


def agreement(**settings: Any) -> RunAgreement:
    flat = config.flatten(config.build({key.replace("__", "."): value for key, value in settings.items()}))
    plain = {key: ", ".join(value) if isinstance(value, list) else value for key, value in flat.items()}
    return RunAgreement(settings=agreed_settings(plain), trains="ABH", shares="ABH")


def policy(folder: Path, **mine: Any) -> ClientPolicy:
    return client_policy({key.replace("__", "."): value for key, value in mine.items()}, folder)


@pytest.mark.parametrize(
    ("mine", "theirs", "says"),
    [
        ({"dp__epsilon": 3.0}, {}, "no DP-SGD, and dp.epsilon or dp.noise is set here"),
        (
            {"data__path": "x.jsonl"},
            {"dp__epsilon": 3.0, "dp__unit": "example"},
            "privacy of each example, and dp.unit = row",
        ),
        ({"dp__epsilon": 3.0}, {"dp__epsilon": 3.0, "dp__metrics": True}, "the training loss"),
        ({"secure__aggregation": True}, {}, "updates without a mask"),
        ({"data__path": "x.jsonl"}, {"data__label": "ssn"}, "data.label = ssn, which is not set here"),
        ({"data__path": "x.jsonl"}, {"data__text": "note"}, "data.text = note, which is not set here"),
        ({"data__path": "x.jsonl"}, {"data__labels": "a,b"}, "the classes a, b, in this order, and here are none"),
        (
            {"data__path": "x.jsonl", "data__labels": "no,yes"},
            {"data__labels": "yes,no"},
            "the classes yes, no, in this order, and here are no, yes",
        ),
        ({}, {"model__path": "someone/backdoor"}, "the base model someone/backdoor: say --model"),
        (
            {"client__models": "lab/bert"},
            {"model__path": "lab/bert", "model__revision": "other"},
            "the base model lab/bert@other",
        ),
        ({}, {"train__loss": "os:system"}, "train.loss = os:system, which is not named in client.code here"),
        ({"client__code": "lab.*"}, {"train__optimizer": "laboratory:Lion"}, "train.optimizer = laboratory:Lion"),
        ({"client__code": "lab:f"}, {"train__regulariser": "lab:g"}, "train.regulariser = lab:g"),
    ],
)
def test_a_run_that_asks_for_what_was_not_allowed_is_refused_before_it_begins(
    mine: dict[str, Any], theirs: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError, match=says):
        policy(tmp_path, **mine).refuse_agreement(agreement(**theirs))


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({}, {}),
        ({"data__path": "x.jsonl", "data__text": "body"}, {"data__text": "note"}),  # its own column is the one it reads
        ({"data__path": "x.jsonl", "data__labels": "no,yes"}, {"data__labels": "no,yes"}),
        ({"data__path": "x.jsonl", "dp__unit": "example"}, {"dp__epsilon": 1.0, "dp__unit": "example"}),
        (
            {"dp__epsilon": 3.0},
            {"dp__epsilon": 3.0, "dp__unit": "example"},
        ),  # of the public text that comes with fedlora
        ({"model__path": "/models/bert"}, {"model__path": "local:bert"}),
        ({"client__models": "lab/*"}, {"model__path": "lab/bert"}),
        ({"client__code": "lab.losses:*, torch.optim:SGD"}, {"train__loss": "lab.losses:f"}),
        ({"dp__epsilon": 3.0}, {"dp__epsilon": 3.0, "data__holdout": 0.2, "dp__metrics": False}),
    ],
)
def test_a_run_that_asks_for_what_is_allowed_is_joined(
    mine: dict[str, Any], theirs: dict[str, Any], tmp_path: Path
) -> None:
    policy(tmp_path, **mine).refuse_agreement(agreement(**theirs))


def runner(folder: Path, **own: Any) -> JobRunner:
    return JobRunner(0, ClientData(SMALL.model.encoder, TEXTS, HELD), folder, ClientPolicy(**own), once=True)


def job(round: int = 0, lr: float = 0.1) -> Job:
    return Job(SMALL.start, training=Training(lr=lr), metrics=False, round=round, rounds=9)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"metrics": False}, "scores, and dp.metrics is not set here"),
        ({"masked": True}, "scores, and secure.aggregation is set here"),
        ({"fewest_scored": 13}, "scores on 12 held-out examples, and fewer than 13 tell too much"),
    ],
)
def test_an_evaluation_is_held_against_the_policy(own: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=says):
        runner(tmp_path, **own).evaluate(SMALL.model, job())


def test_scores_are_told_once_a_round_and_of_one_model(tmp_path: Path) -> None:
    """A server that may ask as often as it likes, for models of its choice, learns single labels from what differs."""
    client = runner(tmp_path)
    first = client.evaluate(SMALL.model, job(round=3))
    assert client.evaluate(SMALL.model, job(round=3)).loss == first.loss  # the same job that comes again
    for other in (job(round=3, lr=0.2), job(round=2)):
        with pytest.raises(PrivacyError, match="those of round 4 were told; scores are told once a round"):
            client.evaluate(SMALL.model, other)
    assert client.evaluate(SMALL.model, job(round=4)).examples == first.examples


def test_a_damaged_note_of_what_was_scored_is_a_refusal(tmp_path: Path) -> None:
    runner(tmp_path).evaluate(SMALL.model, job())
    (tmp_path / "scored.json").write_text("{")
    with pytest.raises(LedgerError, match=r"scored\.json is damaged or cannot be read"):
        runner(tmp_path).evaluate(SMALL.model, job())


def test_a_job_that_names_other_code_than_was_agreed_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    named = Training(loss="nowhere_at_all:f", optimizer="torch.optim:SGD")
    job = Job(SMALL.start, training=named)
    with pytest.raises(PrivacyError, match=r"train\.loss = nowhere_at_all:f, which is not named in client.code here"):
        JobRunner(0, SMALL.clients[0], tmp_path, policy(tmp_path, client__code="torch.optim:*")).run(SMALL.model, job)
    agreed = agreement(train__optimizer="torch.optim:SGD")
    assert [said for said in agreed.broken_by(job) if "nowhere_at_all" in said]
    assert "code run here: train.optimizer = torch.optim:SGD" in agreed.words()
