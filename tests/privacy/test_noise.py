"""Random numbers: their distribution, and that nobody draws one twice."""

import numpy as np
import pytest
import torch
from scipy import stats

from fedlora import twister
from fedlora.errors import PrivacyError
from fedlora.privacy.noise import SecureRandom, secret_draws

LIKELY = 1e-4  # the seeds are fixed: a p-value below it is a fault, not bad luck
MANY = 200_000


def numbers(seed: int = 1) -> SecureRandom:
    return SecureRandom.seeded(seed)


def test_uniform_numbers_are_uniform_and_never_at_an_end() -> None:
    u = numbers().uniform(MANY)
    assert stats.kstest(u, "uniform").pvalue > LIKELY
    assert u.min() > 0 and u.max() < 1 and u.dtype == np.float64
    grid = u * 2**53
    assert np.array_equal(grid, np.round(grid)) and bool((grid % 2 == 1).all())


@pytest.mark.parametrize("n", [MANY, MANY + 1])
def test_normal_numbers_are_normal(n: int) -> None:
    z = numbers(n).normal(n)
    assert z.dtype == torch.float64 and z.shape == (n,)
    assert stats.kstest(z.numpy(), "norm").pvalue > LIKELY
    for power, moment in enumerate((0, 1, 0, 3, 0, 15), 1):
        spread = float((z ** (2 * power)).mean()) ** 0.5 / n**0.5
        assert abs(float((z**power).mean()) - moment) < 4 * spread
    assert 4 < float(z.abs().max()) < 8.6


def test_both_halves_of_a_draw_are_independent() -> None:
    """Box and Muller's transform makes two numbers out of one radius: their sizes must not betray one another."""
    x, y = numbers(3).normal(2, MANY).numpy()
    for u, v in ((x, y), (x**2, y**2), (abs(x), abs(y))):
        assert abs(np.corrcoef(u, v)[0, 1]) * MANY**0.5 < 4
    assert stats.kstest(x**2 + y**2, stats.chi2(2).cdf).pvalue > LIKELY


def test_normal_numbers_have_the_shape_that_is_asked_for() -> None:
    assert numbers().normal(3, 4, 5).shape == (3, 4, 5)
    assert numbers().normal().shape == () and numbers().normal(1).shape == (1,)


def test_a_test_of_normality_sees_a_scale_that_is_two_percent_off() -> None:
    """So that the tests above mean something."""
    z = numbers().normal(MANY).numpy()
    assert stats.kstest(1.02 * z, "norm").pvalue < LIKELY > stats.kstest(z + 0.02, "norm").pvalue


def test_no_number_is_drawn_twice() -> None:
    source = numbers()
    every = torch.cat([source.normal(1000) for _ in range(200)])
    assert len(torch.unique(every)) == len(every)
    assert len(np.unique(np.concatenate([source.uniform(7) for _ in range(9000)]))) == 63_000


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    assert torch.equal(numbers(5).normal(100), numbers(5).normal(100))
    assert numbers(5).poisson_sample(100, 0.3) == numbers(5).poisson_sample(100, 0.3)
    assert numbers(5).seed() == numbers(5).seed() != numbers(6).seed()
    x, y = numbers(5).normal(MANY), numbers(6).normal(MANY)
    assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) * MANY**0.5 < 4


def test_one_stream_goes_on_however_it_is_cut() -> None:
    whole, cut = numbers(8), numbers(8)
    assert np.array_equal(whole.uniform(50), np.concatenate([cut.uniform(20), cut.uniform(30)]))


def test_a_secret_source_is_never_the_same() -> None:
    sources = [SecureRandom.secret() for _ in range(50)]
    assert len({s.seed() for s in sources}) == 50
    assert len(torch.unique(torch.cat([s.normal(100) for s in sources]))) == 5000


def test_torchs_seed_changes_nothing() -> None:
    torch.manual_seed(0)
    one = SecureRandom.secret().normal(10)
    torch.manual_seed(0)
    assert not torch.equal(one, SecureRandom.secret().normal(10))


def test_a_sample_is_poisson() -> None:
    """How many come is binomial, each as often as every other, and no two of them together."""
    source, n, rate, draws = numbers(9), 40, 0.3, 5000
    came = np.zeros((draws, n))
    for row in came:
        row[source.poisson_sample(n, rate)] = 1
    sizes = np.bincount(came.sum(1).astype(int), minlength=n + 1)
    expected = draws * stats.binom(n, rate).pmf(np.arange(n + 1))
    some = expected > 5
    bins = [(*counts[some], counts[~some].sum()) for counts in (sizes, expected)]
    assert stats.chisquare(*bins).pvalue > LIKELY
    assert min(stats.binomtest(int(c), draws, rate).pvalue for c in came.sum(0)) > LIKELY
    together = np.corrcoef(came.T)[~np.eye(n, dtype=bool)]
    assert np.abs(together).max() * draws**0.5 < 5


def test_a_sample_at_the_ends_is_all_or_next_to_nothing() -> None:
    assert numbers().poisson_sample(50, 1.0) == list(range(50))
    assert numbers().poisson_sample(50, 1e-12) == [] == numbers().poisson_sample(0, 0.5)


def test_one_of_several_is_any_of_them_alike() -> None:
    source = numbers(2)
    counts = np.bincount([source.one_of(7) for _ in range(14_000)], minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > LIKELY
    assert {source.one_of(1) for _ in range(10)} == {0}


def test_dropout_draws_from_a_generator_that_is_filled_with_the_keys_stream() -> None:
    """A Mersenne Twister's next numbers follow from all 624 words of its state, and here from these alone."""
    before, key = torch.get_rng_state(), bytes(range(32))
    with secret_draws(key):
        found = torch.randint(2**20, (2000,)).numpy()
    stream = SecureRandom(key)
    stream.seed()
    twister = np.random.RandomState()
    twister.set_state(("MT19937", stream.words(624).astype(np.uint32), 624, 0, 0.0))
    assert np.array_equal(found, twister.randint(0, 2**32, 2000, dtype=np.uint32) % 2**20)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twister, "_PLACE", slice(32, 32 + 624 * 8))
    with pytest.raises(PrivacyError, match="dropout would be no secret"), secret_draws(bytes(32)):
        pass
