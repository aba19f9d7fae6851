"""Clients' own models measured in one pass score what they score one by one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.checks.small_models import KINDS, Kind, SmallModel, small_model
from fedlora.client import training
from fedlora.client.stacked import evaluation
from fedlora.client.stacked.evaluation import evaluate
from fedlora.client.training import EvaluationTask
from fedlora.jobs import Job
from fedlora.lora import LoRA
from fedlora.metrics import Metrics
from fedlora.models.model import Model
from tests.client.stacked.test_row_pass import architecture
from tests.support.float64 import in_float64
from tests.support.models import random_adapter

NOTHING = LoRA()


def tasks_of(small: SmallModel, job: Job, kept: Sequence[LoRA]) -> list[EvaluationTask]:
    return [EvaluationTask(job, data.heldout, own) for data, own in zip(small.clients, kept, strict=True)]


def check(small: SmallModel, tasks: Sequence[EvaluationTask], *, differ: bool = True) -> None:
    """The scores of these tasks are those of each by itself, and tell the clients' models apart."""
    with in_float64(small.model):
        plain = [training.evaluate(small.model, t.job, t.examples, t.kept).values() for t in tasks]
        found = [metrics.values() for metrics in evaluate(small.model, tasks)]
        for one, other in zip(plain, found, strict=True):
            assert other == pytest.approx(one, rel=1e-7, abs=1e-7)
        same = [EvaluationTask(t.job, tasks[0].examples, t.kept) for t in tasks]
        losses = {round(metrics.values()["loss"], 9) for metrics in evaluate(small.model, same)}
    small.model.set_adapter(small.start)
    assert (len(losses) == len(tasks)) == differ


def own(small: SmallModel, sides: str) -> list[LoRA]:
    """What three clients have kept."""
    return [random_adapter(small.model, seed).only(sides) for seed in range(3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keeps", ["B", "AB", "H"])
def test_clients_that_keep_sides_have_their_own_scores(kind: Kind, keeps: str) -> None:
    small = small_model(kind)
    if keeps == "H" and kind != "bert":
        pytest.skip("no head")
    shares = "".join(side for side in "ABH" if side not in keeps)
    check(small, tasks_of(small, Job(random_adapter(small.model, 9), shares=shares), own(small, keeps)))


def test_clients_that_go_on_from_their_own_factors_stand_over_what_is_subtracted() -> None:
    small = small_model("llama")
    job = Job(random_adapter(small.model, 9), offset=(random_adapter(small.model, 8).only("AB"),), resumes=True)
    check(small, tasks_of(small, job, own(small, "AB")), differ=False)  # at its start each is the offset's model


def test_gains_and_offsets_that_differ_are_heeded() -> None:
    small = small_model("llama")
    start = random_adapter(small.model, 9)
    module = next(iter(start.A))
    jobs = [Job(start), Job(start, gain={module: 2.0}), Job(start, offset=(random_adapter(small.model, 8).only("AB"),))]
    check(small, [EvaluationTask(job, small.clients[0].heldout, NOTHING) for job in jobs])


def test_clients_that_have_the_common_model_share_one_pass() -> None:
    small = small_model("bert")
    check(small, tasks_of(small, Job(random_adapter(small.model, 9)), [NOTHING] * 3), differ=False)


def test_what_cannot_be_stacked_is_measured_one_by_one() -> None:
    small = small_model("llama", "dora")
    starts = [random_adapter(small.model, seed) for seed in range(3)]
    tasks = [EvaluationTask(Job(start), d.heldout, NOTHING) for start, d in zip(starts, small.clients, strict=True)]
    check(small, [replace(task) for task in tasks])


def test_of_what_clients_keep_little_is_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small, sizes = small_model("bert"), list[int]()
    tasks = tasks_of(small, Job(random_adapter(small.model, 9), shares="AH"), own(small, "B"))
    whole, evaluated = evaluate(small.model, tasks), evaluation._evaluated

    def counted(model: Model, some: Sequence[EvaluationTask]) -> list[Metrics]:
        sizes.append(len(some))
        return evaluated(model, some)

    monkeypatch.setattr(evaluation, "_evaluated", counted)
    monkeypatch.setattr(evaluation, "MOST_BYTES", 1)
    found = evaluate(small.model, iter(tasks))
    assert sizes == [1, 1, 1]
    for one, other in zip(whole, found, strict=True):
        assert other.values() == pytest.approx(one.values(), rel=1e-5)


def test_blocks_have_room_for_the_highest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_model("llama")
    starts = [random_adapter(small.model, seed, rank) for seed, rank in enumerate((1, 1, 3))]
    tasks = [
        EvaluationTask(Job(start), data.heldout, NOTHING) for start, data in zip(starts, small.clients, strict=True)
    ]
    monkeypatch.setattr(evaluation, "MOST_BYTES", 8 * starts[2].numel())
    assert list(evaluation._blocks(small.model, tasks)) == [[0], [1], [2]]


def test_a_layer_that_sees_tokens_first_is_noticed_where_there_are_as_many_rows(tmp_path: Path) -> None:
    model = architecture("xlnet", tmp_path)
    examples = model.encoder([{"text": "w1 w2 w3", "label": "no"}] * 5)  # of 5 tokens
    tasks = [EvaluationTask(Job(random_adapter(model, i)), [e], NOTHING) for i, e in enumerate(examples)]
    plain = [training.evaluate(model, t.job, t.examples, t.kept).values()["loss"] for t in tasks]
    assert [metrics.values()["loss"] for metrics in evaluate(model, tasks)] == pytest.approx(plain, rel=1e-6)
