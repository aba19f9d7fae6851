"""Updates as whole numbers: how far off a sum is, that no norm grows, and that nothing wraps."""

from math import fsum

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.errors import SecureError
from fedlora.privacy.masked_update import decode, encode
from fedlora.privacy.secure_aggregation import unmask
from tests.privacy.test_secure_aggregation import Sealed, add, joined, mask

REACH = st.sampled_from([1.0, 0.1, 3.7, 1e-3, 2.0**-5, 1e6])


@given(st.integers(3, 200), REACH, st.integers(0, 99))
def test_the_sum_is_off_by_less_than_a_step_for_each_member(members: int, reach: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    weights = draw.dirichlet(np.ones(members))
    deltas = draw.uniform(-reach, reach, (members, 20)) * 10.0 ** draw.integers(-8, 1, 20)
    coded = [encode(d, weight=w, reach=reach, members=members) for d, w in zip(deltas, weights, strict=True)]
    total = np.add.reduce(coded, dtype=np.uint32)
    exact = [fsum(column) for column in (deltas * weights[:, None]).T]
    step = decode(np.ones(1, np.uint32), reach=reach, members=members)[0]
    assert step <= 2 * reach / (2**31 - 1 - members)
    assert np.abs(decode(total, reach=reach, members=members) - exact).max() < members * step


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(0, 1), st.integers(1, 1000))
def test_no_coordinate_and_so_no_norm_grows(delta: list[float], weight: float, members: int) -> None:
    x = np.array(delta)
    coded = decode(encode(x, weight=weight, reach=1.0, members=members), reach=1.0, members=members)
    assert (np.abs(coded) <= np.abs(x * weight)).all() and (coded * x >= 0).all()
    assert np.linalg.norm(coded) <= np.linalg.norm(x * weight)


@example(4, 1.0, 1)
@given(st.integers(1, 2**20), st.floats(1e-6, 1e6), st.sampled_from([-1, 1]))
def test_the_sum_does_not_wrap_at_the_extreme(members: int, reach: float, sign: int) -> None:
    one = encode(np.array([sign * reach]), weight=1 / members, reach=reach, members=members)
    total = int(one.view(np.int32)[0]) * members
    assert abs(total) < 2**31
    wrapped = np.array([total % 2**32], np.uint32)
    assert decode(wrapped, reach=reach, members=members)[0] == pytest.approx(sign * reach, rel=members * 2.0**-29)


@pytest.mark.parametrize("value", [1.001, -7.0, np.inf, -np.inf, np.nan])
def test_what_is_beyond_reach_is_refused_and_not_clipped(value: float) -> None:
    with pytest.raises(SecureError, match=r"largest value of an update is .*, beyond 1: raise secure.reach"):
        encode(np.array([0.5, value, -0.1]), weight=0.1, reach=1.0, members=10)


@pytest.mark.parametrize(
    ("weight", "reach", "members", "says"),
    [
        (1.5, 1.0, 3, "a weight is 1.5"),
        (np.nan, 1.0, 3, "a weight is nan"),
        (0.5, 0.0, 3, "reach is 0"),
        (0.5, 1.0, 0, "for 0"),
    ],
)
def test_a_setting_that_encodes_nothing_is_refused(weight: float, reach: float, members: int, says: str) -> None:
    with pytest.raises(SecureError, match=says):
        encode(np.zeros(2), weight=weight, reach=reach, members=members)


def test_floats_go_through_a_round() -> None:
    draw: NDArray[np.float64] = np.random.default_rng(0).normal(0, 1e-3, (4, 100))
    members, cohort = joined(4)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    vectors = {i: encode(x, weight=0.25, reach=1.0, members=4) for i, x in zip(members, draw, strict=True)}
    masked = mask(members, sealed, vectors)
    total = unmask(
        cohort, add(masked), list(masked), {i: m.reveal(masked) for i, m in members.items()}, owners=list(members)
    )
    np.testing.assert_allclose(decode(total, reach=1.0, members=4), draw.mean(0), rtol=0, atol=4 * 2.0**-30)
