"""Tasks of several clients in passes of bounded memory, and each by itself where it cannot be otherwise."""

from collections.abc import Sequence

import pytest

from fedlora.checks.small_models import small_model
from fedlora.client.stacked import cohort, together
from fedlora.client.training import Outcome, TrainingTask
from fedlora.errors import StrategyError
from fedlora.jobs import Job
from fedlora.lora import LoRA, leading
from fedlora.models.model import Model
from fedlora.sections import Training
from tests.support.cohorts import tasks_of

PLAIN = Training(optimizer="sgd", lr=0.1, steps=1)


def test_a_pass_is_as_large_as_there_is_memory_for_the_highest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of a lower rank takes as much as the one of the highest, whichever comes first."""
    small = small_model("llama")
    jobs = [Job(leading(small.start, rank), training=PLAIN) for rank in (2, 1, 1)]
    sizes, train = list[int](), cohort.train

    def counted(model: Model, tasks: Sequence[TrainingTask]) -> list[Outcome]:
        sizes.append(len(tasks))
        return train(model, tasks)

    monkeypatch.setattr(cohort, "train", counted)
    monkeypatch.setattr(together, "MOST_BYTES", 2 * 24 * jobs[0].start.numel())
    found = dict(together.perform(small.model, tasks_of(small, jobs), pytest.fail))
    assert sizes == [2, 1] and not any(isinstance(outcome, Exception) for outcome in found.values())


def test_a_side_that_jobs_do_not_bring_stays_as_the_model_has_it() -> None:
    small, said = small_model("llama"), list[str]()
    small.model.set_adapter(small.start)
    job = Job(LoRA(B=small.start.B), trains="B", shares="B", training=PLAIN)
    found = dict(together.perform(small.model, tasks_of(small, [job] * 3), said.append))
    assert sorted(found) == [0, 1, 2] and not any(isinstance(outcome, Exception) for outcome in found.values())
    assert "no side A" in said[0]


def test_a_start_that_the_model_cannot_take_is_named_for_its_client_alone() -> None:
    """Filled up with zeros beside a higher rank, it would be trained as if it fitted."""
    small = small_model("llama")
    unlike = LoRA(leading(small.start, 1).A, small.start.B)
    jobs = [Job(start, training=PLAIN) for start in (small.start, unlike, small.start)]
    found = dict(together.perform(small.model, tasks_of(small, jobs), pytest.fail))
    assert isinstance(found[1], StrategyError) and "have different ranks" in str(found[1])
    assert not any(isinstance(found[i], Exception) for i in (0, 2))
