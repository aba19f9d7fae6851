"""The job runner: what a record is, and that a private job is charged before it is done, and done once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import Timeout
from torch.testing import assert_close

from fedlora.checks.small_models import small_model
from fedlora.client.policy import ClientPolicy
from fedlora.client.runner import JobRunner
from fedlora.client.training import TrainingTask, begin, end, perform
from fedlora.encoding.client_data import ClientData
from fedlora.errors import LedgerError, PrivacyError, PrivateJobFailed
from fedlora.jobs import PrivacyTerms
from fedlora.sections import Training
from fedlora.storage.files import file_lock
from fedlora.strategy import Job, Update

TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=2, delta=1e-3)
SMALL = small_model("gpt2")  # 16 tokens in an example
TEXTS = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(10 + 20 * i))} for i in range(3)]


def job(round: int = 0, **terms: float) -> Job:
    training = Training(optimizer="sgd", lr=0.1, batch_size=4)
    return Job(SMALL.start, training=training, privacy=replace(TERMS, **terms), round=round, rounds=9)  # type: ignore[arg-type]


def runner(folder: Path, **own: Any) -> JobRunner:
    return JobRunner(0, ClientData(SMALL.model.encoder, TEXTS), folder, ClientPolicy(**own))


def test_a_record_is_a_row_or_each_block_of_it() -> None:
    rows, blocks = (ClientData(SMALL.model.encoder, TEXTS, unit=unit) for unit in ("row", "example"))  # type: ignore[arg-type]
    assert [len(r) for r in rows.records] == [1, 2, 3] and rows.client(0, 2).records == 3
    assert [len(r) for r in blocks.records] == [1] * 6 and blocks.client(0, 2).records == 6
    assert rows.client(0, 2).examples == blocks.client(0, 2).examples == 3


def test_a_private_job_is_answered_with_what_was_spent_and_no_loss_that_was_not_asked_for(tmp_path: Path) -> None:
    update = runner(tmp_path).run(SMALL.model, replace(job(), metrics=False))
    assert update.spent is not None and update.spent.charges == 1 and update.spent.epsilon > 0
    assert update.loss is None and update.examples == 3
    assert all(not torch.equal(update.lora.B[m], b) for m, b in SMALL.start.B.items())


def test_a_private_job_tells_the_loss_that_is_asked_for_of_records_enough(tmp_path: Path) -> None:
    asked = job(rate=1.0)
    update = runner(tmp_path / "enough", fewest_scored=3).run(SMALL.model, asked)
    assert update.loss is not None and 0 < update.loss < 10
    assert runner(tmp_path / "few", fewest_scored=4).run(SMALL.model, asked).loss is None


def test_the_same_job_again_has_the_same_answer_for_nothing(tmp_path: Path) -> None:
    """As after a crash of the server; another round is another job, with other noise."""
    one, again = (runner(tmp_path).run(SMALL.model, job(known=k)) for k in (0, 1))  # type: ignore[arg-type]
    assert_close(vars(one.lora), vars(again.lora), rtol=0, atol=0)
    assert again.spent == one.spent
    assert again.loss == one.loss
    other = runner(tmp_path).run(SMALL.model, job(1))
    assert other.spent is not None and other.spent.charges == 2
    assert not torch.equal(other.lora.B["transformer.h.0.attn.c_attn"], one.lora.B["transformer.h.0.attn.c_attn"])


def test_a_refused_job_trains_nothing_and_charges_nothing(tmp_path: Path) -> None:
    SMALL.model.set_adapter(SMALL.start)
    with pytest.raises(LedgerError, match="budget is spent"):
        runner(tmp_path, budget=0.01).run(SMALL.model, job())
    assert not list(tmp_path.rglob("ledger*")) and not list(tmp_path.rglob("kept*"))


@pytest.mark.parametrize(
    ("own", "asked", "says"),
    [
        ({"private": True}, replace(job(), privacy=None), "no DP-SGD"),
        ({"seeded": False}, job(seeded=True), "noise from a seed"),
        ({"metrics": False}, job(), "its training loss"),
        ({"masked": True}, job(), "an update without a mask"),
        ({}, job(delta=0.5), r"delta = 0.5, which is not below 1/N of the 3 records"),
    ],
)
def test_a_server_that_asks_for_less_than_was_agreed_gets_nothing(
    own: dict[str, bool], asked: Job, says: str, tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError, match=f"the server asks for {says}"):
        runner(tmp_path, **own).run(SMALL.model, asked)
    assert not list(tmp_path.iterdir())


def test_ledgers_can_lie_where_they_outlive_the_run(tmp_path: Path) -> None:
    for t, run in enumerate(("one", "two")):
        runner(tmp_path / run, ledgers=tmp_path / "ledgers").run(SMALL.model, replace(job(), seed=t))
    assert runner(tmp_path / "ledgers" / "0").ledger.spent(1e-3).charges == 2


def test_a_ledger_goes_with_its_records_and_not_with_the_clients_number(tmp_path: Path) -> None:
    """A site in two federations has two numbers, and one ledger for its data."""
    for number in (0, 2):
        replace(runner(tmp_path / "state", ledgers=tmp_path / "ledgers"), id=number).run(SMALL.model, job(number))
    assert runner(tmp_path / "ledgers" / "0").ledger.spent(1e-3).charges == 2
    assert not (tmp_path / "ledgers" / "2").exists()


def test_what_stays_with_the_client_stays_after_a_private_round(tmp_path: Path) -> None:
    same = runner(tmp_path)
    first = same.run(SMALL.model, replace(job(), shares="A"))
    kept = SMALL.model.get_adapter()
    assert not first.lora.B and list(tmp_path.glob("kept-*"))
    same.run(SMALL.model, replace(job(1), shares="A", training=Training(optimizer="sgd", lr=1e-30, batch_size=4)))
    assert_close(SMALL.model.get_adapter().B, kept.B)


def test_training_done_elsewhere_gives_the_update_that_training_here_does(tmp_path: Path) -> None:
    """Several clients stop before their training, and each goes on with what came of its own."""
    plain = replace(job(), privacy=None)
    wanted = runner(tmp_path / "wanted").run(SMALL.model, plain)
    every = [runner(tmp_path / str(i)).steps(SMALL.model, plain) for i in range(2)]
    tasks = [begin(steps) for steps in every]
    for steps, task in zip(every, tasks, strict=True):
        assert isinstance(task, TrainingTask) and task.client == 0 and len(task.examples) == 6
        assert_close(vars(end(steps, perform(SMALL.model, task)).lora), vars(wanted.lora), rtol=0, atol=0)


def test_a_job_that_was_done_already_has_nothing_to_train(tmp_path: Path) -> None:
    done = runner(tmp_path).run(SMALL.model, job())
    again = begin(runner(tmp_path).steps(SMALL.model, job()))
    assert isinstance(again, Update)
    assert_close(vars(again.lora), vars(done.lora), rtol=0, atol=0)


def test_a_private_job_whose_training_fails_elsewhere_has_failed_for_ever(tmp_path: Path) -> None:
    steps = runner(tmp_path).steps(SMALL.model, job())
    assert isinstance(begin(steps), TrainingTask)
    with pytest.raises(PrivateJobFailed):
        end(steps, ValueError("a name among the records"))
    with pytest.raises(PrivateJobFailed):
        runner(tmp_path).run(SMALL.model, job())
    assert len(runner(tmp_path).ledger.charges()) == 1


def test_a_private_job_that_waits_for_its_training_holds_its_ledger(tmp_path: Path) -> None:
    """One that is given up there was charged and has no answer, as after a crash: it is trained for that charge."""
    steps, other = runner(tmp_path).steps(SMALL.model, job()), file_lock(tmp_path / ".lock")
    begin(steps)
    with pytest.raises(Timeout):
        other.acquire(blocking=False)
    steps.close()
    other.acquire(blocking=False)
    other.release()
    spent = runner(tmp_path).run(SMALL.model, job()).spent
    assert spent is not None and spent.charges == 1
