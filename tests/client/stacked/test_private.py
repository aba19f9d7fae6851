"""DP-SGD of many clients in one pass, against DP-SGD of each by itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from fedlora.checks.small_models import KINDS, Kind, SmallModel, small_model
from fedlora.client import training
from fedlora.client.stacked import private, support
from fedlora.client.stacked.row_pass import NotStackableError
from fedlora.client.training import Trained, TrainingTask
from fedlora.encoding.encoder import Records
from fedlora.errors import ClientFailed, DataError, TrainingDiverged
from fedlora.jobs import Job, PrivacyTerms
from fedlora.lora import leading, map_factors
from fedlora.models.model import Model
from fedlora.privacy import preflight
from fedlora.privacy.dpsgd import STANDARD, Mechanism
from fedlora.privacy.noise import SecureRandom
from fedlora.sections import LoRAConfig, Training
from fedlora.seeds import seeded
from fedlora.strategies.la_lora import FILTER
from fedlora.strategy import load
from tests.support.cohorts import NOTHING, compared, double, filled, furthest, in_one_pass, one_by_one, rounds, tasks_of
from tests.support.float64 import in_float64

C = 0.05  # about half of the records' gradients are longer
TERMS = PrivacyTerms(noise=0.5, clip=C, head_share=0.3, rate=0.5, steps=3, delta=1e-5, seeded=True)
UNLIKE = tuple(replace(TERMS, noise=0.5 + i, rate=(0.2, 0.5, 0.9)[i], steps=(1, 3, 2)[i]) for i in range(3))
EXACT = replace(TERMS, noise=0.0, rate=1.0, steps=1)
NEVER = replace(TERMS, noise=2.0, rate=1e-9, steps=1)  # nobody is drawn
ADAMW = Training(lr=1e-2, batch_size=3)
PLAIN = Training(optimizer="sgd", lr=1.0, batch_size=16)  # a step is the gradient itself
LIKELY = 1e-4  # all seeds are fixed
SETTINGS = {
    "momentum, decay and FedProx": Job(
        NOTHING, training=Training(optimizer="sgd", lr=0.3, momentum=0.9, weight_decay=0.1, prox=0.5)
    ),
    "a clip of the batch's, which is none of DP-SGD's": Job(NOTHING, training=replace(ADAMW, clip=1e-3)),
    "sides in turn": Job(
        NOTHING, turns=("B", "AH"), smoothing=FILTER, training=replace(ADAMW, weight_decay=0.1, prox=0.5)
    ),
    "B alone": Job(NOTHING, trains="B", shares="B", training=ADAMW),
    "A and a head that stays": Job(NOTHING, trains="AH", shares="A", training=ADAMW),
    "going on from its own factors": Job(NOTHING, resumes=True, training=ADAMW),
}


def unlike(job: Job) -> list[Job]:
    """The job on three terms."""
    return [replace(job, privacy=terms) for terms in UNLIKE]


@pytest.mark.parametrize("kind", KINDS)
def test_three_rounds_come_to_the_same_adapter_with_the_same_draws_and_noise(kind: Kind) -> None:
    small = small_model(kind)
    with in_float64(small.model):
        job = Job(NOTHING, training=ADAMW)
        serial, stacked = rounds(small, unlike(job), one_by_one), rounds(small, unlike(job), in_one_pass)
    assert furthest(serial, stacked) < 1e-7
    assert furthest(serial, small.start) > 1e-3


@pytest.mark.parametrize("job", SETTINGS.values(), ids=list(SETTINGS))
def test_what_a_private_job_asks_of_one_client_it_has_of_many(job: Job) -> None:
    small = small_model("bert")
    with in_float64(small.model):
        serial, stacked = rounds(small, unlike(job), one_by_one), rounds(small, unlike(job), in_one_pass)
    assert furthest(serial, stacked) < 1e-7


def test_what_a_lower_rank_lacks_gets_no_noise() -> None:
    small = small_model("bert")
    starts = [leading(filled(small.start, i), rank) for i, rank in enumerate((1, 2, 1))]
    assert compared(small, [Job(start, training=ADAMW, privacy=TERMS) for start in starts]) < 1e-7


def test_a_core_between_the_factors_is_trained_privately() -> None:
    small = small_model("llama")
    start = double(load("fed_sb").init(filled(small.start, 0)))
    assert compared(small, [Job(start, trains="R", shares="R", training=ADAMW, privacy=TERMS)] * 3) < 1e-7


def test_heads_of_a_core_are_trained_privately_and_their_scales_are_not() -> None:
    small = small_model("bert")
    start = double(load("ravan").init(filled(small.start, 0)))
    plain = Job(start, trains="RH", shares="RH", training=ADAMW, privacy=TERMS)
    scaled = replace(plain, scales=True)
    assert compared(small, [scaled] * 3) < 1e-7
    with in_float64(small.model):
        (one, _), (other, _) = (one_by_one(small, tasks_of(small, [job]))[0] for job in (plain, scaled))
    assert furthest(one.lora, other.lora) == 0 and furthest(one.lora, start.only("RH")) > 1e-3


def sums(small: SmallModel, records: Sequence[Records], clip: float) -> list[torch.Tensor]:
    """The clipped sum of each client, over one pass of all of their records, without dropout."""
    terms = replace(EXACT, clip=clip, seeded=False)
    start = map_factors(lambda t: t + 0.05, small.start)
    jobs = [Job(start, training=replace(PLAIN, lr=len(own)), privacy=terms) for own in records]
    tasks = [
        TrainingTask(client=i, job=job, kept=NOTHING, records=own)
        for i, (job, own) in enumerate(zip(jobs, records, strict=True))
    ]
    with preflight.no_dropout(small.model.net.train()):
        results = in_one_pass(small, tasks)
    return [
        torch.cat([(start.side(s)[m] - t).flatten() for s, m, t in update.lora.matrices()]) for update, _ in results
    ]


@pytest.mark.parametrize("clip", [1e-3, C, 1e3])
def test_a_record_moves_its_own_clients_sum_by_the_clip_and_no_others(clip: float) -> None:
    small = small_model("bert")
    own = [data.records for data in small.clients]
    whole = sums(small, own, clip)
    for i in range(len(own[0])):
        fewer = sums(small, [[*own[0][:i], *own[0][i + 1 :]], own[1], own[2]], clip)
        changes = [float((x - y).norm()) for x, y in zip(whole, fewer, strict=True)]
        assert changes[0] <= 1.001 * clip
        assert max(changes[1:]) <= 1e-4 * clip


def test_pieces_of_any_size_come_to_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_model("llama")
    records = [data.records for data in small.clients]
    whole = sums(small, records, C)
    monkeypatch.setattr("fedlora.client.stacked.adapters.MOST_BYTES", 1)
    assert max(float((x - y).norm()) for x, y in zip(whole, sums(small, records, C), strict=True)) < 1e-5 * C


def test_noise_of_each_client_is_its_own_and_of_the_deviation_of_its_terms() -> None:
    """A step to which nobody came is noise alone, without a pass: sigma C / (q N) in every coordinate."""
    small = small_model("bert")
    terms = [replace(NEVER, seeded=False, noise=1.0 + i) for i in range(3)]
    tasks = tasks_of(small, [Job(small.start, training=PLAIN, privacy=p) for p in terms])
    private.check_once(small.model, tasks[0].job)
    handle = small.model.net.register_forward_pre_hook(lambda *_: pytest.fail("a pass over nobody"))
    try:
        results = in_one_pass(small, tasks)
    finally:
        handle.remove()
    noise = []
    for task, p, (update, _) in zip(tasks, terms, results, strict=True):
        unit = p.noise * p.clip / (p.rate * len(task.records))
        noise.append(torch.cat([(t - small.start.side(s)[m]).flatten() for s, m, t in update.lora.matrices()]) / unit)
        assert stats.kstest(noise[-1].double().numpy(), "norm").pvalue > LIKELY
    assert abs(float(torch.corrcoef(torch.stack(noise))[0, 1])) < 5 / noise[0].numel() ** 0.5


def with_dropout(small: SmallModel, terms: PrivacyTerms) -> list[Trained]:
    drops = [m for m in small.model.net.modules() if isinstance(m, torch.nn.Dropout)]
    assert any(m.p for m in drops)
    return in_one_pass(small, tasks_of(small, [Job(small.start, training=PLAIN, privacy=terms)] * 3))


def test_dropout_is_as_secret_as_the_noise_and_leaves_no_trace() -> None:
    small = small_model("bert")
    before = torch.random.get_rng_state()
    hidden = replace(EXACT, seeded=False)
    one, other = (with_dropout(small, hidden)[1][0].lora for _ in range(2))
    assert furthest(one, other) > 1e-6
    shown, again = (with_dropout(small, EXACT)[1][0].lora for _ in range(2))
    assert furthest(shown, again) == 0
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_tell_the_losses_that_each_tells_by_itself(kind: Kind) -> None:
    small = small_model(kind)
    jobs = [replace(job, start=small.start, metrics=True) for job in unlike(Job(NOTHING, training=ADAMW))]
    with in_float64(small.model):
        serial, stacked = (run(small, tasks_of(small, jobs)) for run in (one_by_one, in_one_pass))
    wanted, told = ([update.loss or 0.0 for update, _ in results] for results in (serial, stacked))
    assert sum(loss > 0 for loss in told) > 1  # a client that drew no record tells none
    assert told == pytest.approx(wanted, rel=1e-6)
    silent = [replace(job, metrics=False) for job in jobs]
    assert all(update.loss is None for update, _ in in_one_pass(small, tasks_of(small, silent)))


def test_the_dropout_of_a_pass_is_secret_as_long_as_one_clients_source_is() -> None:
    small = small_model("bert")
    jobs = [Job(small.start, training=PLAIN, privacy=replace(EXACT, seeded=i > 0)) for i in range(3)]
    keys = {private.PrivateCohort(small.model, tasks_of(small, jobs)).dropout_key() for _ in range(3)}
    assert len(keys) == 3


def test_whoever_tries_out_all_seeds_of_the_dropout_of_a_pass_does_not_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's generator on the CPU takes 32 bits of a seed: here all sources have the same ones."""
    monkeypatch.setattr(SecureRandom, "seed", lambda _: 7)
    small, hidden = small_model("bert"), replace(EXACT, seeded=False)
    one, other = (with_dropout(small, hidden)[1][0].lora for _ in range(2))
    assert furthest(one, other) > 1e-6


def test_the_checks_switch_off_every_dropout_of_a_pass() -> None:
    """That of modules, and that of the quick attention, which no module has."""
    small = small_model("bert")
    one, other = (sums(small, [data.records for data in small.clients], C) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_records_are_counted() -> None:
    small = small_model("bert")
    results = in_one_pass(small, tasks_of(small, [Job(small.start, training=PLAIN, privacy=TERMS)] * 3))
    assert [update.examples for update, _ in results] == [4, 6, 8]


def test_a_client_whose_adapter_is_no_longer_finite_fails_alone() -> None:
    small = small_model("bert")
    wild = replace(PLAIN, lr=1e38)
    jobs = [Job(small.start, training=t, privacy=p) for t, p in ((PLAIN, TERMS), (wild, NEVER), (PLAIN, TERMS))]
    first, second, third = private.train(small.model, tasks_of(small, jobs))
    assert isinstance(second, TrainingDiverged) and "the adapter is not finite after round 1" in str(second)
    for well in (first, third):
        assert not isinstance(well, Exception)
        assert all(bool(t.isfinite().all()) for _, _, t in well[0].lora.matrices())


def test_a_client_without_records_fails_alone() -> None:
    small = small_model("bert")
    tasks = tasks_of(small, [Job(small.start, training=PLAIN, privacy=TERMS)] * 3)
    first, second, _ = private.train(small.model, [tasks[0], replace(tasks[1], records=()), tasks[2]])
    assert isinstance(second, ClientFailed) and not isinstance(first, Exception)


class Broken(list[Any]):
    """Records of which none can be read."""

    def __getitem__(self, place: Any) -> Any:
        raise DataError("row 4 is damaged")


def test_a_client_whose_records_break_the_pass_fails_alone() -> None:
    small = small_model("bert")
    job = Job(small.start, training=PLAIN, privacy=replace(EXACT, rate=1.0))
    tasks = tasks_of(small, [job] * 3)
    broken = replace(tasks[1], records=Broken([0]))
    first, second, third = private.train(small.model, [tasks[0], broken, tasks[2]])
    assert isinstance(second, DataError)
    alone = [training.perform(small.model, task) for task in (tasks[0], tasks[2])]
    for (update, _), found in zip(alone, (first, third), strict=True):
        assert not isinstance(found, Exception) and furthest(update.lora, found[0].lora) == 0


def test_a_pass_that_mixes_records_is_refused_before_any_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_model("bert")
    job = Job(small.start, trains="A", shares="A", training=PLAIN, privacy=TERMS)
    tasks = [replace(t, records=Broken([0])) for t in tasks_of(small, [job] * 3)]
    norm = next(m for m in small.model.net.modules() if isinstance(m, torch.nn.LayerNorm))
    monkeypatch.setattr(norm, "forward", lambda x: x - x.mean(0, keepdim=True))
    with pytest.raises(NotStackableError, match=r"gradients of single records are \d+% off what each has alone"):
        private.train(small.model, tasks)


def test_what_one_pass_is_not_for_is_said() -> None:
    small = small_model("bert")

    def why(**terms: Any) -> str | None:
        return support.why_not(small.model, Job(small.start, privacy=replace(TERMS, **terms)))

    assert why() is None and why(engine="lora") is None
    assert why(engine="hooks") == "dp.engine = hooks finds the gradients of one client's records at a time"
    assert "dp.engine = one" in str(why(engine="one"))


def test_over_a_base_of_16_bits_private_records_are_taken_one_at_a_time() -> None:
    small = small_model("bert")
    config = replace(small.config, dtype="bfloat16")
    model = Model(config, LoRAConfig(rank=2), small.schema, seed=0)
    assert "move each other's gradients by rounding" in str(support.why_not(model, Job(small.start, privacy=TERMS)))


def test_a_mechanism_watches_its_own_client_and_stands_around_the_gradients() -> None:
    small, seen = small_model("bert"), dict[int, Any]()
    rows: list[int] = []

    def counted(inner: Any) -> Any:
        def gradients(examples: Any, owner: torch.Tensor) -> torch.Tensor:
            rows.extend(owner.tolist())
            return inner(examples, owner)

        return gradients

    def watching(i: int) -> Mechanism:
        return replace(STANDARD, watch=lambda read: seen.update({i: read}), rows=counted if i == 0 else lambda g: g)

    job = Job(small.start, training=PLAIN, privacy=EXACT)
    tasks = [replace(t, mechanism=watching(i)) for i, t in enumerate(tasks_of(small, [job] * 3))]
    with seeded(1):
        results = in_one_pass(small, tasks)
    assert sorted(rows) == [0] * 4 + [1] * 6 + [2] * 8
    assert all(furthest(seen[i](), update.lora) == 0 for i, (update, _) in enumerate(results))
