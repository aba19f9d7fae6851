"""DP-SGD at a client: what a step is, against Opacus and by its parts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from fedlora.client import training
from fedlora.encoding.encoder import Example, Records
from fedlora.errors import ClientFailed, PrivacyError
from fedlora.jobs import PrivacyTerms
from fedlora.lora import LoRA
from fedlora.models.model import Model
from fedlora.privacy import dpsgd
from fedlora.privacy.dpsgd import STANDARD, Mechanism
from fedlora.privacy.noise import SecureRandom
from fedlora.privacy.preflight import synthetic
from fedlora.sections import LoRAConfig, ModelConfig, Training
from fedlora.seeds import seeded
from fedlora.strategy import Job
from tests.support.models import FORMS, make

C = 0.05  # about half of the examples' gradients are longer
EXACT = PrivacyTerms(noise=0.0, clip=C, head_share=0.5, rate=1.0, steps=1, delta=1e-5, seeded=True)
NEVER = replace(EXACT, noise=2.0, rate=1e-9)  # nobody is drawn
PLAIN = Training(optimizer="sgd", lr=1.0, batch_size=16)  # a step is the gradient itself
LIKELY = 1e-4  # all seeds are fixed


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    folders: dict[str, Path] = {}

    def one(kind: str, **lora: Any) -> Model:
        if kind not in folders:
            folders[kind] = make(kind, tmp_path_factory.mktemp(kind))
        model = Model(ModelConfig(path=str(folders[kind])), LoRAConfig(**({"rank": 8} | lora)), FORMS[kind], seed=1)
        g = torch.Generator().manual_seed(2)
        model.set_adapter(LoRA(B={m: torch.randn(b.shape, generator=g) / 20 for m, b in model.get_adapter().B.items()}))
        return model

    return one


@pytest.fixture(scope="module")
def model(build: Callable[..., Model]) -> Model:
    return build("llama")


@pytest.fixture(scope="module")
def job(model: Model) -> Job:
    return Job(model.get_adapter(), trains="AB", shares="AB", training=PLAIN, privacy=EXACT)


def made_up(model: Model, n: int = 10) -> list[Example]:
    """Of different lengths."""
    with seeded(3):
        return synthetic(model.encoder, n)


def alone(examples: list[Example]) -> Records:
    return [[e] for e in examples]


def step(model: Model, job: Job, records: Records, mechanism: Mechanism = STANDARD) -> list[Tensor]:
    """What is taken off all that is trained, whether it is shared or kept."""
    update, kept = training.train_privately(model, job, 0, records, LoRA(), mechanism)
    after = update.lora.over(kept)
    return [t - after.side(s)[m] for s in job.trains for m, t in job.start.side(s).items()]


def size(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors]).norm())


def flat(tensors: list[Tensor]) -> Any:
    return torch.cat([t.flatten() for t in tensors]).double().numpy()


def by_opacus(model: Model, start: LoRA, some: list[Example]) -> list[Tensor]:
    """The same step, by Opacus's own module and optimizer."""
    model.set_adapter(start)
    parameters = model.set_trainable("AB")
    before = [p.detach().clone() for p in parameters]
    wrapped: Any = GradSampleModule(model.net.train(), strict=False)
    sgd = torch.optim.SGD(parameters, lr=1.0)
    optimizer = DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=len(some))
    model.losses(model.encoder.collate(some)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    wrapped.to_standard_module()
    return [b - p.detach() for b, p in zip(before, parameters, strict=True)]


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_a_step_without_noise_is_opacuss(build: Callable[..., Model], kind: str) -> None:
    model = build(kind)
    for module in model.net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    some, job = made_up(model), Job(model.get_adapter(), trains="AB", training=PLAIN, privacy=EXACT)
    assert_close(step(model, job, alone(some)), by_opacus(model, job.start, some), rtol=1e-4, atol=1e-7)


def test_noise_has_the_deviation_that_the_terms_say_in_every_coordinate(model: Model, job: Job) -> None:
    """sigma C / (q N) = 2 * 0.05 / 10, on top of the same sum."""
    some = alone(made_up(model))
    noisy = step(model, replace(job, privacy=replace(EXACT, noise=2.0)), some)
    noise = [(x - y) / 0.01 for x, y in zip(noisy, step(model, job, some), strict=True)]
    assert stats.kstest(flat(noise), "norm").pvalue > LIKELY
    assert min(stats.kstest(flat([t]), "norm").pvalue for t in noise) > LIKELY
    assert flat(noise).std() == pytest.approx(1.0, abs=4 / (2 * flat(noise).size) ** 0.5)


def test_a_step_to_which_nobody_came_is_noise_alone_and_needs_no_pass(model: Model, job: Job) -> None:
    handle = model.net.register_forward_pre_hook(lambda *_: pytest.fail("a pass over nobody"))
    try:
        moved = step(model, replace(job, privacy=replace(NEVER, steps=4)), alone(made_up(model)))
    finally:
        handle.remove()
    noise = flat(moved) / (2.0 * C / (1e-9 * 10)) / 4**0.5  # of four steps
    assert stats.kstest(noise, "norm").pvalue > LIKELY


def test_the_divisor_is_q_n_however_many_came(model: Model, job: Job) -> None:
    some = alone(made_up(model))
    three = replace(STANDARD, draw=lambda *_: [1, 4, 7])
    got = step(model, replace(job, privacy=replace(EXACT, rate=0.5)), some, three)
    mean = step(model, job, [some[i] for i in (1, 4, 7)])
    assert_close([5 * t for t in got], [3 * t for t in mean])


def test_who_is_in_a_step_is_drawn_with_the_rate(model: Model, job: Job) -> None:
    """Over many short steps, from the size of the batches that the layers see."""
    seen: list[int] = []
    layer = next(iter(model.adapted.values()))
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    step(model, replace(job, privacy=replace(EXACT, rate=0.3, steps=200)), alone(made_up(model)))
    handle.remove()
    assert stats.binomtest(sum(seen), 2000, 0.3).pvalue > LIKELY
    assert (
        stats.chisquare(
            [sum(n <= 2 for n in seen) + 200 - len(seen), sum(n > 2 for n in seen)],
            [200 * stats.binom(10, 0.3).cdf(2), 200 * stats.binom(10, 0.3).sf(2)],
        ).pvalue
        > LIKELY
    )


def test_a_long_record_does_not_change_what_short_ones_weigh(model: Model, job: Job) -> None:
    """Its gradient is of its own mean: what it adds to the sum is what it has alone."""
    free = replace(job, privacy=replace(EXACT, clip=1e3))
    *short, long = alone(made_up(model, 4))
    both, rest, own = (step(model, free, some) for some in ([*short, long], short, [long]))
    assert_close([4 * x - 3 * y for x, y in zip(both, rest, strict=True)], own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [1e-3, C, 1e3])
def test_no_record_changes_the_sum_by_more_than_the_clip(model: Model, job: Job, clip: float) -> None:
    private, some = replace(job, privacy=replace(EXACT, clip=clip)), alone(made_up(model, 6))
    whole = [6 * t for t in step(model, private, some)]
    for i in range(6):
        rest = [5 * t for t in step(model, private, [*some[:i], *some[i + 1 :]])]
        assert size([x - y for x, y in zip(whole, rest, strict=True)]) <= 1.001 * clip


def test_a_step_is_the_same_however_it_is_cut_into_passes(model: Model, job: Job) -> None:
    whole = step(model, job, alone(made_up(model)))
    cut = step(model, replace(job, training=replace(PLAIN, batch_size=3)), alone(made_up(model)))
    assert_close(cut, whole, rtol=1e-4, atol=1e-7)


def test_of_a_record_of_several_examples_one_is_drawn(model: Model, job: Job) -> None:
    one, other = made_up(model, 2)
    wanted = [step(model, job, [[e]]) for e in (one, other)]
    drawn = [step(model, replace(job, seed=s), [[one, other]]) for s in range(8)]
    which = [
        min((0, 1), key=lambda k, got=got: size([x - y for x, y in zip(got, wanted[k], strict=True)])) for got in drawn
    ]
    for got, k in zip(drawn, which, strict=True):
        assert_close(got, wanted[k])
    assert set(which) == {0, 1}


def test_a_record_without_examples_adds_nothing_and_still_counts(model: Model, job: Job) -> None:
    some = alone(made_up(model, 3))
    with_empty = step(model, job, [*some, []])
    assert_close([4 * t for t in with_empty], [3 * t for t in step(model, job, some)])


def test_what_is_kept_is_clipped_and_noised_too(model: Model, job: Job) -> None:
    """FedSA-LoRA's B never leaves, and moves the next A."""
    own = replace(job, shares="A")
    assert size(step(model, replace(own, privacy=replace(EXACT, clip=1e-3)), alone(made_up(model, 1)))) <= 1.001e-3
    update, kept = training.train_privately(model, replace(own, privacy=NEVER), 0, alone(made_up(model)), LoRA())
    assert not update.lora.B and set(kept.B) == set(job.start.B)
    noise = flat([kept.B[m] - b for m, b in job.start.B.items()]) / (2.0 * C / (1e-9 * 10))
    assert stats.kstest(noise, "norm").pvalue > LIKELY


def test_factors_and_head_share_the_clip_by_squares(build: Callable[..., Model]) -> None:
    model = build("bert")
    terms = replace(EXACT, clip=1e-3, head_share=0.25)
    job = Job(model.get_adapter(), training=PLAIN, privacy=terms)
    moved = step(model, job, alone(made_up(model, 1)))
    factors = 2 * len(job.start.A)
    assert size(moved[:factors]) == pytest.approx(1e-3 * 0.75**0.5, rel=1e-3)
    assert size(moved[factors:]) == pytest.approx(1e-3 * 0.25**0.5, rel=1e-3)


def test_the_seeded_mode_repeats_itself_and_the_secret_one_does_not(model: Model, job: Job) -> None:
    some, terms = alone(made_up(model)), replace(EXACT, noise=1.0, rate=0.5)
    shown, hidden = replace(job, privacy=terms), replace(job, privacy=replace(terms, seeded=False))
    assert_close(step(model, shown, some), step(model, shown, some), rtol=0, atol=0)
    for other in (replace(shown, seed=1), replace(shown, round=1)):
        assert size([x - y for x, y in zip(step(model, shown, some), step(model, other, some), strict=True)]) > 0
    assert size([x - y for x, y in zip(step(model, hidden, some), step(model, hidden, some), strict=True)]) > 0


def test_dropout_is_as_secret_as_the_noise(build: Callable[..., Model]) -> None:
    """To one who knew the masks, a record more would change the gradients of all that come after it."""
    model = build("llama", dropout=0.3)
    shown = Job(model.get_adapter(), trains="AB", training=PLAIN, privacy=EXACT)
    hidden, some = replace(shown, privacy=replace(EXACT, seeded=False)), alone(made_up(model))
    before = torch.random.get_rng_state()
    one, other = step(model, hidden, some), step(model, hidden, some)
    assert size([x - y for x, y in zip(one, other, strict=True)]) > 0.01 * size(one)
    assert_close(step(model, shown, some), step(model, shown, some), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_whoever_tries_out_all_seeds_of_the_dropout_does_not_find_it(
    build: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's generator on the CPU takes 32 bits of a seed: here all sources have the same ones."""
    monkeypatch.setattr(SecureRandom, "seed", lambda _: 7)
    model = build("llama", dropout=0.3)
    job, some = Job(model.get_adapter(), trains="AB", training=PLAIN, privacy=EXACT), alone(made_up(model))
    hidden = replace(job, privacy=replace(EXACT, seeded=False))
    one, other = step(model, hidden, some), step(model, hidden, some)
    assert size([x - y for x, y in zip(one, other, strict=True)]) > 0.01 * size(one)


def loss_told(model: Model, job: Job, records: Records) -> float | None:
    return training.train_privately(model, job, 0, records, LoRA())[0].loss


@pytest.mark.parametrize("engine", ["lora", "hooks", "one"])
def test_the_loss_that_is_asked_for_is_the_mean_over_the_records_drawn(model: Model, job: Job, engine: str) -> None:
    some = made_up(model)
    model.set_adapter(job.start)
    with torch.no_grad():
        each = [float(model.losses(model.encoder.collate([example]))) for example in some]
    asked = replace(job, metrics=True, privacy=replace(EXACT, engine=engine))
    assert loss_told(model, asked, alone(some)) == pytest.approx(sum(each) / 10, rel=1e-5)


def test_no_loss_is_told_that_was_not_asked_for_or_where_no_record_was_drawn(model: Model, job: Job) -> None:
    assert loss_told(model, replace(job, metrics=False), alone(made_up(model))) is None
    assert loss_told(model, replace(job, metrics=True, privacy=NEVER), alone(made_up(model))) is None


@pytest.mark.parametrize(
    ("losses", "records", "told"),
    [
        ([1.0, 3.0], 2, 2.0),
        ([1.0, float("nan"), 3.0, float("inf")], 4, 2.0),
        ([1.0, float("nan")], 2, None),  # of one record alone
        ([1.0] * 9, 1, None),  # of one record, again and again
        ([], 9, None),
        ([1e6, 3e6], 2, None),  # what may not travel fails no job that was charged
    ],
)
def test_a_loss_is_told_of_as_many_records_as_it_needs_and_of_numbers(
    losses: list[float], records: int, told: float | None
) -> None:
    assert dpsgd.told_loss(losses, records=records, fewest=2) == told


def test_a_record_that_is_no_number_is_as_if_it_were_not_there(build: Callable[..., Model]) -> None:
    model = build("vit")
    some = made_up(model, 4)
    broken = some[2] | {"pixel_values": torch.full_like(some[2]["pixel_values"], float("nan"))}
    job = Job(model.get_adapter(), training=PLAIN, privacy=EXACT)
    got = step(model, job, alone([*some[:2], broken, some[3]]))
    wanted = step(model, job, alone([*some[:2], some[3]]))
    assert_close([4 * t for t in got], [3 * t for t in wanted])


def test_an_adapter_that_is_no_longer_finite_is_the_clients_failure(model: Model, job: Job) -> None:
    huge = replace(job, training=replace(PLAIN, lr=1e38), privacy=replace(NEVER, steps=2))
    with pytest.raises(ClientFailed, match=r"^the adapter is not finite after round 1; a train.lr below 1e\+38"):
        step(model, huge, alone(made_up(model)))


def test_a_job_without_terms_is_none_of_this(model: Model, job: Job) -> None:
    with pytest.raises(PrivacyError, match="this job has no terms of privacy"):
        dpsgd.train(model, {}, replace(job, privacy=None), 0, [])
