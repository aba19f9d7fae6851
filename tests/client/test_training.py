"""Local training, against what it is declared to do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import get_linear_schedule_with_warmup

from fedlora.client import training as local_training
from fedlora.errors import ClientFailed
from fedlora.jobs import PrivacyTerms
from fedlora.lora import LoRA, delta, join, scale, split_rank, stack
from fedlora.models.model import Model
from fedlora.models.optimizer import count_steps, lr_factor, set_rates
from fedlora.sections import LoRAConfig, ModelConfig, Training
from fedlora.strategy import Job
from tests.support.models import LABEL, TEXT, make

FAST = Training(lr=1e-2, batch_size=4, epochs=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make("llama", tmp_path_factory.mktemp("llama"))
    return Model(ModelConfig(path=str(folder)), LoRAConfig(rank=3), TEXT, seed=1)


@pytest.fixture(scope="module")
def start(model: Model) -> LoRA:
    return model.get_adapter()


@pytest.fixture(scope="module")
def begun(start: LoRA) -> LoRA:
    """A start that was trained before: its B is not zero."""
    g = torch.Generator().manual_seed(5)
    return LoRA(start.A, {m: torch.randn(b.shape, generator=g) / 8 for m, b in start.B.items()})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make("bert", tmp_path_factory.mktemp("bert"))
    return Model(ModelConfig(path=str(folder)), LoRAConfig(rank=3), LABEL, seed=1)


@pytest.fixture(scope="module")
def labelled(classifier: Model) -> list[dict[str, torch.Tensor]]:
    return classifier.encoder([{"text": f"w{i} w{i + 1}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(9)])


def examples(n: int = 10, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, 64, (int(torch.randint(4, 12, (1,), generator=g)),), generator=g) for _ in range(n)]
    return [{"input_ids": t, "labels": t} for t in ids]


def moved(model: Model, job: Job, kept: LoRA = LoRA()) -> LoRA:  # noqa: B008
    return local_training.train(model, job, 0, examples(), kept)[0].lora


def test_training_lowers_the_loss(model: Model, start: LoRA) -> None:
    first, _ = local_training.train(model, Job(start, training=FAST), 0, examples(), LoRA())
    longer, _ = local_training.train(model, Job(start, training=replace(FAST, epochs=20)), 0, examples(), LoRA())
    assert longer.loss < first.loss and first.examples == 10


def test_every_trained_matrix_moves_and_a_frozen_one_does_not(model: Model, start: LoRA) -> None:
    after = moved(model, Job(start, training=replace(FAST, epochs=3)))
    assert all(not torch.equal(after.A[m], a) for m, a in start.A.items())
    assert all(not torch.equal(after.B[m], b) for m, b in start.B.items())
    moved(model, Job(start, trains="B", shares="B", training=FAST))
    assert all(torch.equal(model.get_adapter().A[m], a) for m, a in start.A.items())


def test_the_same_job_gives_the_same_bits_whoever_trained_in_between(model: Model, start: LoRA) -> None:
    job = Job(start, training=FAST, seed=3, round=2, rounds=5)
    one = moved(model, job)
    local_training.train(model, replace(job, seed=4), 7, examples(6, seed=2), LoRA())
    torch.manual_seed(99)
    assert_close(vars(moved(model, job)), vars(one), rtol=0, atol=0)
    assert not torch.equal(moved(model, replace(job, round=3)).B[next(iter(one.B))], next(iter(one.B.values())))


def test_what_is_trained_and_not_shared_stays_and_goes_on(model: Model, start: LoRA) -> None:
    job = Job(start, shares="A", training=FAST)
    update, kept = local_training.train(model, job, 0, examples(), LoRA())
    assert set(update.lora.B) == set() == set(kept.A) and kept.B
    again, _ = local_training.train(model, job, 0, examples(), kept)
    anew, _ = local_training.train(model, job, 0, examples(), LoRA())
    assert again.loss < anew.loss  # it took up its own B, not the job's


def test_rows_that_stay_go_on_and_are_noised_with_what_is_sent(model: Model, start: LoRA) -> None:
    """Under DP-SGD a step in which no record is drawn is noise alone: it is on the rows that stay as on the others."""
    terms = PrivacyTerms(noise=2.0, clip=1.0, head_share=0.5, rate=1e-9, steps=1, delta=1e-5, seeded=True)
    job = Job(start, keeps_rank=1, training=replace(FAST, optimizer="sgd", lr=1e-9), privacy=terms)
    update, kept = local_training.train_privately(model, job, 0, [[e] for e in examples()], LoRA())
    for s, rows in (("A", 1), ("B", 1)):
        for m, t in kept.side(s).items():
            assert t.shape[0 if s == "A" else 1] == rows
            noise = t - split_rank(start, 1)[1].side(s)[m]
            sent = update.lora.side(s)[m] - split_rank(start, 1)[0].side(s)[m]
            assert float(noise.std()) == pytest.approx(float(sent.std()), rel=0.6) and bool(noise.all())
    _, again = local_training.train_privately(model, job, 0, [[e] for e in examples()], kept)
    assert all(not torch.equal(t, kept.side(s)[m]) for s, m, t in again.matrices())


def test_accumulation_equals_one_large_batch(model: Model, start: LoRA) -> None:
    """Examples of different lengths: every target counts alike, however they are cut into forward passes."""
    large = moved(model, Job(start, training=replace(FAST, batch_size=10, optimizer="sgd", lr=1.0)))
    small = moved(model, Job(start, training=replace(FAST, batch_size=2, accumulate=5, optimizer="sgd", lr=1.0)))
    assert_close(vars(small), vars(large), rtol=1e-4, atol=1e-6)


def test_sgd_takes_the_step_that_the_gradient_says(model: Model, start: LoRA) -> None:
    job = Job(start, training=replace(FAST, batch_size=10, optimizer="sgd", lr=0.5, clip=0.0))
    after = moved(model, job)
    model.set_adapter(start)
    parameters = model.set_trainable("ABH")
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


def factor(training: Training, step: int, steps: int) -> float:
    """The factor of a step, counted from 0, of all steps of a run."""
    return lr_factor(training, began=step / steps, ended=(step + 1) / steps)


def test_the_schedule_goes_on_over_the_rounds() -> None:
    """The learning rate that 10 rounds of 4 steps see is that of one run of 40 steps."""
    training = Training(schedule="cosine", warmup=0.1)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "full_lr": 2.0}])
    seen = []
    for t in range(10):
        for i in range(4):
            set_rates(optimizer, training, Job(LoRA(), round=t, rounds=10), step=i, steps=4)
            seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([2.0 * factor(training, i, 40) for i in range(40)])
    assert seen[3] == pytest.approx(2.0) and max(seen) == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25, 0.97, 1.0])
def test_every_step_of_a_schedule_trains(schedule: Any, warmup: float) -> None:
    """The last step too, and the first of a warm-up: one whose rate is 0 is computed, sent and paid for in vain."""
    training = Training(schedule=schedule, warmup=warmup)
    for steps in (1, 2, 7, 40):
        factors = [factor(training, i, steps) for i in range(steps)]
        assert all(0 < f <= 1 for f in factors) and (warmup or factors[0] == 1.0)


def test_a_linear_schedule_without_warm_up_is_that_of_transformers() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=8)
    for i in range(8):
        assert factor(Training(schedule="linear"), i, 8) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_loss_that_is_no_number_is_the_clients_failure(model: Model, start: LoRA) -> None:
    broken = LoRA(start.A, {m: torch.full_like(b, float("inf")) for m, b in start.B.items()})
    with pytest.raises(ClientFailed, match=r"^the loss is nan at step 1 of round 1; a train.lr below"):
        moved(model, Job(broken, training=FAST))


def test_a_head_can_have_a_learning_rate_of_its_own(classifier: Model, labelled: list[dict[str, torch.Tensor]]) -> None:
    job = Job(classifier.get_adapter())

    def steps(head_lr: float) -> tuple[float, float]:
        training = replace(FAST, lr=1e-3, head_lr=head_lr, batch_size=9)
        update, _ = local_training.train(classifier, replace(job, training=training), 0, labelled, LoRA())
        return far(update.lora, job.start, "B"), far(update.lora, job.start, "H")

    assert steps(0.0) == pytest.approx((1e-3, 1e-3), rel=0.01)  # AdamW's first step is as long as the rate
    assert steps(0.1) == pytest.approx((1e-3, 0.1), rel=0.01)


def test_b_can_have_a_larger_learning_rate_than_a(model: Model, begun: LoRA) -> None:
    training = replace(FAST, lr=1e-3, lora_plus=16.0, batch_size=10)
    after = moved(model, Job(begun, training=training))
    assert far(after, begun, "A") == pytest.approx(1e-3, rel=0.01)
    assert far(after, begun, "B") == pytest.approx(1.6e-2, rel=0.01)


def test_a_heads_update_is_shared_with_the_adapter(classifier: Model, labelled: list[dict[str, torch.Tensor]]) -> None:
    start = classifier.get_adapter()
    update, kept = local_training.train(classifier, Job(start, training=FAST), 0, labelled, LoRA())
    assert not kept and not torch.equal(update.lora.H["classifier.weight"], start.H["classifier.weight"])
    assert classifier.metrics(labelled).values()["accuracy"] >= 0


def test_a_gain_is_a_factor_on_the_scale(model: Model, begun: LoRA) -> None:
    """Of some modules, and of this job alone."""
    first, *_ = begun.A
    twice = LoRA(begun.A, {m: 2 * b if m == first else b for m, b in begun.B.items()})
    plain = loss(model, Job(begun))
    assert loss(model, Job(begun, gain={first: 2.0})) == pytest.approx(loss(model, Job(twice)))
    assert loss(model, Job(begun)) == plain != pytest.approx(loss(model, Job(twice)))


def test_a_client_that_resumes_sends_its_factors_the_first_time(model: Model, start: LoRA) -> None:
    update, kept = local_training.train(model, Job(start, resumes=True, training=FAST), 0, examples(), LoRA())
    plain, _ = local_training.train(model, Job(start, training=FAST), 0, examples(), LoRA())
    assert_close(vars(update.lora), vars(plain.lora), rtol=0, atol=0)
    assert_close(vars(kept), vars(plain.lora), rtol=0, atol=0)


@pytest.mark.parametrize("kept_rank", [2, 3])
def test_a_client_that_resumes_sends_the_change_of_its_product(model: Model, begun: LoRA, kept_rank: int) -> None:
    """From what it kept, whatever rank that has; and from the start, where it kept nothing and that is not zero."""
    own = LoRA({m: a[:kept_rank] for m, a in begun.A.items()}, {m: b[:, :kept_rank] for m, b in begun.B.items()})
    job = Job(begun, resumes=True, training=FAST)
    for kept, was in ((own, own), (LoRA(), begun)):
        update, after = local_training.train(model, job, 0, examples(), kept)
        assert all(a.shape[0] == 2 * was.A[m].shape[0] for m, a in update.lora.A.items())
        assert_close(delta(update.lora), delta(join(after, scale(was, -1))))
        assert all(not torch.equal(after.B[m], b) for m, b in was.B.items())


def test_clients_that_resume_compute_alike_and_go_on_from_their_own(model: Model, start: LoRA) -> None:
    """Each client loads its own factors over the mean of all changes less their product: the same model for all."""
    job = Job(start, resumes=True, training=FAST)
    answers = [local_training.train(model, job, i, examples(seed=i), LoRA()) for i in range(2)]
    mean = stack([update.lora for update, _ in answers], [1.0, 3.0])
    again = replace(job, offset=(mean,), round=1)
    losses = [local_training.evaluate(model, again, examples(), kept).loss for _, kept in answers]
    assert losses == pytest.approx([loss(model, Job(start, offset=(mean,)))] * 2)
    assert losses[0] != pytest.approx(loss(model, Job(start)))
    for i, (_, kept) in enumerate(answers):
        _, after = local_training.train(model, replace(again, training=replace(FAST, lr=1e-6)), i, examples(), kept)
        assert_close(vars(after), vars(kept), atol=1e-4, rtol=0)


def test_a_client_that_resumes_shares_its_head(classifier: Model, labelled: list[dict[str, torch.Tensor]]) -> None:
    job = Job(classifier.get_adapter(), resumes=True, training=FAST)
    _, kept = local_training.train(classifier, job, 0, labelled, LoRA())
    update, kept = local_training.train(classifier, replace(job, round=1), 0, labelled, kept)
    assert not kept.H and far(update.lora, job.start, "H") > 0


def test_every_examples_gradient_is_clipped_by_itself(model: Model, begun: LoRA) -> None:
    """The step is the mean over examples of what autograd gives for each, clipped over A and B together."""
    grads = [gradient(model, begun, e) for e in examples()]
    largest = sorted(size(g) for g in grads)[5]  # half of them are clipped
    clipped = [[t * min(1.0, largest / size(g)) for t in g] for g in grads]
    wanted = [torch.stack(ts).mean(0) for ts in zip(*clipped, strict=True)]
    assert_close(step(model, begun, examples(), largest), wanted)


def test_no_example_changes_the_sum_by_more_than_the_clip(model: Model, begun: LoRA) -> None:
    """Examples are of different lengths: a mean over the batch's targets would let one change what the others weigh."""
    every = examples(6)
    for largest in (0.05, 5.0):
        whole = [6 * t for t in step(model, begun, every, largest)]
        for i in range(6):
            rest = [5 * t for t in step(model, begun, [*every[:i], *every[i + 1 :]], largest)]
            assert size([x - y for x, y in zip(whole, rest, strict=True)]) <= 1.001 * largest


def test_examples_are_clipped_alike_however_they_are_cut_into_batches(model: Model, begun: LoRA) -> None:
    one = step(model, begun, examples(), 0.1)
    assert_close(step(model, begun, examples(), 0.1, batch_size=2, accumulate=5), one)


def test_the_clip_of_the_batch_does_not_apply_to_clipped_examples(model: Model, begun: LoRA) -> None:
    one = step(model, begun, examples(), 0.1)
    assert_close(step(model, begun, examples(), 0.1, clip=1e-6), one, rtol=0, atol=0)


def test_a_head_is_clipped_together_with_the_adapter(
    classifier: Model, labelled: list[dict[str, torch.Tensor]]
) -> None:
    start = classifier.get_adapter()
    training = Training(optimizer="sgd", lr=1.0, batch_size=1, steps=1)
    update, _ = local_training.train(
        classifier, Job(start, example_clip=0.01, training=training), 0, labelled[:1], LoRA()
    )
    change = [update.lora.side(s)[m] - t for s in "ABH" for m, t in start.side(s).items()]
    assert size(change) == pytest.approx(0.01, rel=1e-3)


def far(after: LoRA, before: LoRA, side: str) -> float:
    """The largest step of any number of a side."""
    return max(float((after.side(side)[m] - t).abs().max()) for m, t in before.side(side).items())


def loss(model: Model, job: Job) -> float:
    return local_training.evaluate(model, job, examples(), LoRA()).loss


def size(tensors: list[torch.Tensor]) -> float:
    """The norm over all of them."""
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5


def gradient(model: Model, lora: LoRA, example: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of one example's mean loss over its targets, for A then B."""
    model.set_adapter(lora)
    parameters = model.set_trainable("AB")
    value = model.loss(model.encoder.collate([example])) / model.targets([example])
    return list(torch.autograd.grad(value, parameters))


def step(
    model: Model, lora: LoRA, rows: list[dict[str, torch.Tensor]], largest: float, **training: float
) -> list[torch.Tensor]:
    """What is taken off A and B in one step of length 1 over all rows."""
    chosen = replace(Training(optimizer="sgd", lr=1.0, batch_size=10, steps=1), **training)  # type: ignore[arg-type]
    after = local_training.train(model, Job(lora, trains="AB", example_clip=largest, training=chosen), 0, rows, LoRA())
    return [t - after[0].lora.side(s)[m] for s in "AB" for m, t in lora.side(s).items()]


def test_the_start_of_a_job_needs_no_model(begun: LoRA) -> None:
    """What a client keeps is its own, all else the job's; what a client that resumes subtracts is minus its product."""
    own = LoRA(B={m: 2 * b for m, b in begun.B.items()})
    start, taken = local_training.start_of(Job(begun, shares="A"), own)
    assert start.A == begun.A and start.B == own.B and not taken
    start, taken = local_training.start_of(Job(begun, resumes=True), own)
    assert_close(delta(taken), {m: -p for m, p in delta(LoRA(begun.A, own.B)).items()})


def test_an_update_of_a_trained_adapter_needs_no_model(begun: LoRA) -> None:
    update, kept = local_training.make_update(Job(begun, shares="A", metrics=False), begun, LoRA(), 5, 0.25)
    assert update.lora.A == begun.A and not update.lora.B and kept.B == begun.B and not kept.A
    assert update.examples == 5 and update.loss is None
