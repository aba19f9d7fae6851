"""Local training, against what it is declared to do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fedlora import worker
from fedlora.config import LoRAConfig, ModelConfig
from fedlora.errors import ClientFailed
from fedlora.lora import LoRA
from fedlora.model import Model
from fedlora.strategy import Job, Training
from fedlora.worker import count_steps, factor
from tests.models import LABEL, TEXT, make

FAST = Training(lr=1e-2, batch_size=4, epochs=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make("llama", tmp_path_factory.mktemp("llama"))
    return Model(ModelConfig(path=str(folder)), LoRAConfig(rank=3), TEXT, seed=1)


@pytest.fixture(scope="module")
def start(model: Model) -> LoRA:
    return model.read()


def examples(n: int = 10, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, 64, (int(torch.randint(4, 12, (1,), generator=g)),), generator=g) for _ in range(n)]
    return [{"input_ids": t, "labels": t} for t in ids]


def moved(model: Model, job: Job, kept: LoRA = LoRA()) -> LoRA:  # noqa: B008
    return worker.train(model, job, 0, examples(), kept)[0].lora


def test_training_lowers_the_loss(model: Model, start: LoRA) -> None:
    first, _ = worker.train(model, Job(start, training=FAST), 0, examples(), LoRA())
    longer, _ = worker.train(model, Job(start, training=replace(FAST, epochs=20)), 0, examples(), LoRA())
    assert longer.loss < first.loss and first.examples == 10


def test_every_trained_matrix_moves_and_a_frozen_one_does_not(model: Model, start: LoRA) -> None:
    after = moved(model, Job(start, training=replace(FAST, epochs=3)))
    assert all(not torch.equal(after.A[m], a) for m, a in start.A.items())
    assert all(not torch.equal(after.B[m], b) for m, b in start.B.items())
    moved(model, Job(start, trains="B", shares="B", training=FAST))
    assert all(torch.equal(model.read().A[m], a) for m, a in start.A.items())


def test_the_same_job_gives_the_same_bits_whoever_trained_in_between(model: Model, start: LoRA) -> None:
    job = Job(start, training=FAST, seed=3, round=2, rounds=5)
    one = moved(model, job)
    worker.train(model, replace(job, seed=4), 7, examples(6, seed=2), LoRA())
    torch.manual_seed(99)
    assert_close(vars(moved(model, job)), vars(one), rtol=0, atol=0)
    assert not torch.equal(moved(model, replace(job, round=3)).B[next(iter(one.B))], next(iter(one.B.values())))


def test_what_is_trained_and_not_shared_stays_and_goes_on(model: Model, start: LoRA) -> None:
    job = Job(start, shares="A", training=FAST)
    update, kept = worker.train(model, job, 0, examples(), LoRA())
    assert set(update.lora.B) == set() == set(kept.A) and kept.B
    again, _ = worker.train(model, job, 0, examples(), kept)
    anew, _ = worker.train(model, job, 0, examples(), LoRA())
    assert again.loss < anew.loss  # it took up its own B, not the job's


def test_accumulation_equals_one_large_batch(model: Model, start: LoRA) -> None:
    """Examples of different lengths: every target counts alike, however they are cut into forward passes."""
    large = moved(model, Job(start, training=replace(FAST, batch_size=10, optimizer="sgd", lr=1.0)))
    small = moved(model, Job(start, training=replace(FAST, batch_size=2, accumulate=5, optimizer="sgd", lr=1.0)))
    assert_close(vars(small), vars(large), rtol=1e-4, atol=1e-6)


def test_sgd_takes_the_step_that_the_gradient_says(model: Model, start: LoRA) -> None:
    job = Job(start, training=replace(FAST, batch_size=10, optimizer="sgd", lr=0.5, clip=0.0))
    after = moved(model, job)
    model.write(start)
    parameters = model.trains("ABH")
    batch = examples()
    (model.loss(model.encoder.collate(batch)) / model.targets(batch)).backward()
    wanted = [p.detach() - 0.5 * p.grad for p in parameters if p.grad is not None]
    got = [*after.A.values(), *after.B.values()]
    for p in parameters:
        p.grad = None
    assert_close(got, wanted)


def test_a_clipped_step_is_as_long_as_the_clip_says(model: Model, start: LoRA) -> None:
    training = replace(FAST, optimizer="sgd", lr=1.0, clip=1e-3, batch_size=10)
    after = moved(model, Job(start, training=training))
    squares = sum(float((after.side(s)[m] - t).square().sum()) for s in "AB" for m, t in start.side(s).items())
    assert squares**0.5 == pytest.approx(1e-3, rel=0.02)


def test_fedprox_holds_the_client_near_where_it_started(model: Model, start: LoRA) -> None:
    def distance(mu: float) -> float:
        after = moved(model, Job(start, training=replace(FAST, epochs=10, prox=mu, optimizer="sgd", lr=0.1)))
        return sum(float((after.B[m] - b).square().sum()) for m, b in start.B.items())

    assert distance(5.0) < distance(0.5) < distance(0.0)


def test_steps_are_counted_by_epochs_or_given() -> None:
    assert count_steps(Training(batch_size=4), 10) == 3
    assert count_steps(Training(batch_size=4, accumulate=2), 10) == 2
    assert count_steps(Training(batch_size=4, epochs=0.5), 40) == 5
    assert count_steps(Training(batch_size=4, epochs=0.01), 10) == 1
    assert count_steps(Training(batch_size=4, steps=7), 10) == 7


def test_the_schedule_goes_on_over_the_rounds() -> None:
    """The learning rate that 10 rounds of 4 steps see is that of one run of 40 steps."""
    training = Training(schedule="cosine", warmup=0.1)
    seen = [factor(training, (t + (i + 1) / 4) / 10) for t in range(10) for i in range(4)]
    assert seen == pytest.approx([factor(training, (i + 1) / 40) for i in range(40)])
    assert seen[3] == pytest.approx(1.0) and seen[-1] == pytest.approx(0.0) and max(seen) == pytest.approx(1.0)
    assert factor(Training(schedule="linear"), 0.25) == pytest.approx(0.75)
    assert factor(Training(), 0.9) == 1.0


def test_a_loss_that_is_no_number_is_the_clients_failure(model: Model, start: LoRA) -> None:
    broken = LoRA(start.A, {m: torch.full_like(b, float("inf")) for m, b in start.B.items()})
    with pytest.raises(ClientFailed, match=r"client 0: the loss is nan at step 1 of round 1; a train.lr below"):
        moved(model, Job(broken, training=FAST))


def test_a_head_can_have_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    model = Model(ModelConfig(path=str(make("bert", tmp_path))), LoRAConfig(rank=3), LABEL, seed=1)
    start = model.read()
    rows = model.encoder([{"text": f"w{i} w{i + 1}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(9)])

    def steps(head_lr: float) -> tuple[float, float]:
        training = replace(FAST, lr=1e-3, head_lr=head_lr, batch_size=9)
        update, _ = worker.train(model, Job(start, training=training), 0, rows, LoRA())
        moved = [(update.lora.side(s)[m] - t).abs().max() for s in "BH" for m, t in start.side(s).items()]
        return float(max(moved[: len(start.B)])), float(max(moved[len(start.B) :]))

    assert steps(0.0) == pytest.approx((1e-3, 1e-3), rel=0.01)  # AdamW's first step is as long as the rate
    assert steps(0.1) == pytest.approx((1e-3, 0.1), rel=0.01)


def test_a_heads_update_is_shared_with_the_adapter(tmp_path: Path) -> None:
    model = Model(ModelConfig(path=str(make("bert", tmp_path))), LoRAConfig(rank=3), LABEL, seed=1)
    start = model.read()
    rows = [{"text": f"w{i} w{i + 1}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(9)]
    update, kept = worker.train(model, Job(start, training=FAST), 0, model.encoder(rows), LoRA())
    assert not kept and not torch.equal(update.lora.H["classifier.weight"], start.H["classifier.weight"])
    assert model.metrics(model.encoder(rows)).values()["accuracy"] >= 0
