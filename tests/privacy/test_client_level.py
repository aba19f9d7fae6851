"""Client-level privacy: what one client can move, how much noise hides it, and what the clip follows."""

from math import exp, sqrt

import pytest
import torch
from scipy import stats

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge
from fedlora.lora import SIDES, LoRA
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.client_level import ClientLevelDP, ClippedSum
from fedlora.strategy import Client, Job
from tests.support.adapters import factors

START = factors(0, dtype=torch.float32)
JOB = Job(START)
CLIENTS = [Client(i, 10, 4) for i in range(400)]


def mechanism(**other: float) -> ClientLevelDP:
    settings = {"noise": 1.0, "rate": 0.1, "population": 400, "delta": 1e-4, "clip": 1.0, "seed": 3} | other
    return ClientLevelDP(**settings)  # type: ignore[arg-type]


def moved(length: float, seed: int) -> LoRA:
    """The start, moved by a step of this length over all sides."""
    step = factors(seed, dtype=torch.float32)
    size = norm(step)
    return LoRA(**{s: {m: t + length / size * step.side(s)[m] for m, t in START.side(s).items()} for s in SIDES})


def norm(lora: LoRA, less: LoRA = LoRA()) -> float:  # noqa: B008
    squares = (
        float((t.double() - less.side(s).get(m, torch.zeros(())).double()).square().sum())
        for s in SIDES
        for m, t in lora.side(s).items()
    )
    return sqrt(sum(squares))


def total(clip: float, updates: list[LoRA]) -> ClippedSum:
    got = ClippedSum(clip)
    for update in updates:
        got.add(JOB, update)
    return got


def apart(one: ClippedSum, other: ClippedSum) -> float:
    return sqrt(sum(float((t - other.total.get(k, 0.0)).square().sum()) for k, t in one.total.items()))


@pytest.mark.parametrize("clip", [1e-3, 0.5, 10.0])
def test_one_client_moves_the_sum_by_the_clip_and_no_more(clip: float) -> None:
    updates = [moved(length, seed) for seed, length in enumerate((0.01, 0.4, 2.0, 1e4))]
    whole = total(clip, updates)
    changes = [apart(whole, total(clip, [*updates[:i], *updates[i + 1 :]])) for i in range(4)]
    assert max(changes) <= clip * (1 + 1e-9) and max(changes) > 0.9 * min(clip, 1e4)


def test_all_that_is_sent_is_clipped_as_one() -> None:
    """Eight matrices clipped apart would move the sum by 2.8 times the clip."""
    assert apart(total(1.0, [moved(50.0, 1)]), ClippedSum(1.0)) == pytest.approx(1.0)


def test_a_short_update_is_left_as_it_is() -> None:
    assert apart(total(1.0, [moved(0.3, 1)]), ClippedSum(1.0)) == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_counts_as_nothing(bad: float) -> None:
    broken = LoRA(START.A, {m: torch.full_like(b, bad) for m, b in START.B.items()}, START.H)
    good = moved(0.3, 1)
    assert apart(total(1.0, [good, broken]), total(1.0, [good])) == 0.0


def test_the_released_update_is_the_start_moved_by_the_sum_over_the_clients_expected() -> None:
    client_level, updates = mechanism(noise=1e-9), [moved(0.5, 1), moved(0.25, 2)]
    release = client_level.release(total(1.0, updates), START, 0, ())
    for s in SIDES:
        for m, t in START.side(s).items():
            wanted = t + sum(u.side(s)[m] - t for u in updates) / 40
            torch.testing.assert_close(release.update.side(s)[m], wanted)


def test_the_noise_is_normal_with_the_deviation_that_was_paid_for() -> None:
    client_level = mechanism(noise=2.0)
    released = client_level.release(ClippedSum(0.5), START, 0, ()).update
    noise = torch.cat([(released.side(s)[m] - t).flatten() for s in SIDES for m, t in START.side(s).items()]) * 40
    assert stats.kstest(noise.numpy(), "norm", args=(0, 2.0 * 0.5)).pvalue > 0.001
    assert not torch.equal(released.A["q"], client_level.release(ClippedSum(0.5), START, 1, ()).update.A["q"])


def test_a_round_in_which_nobody_was_drawn_is_noise_alone() -> None:
    assert norm(mechanism().release(ClippedSum(1.0), START, 0, ()).update, START) > 0


def test_clients_are_drawn_each_by_itself() -> None:
    sizes = [len(mechanism().sample(CLIENTS, t)) for t in range(300)]
    low, high = stats.chi2.ppf([0.001, 0.999], 299) / 299 * 400 * 0.1 * 0.9
    assert low < torch.tensor(sizes, dtype=torch.float64).var() < high
    assert sum(sizes) / 300 == pytest.approx(40, abs=1.5)


def test_in_secret_no_two_runs_draw_or_add_the_same() -> None:
    one, two = (ClientLevelDP(noise=1.0, rate=0.5, population=400, delta=1e-4, clip=1.0) for _ in range(2))
    assert one.sample(CLIENTS, 0) != two.sample(CLIENTS, 0)
    drawn = [c.release(ClippedSum(1.0), START, 0, ()).update.A["q"] for c in (one, two)]
    assert not torch.equal(*drawn)


def test_epsilon_is_that_of_all_rounds() -> None:
    client_level, charges = mechanism(noise=2.0), ()
    for t in range(3):
        charges = client_level.charge(charges)
        release = client_level.release(ClippedSum(1.0), START, t, charges)
    assert release.charges == (Charge(noise=2.0, rate=0.1, steps=3),)
    assert release.epsilon == epsilon([Charge(noise=2.0, rate=0.1, steps=3)], delta=1e-4)


def test_a_round_that_would_pass_the_budget_is_refused_before_it_begins() -> None:
    two = epsilon([Charge(noise=2.0, rate=0.1, steps=2)], delta=1e-4)
    client_level = mechanism(noise=2.0, limit=two)
    charges = client_level.charge(client_level.charge(()))
    with pytest.raises(PrivacyError, match="one more round would bring epsilon from"):
        client_level.charge(charges)


@pytest.mark.parametrize("start", [0.05, 20.0])
def test_the_clip_goes_to_the_quantile_from_both_sides(start: float) -> None:
    """Norms spread from 0 to 2, of which half are below 1: Flower's wrapper goes the other way."""
    client_level, clip = mechanism(noise=0.05, quantile=0.5, rate=0.1), start
    for t in range(60):
        updates = [moved(2 * (i + 0.5) / 40, i) for i in range(40)]
        clip = client_level.release(total(clip, updates), START, t, ()).next_clip
    assert clip == pytest.approx(1.0, rel=0.25)


def test_one_step_of_the_clip_is_the_published_rule() -> None:
    client_level = mechanism(noise=1e-9, quantile=0.5)
    got = total(1.0, [moved(0.5, i) for i in range(30)] + [moved(2.0, i) for i in range(10)])
    assert client_level.release(got, START, 0, ()).next_clip == pytest.approx(exp(-0.2 * (0.75 - 0.5)), rel=1e-6)


def test_following_a_quantile_is_paid_for_out_of_the_same_noise() -> None:
    """1/z^2 = 1/z_D^2 + 1/(2 s)^2, as sensitivities are C and 1/2."""
    client_level = mechanism(noise=1.3, quantile=0.5)
    parts = 1 / client_level.sum_noise**2, 1 / (2 * client_level.count_noise) ** 2
    assert sum(parts) == pytest.approx(1 / 1.3**2)


def test_noise_to_signal_is_what_is_seen() -> None:
    client_level = mechanism(noise=2.0)
    noise = norm(client_level.release(ClippedSum(1.0), START, 0, ()).update, START)
    numbers = sum(t.numel() for s in SIDES for t in START.side(s).values())
    assert noise == pytest.approx(client_level.noise_to_signal(numbers), rel=0.15)
