"""Secure aggregation: exact sums whoever drops out, and what neither the server nor a member can be made to give."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest
from Crypto.Protocol.SecretSharing import Shamir
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import SecureError
from fedlora.privacy import secure_aggregation
from fedlora.privacy.secure_aggregation import (
    Keys,
    Participant,
    Ring,
    Roster,
    fewest_members,
    least_threshold,
    unmask,
)

ROUND = "run 7, round 3"
STEPS = ("joined", "shared", "masked", "revealed")  # the last thing that a member did before it fell silent
Sealed = dict[int, Mapping[int, bytes]]  # sender -> receiver -> shares


def again(member: Participant) -> Participant:
    """The member in a new process."""
    return Participant.loads(member.dumps())


def joined(n: int, threshold: int = 0, context: str = ROUND) -> tuple[dict[int, Participant], Roster]:
    members = {i: Participant.join(i, context) for i in range(10, 10 + n)}
    return members, Roster(context, {i: m.keys for i, m in members.items()}, threshold or max(3, n // 2 + 1))


def inbox(sealed: Sealed, to: int) -> dict[int, bytes]:
    return {sender: shares[to] for sender, shares in sealed.items() if sender != to}


def mask(members: dict[int, Participant], sealed: Sealed, vectors: Mapping[int, Ring]) -> dict[int, Ring]:
    return {i: members[i].mask(x, inbox(sealed, i)) for i, x in vectors.items()}


def add(vectors: Mapping[int, Ring]) -> Ring:
    total: Ring = np.add.reduce(list(vectors.values()), dtype=np.uint32) if vectors else np.zeros(0, np.uint32)
    return total


def random(n: int, size: int = 50) -> dict[int, Ring]:
    draw = np.random.default_rng(n)
    return {i: draw.integers(0, 2**32, size, dtype=np.uint32) for i in range(10, 10 + n)}


def to_masked(n: int, size: int = 50) -> tuple[dict[int, Participant], Roster, dict[int, Ring], dict[int, Ring]]:
    """A round in which everybody has sent a masked vector: members, cohort, vectors, masked vectors."""
    members, cohort = joined(n)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    return members, cohort, random(n, size), mask(members, sealed, random(n, size))


def serve(n: int, threshold: int, last: Collection[str]) -> tuple[Ring, Ring]:
    """A whole round, each member in a new process for every step: the sum brought out, and the sum it should be."""
    members, cohort = joined(n, threshold)
    did = {i: STEPS.index(step) for i, step in zip(members, last, strict=True)}
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items() if did[i] >= 1}
    members = {i: again(m) for i, m in members.items()}
    vectors = {i: x for i, x in random(n).items() if did[i] >= 2}
    masked = mask(members, sealed, vectors)
    members = {i: again(m) for i, m in members.items()}
    revealed = {i: members[i].reveal(masked) for i in masked if did[i] == 3}
    return unmask(cohort, add(masked), list(masked), revealed, owners=list(sealed)), add(vectors)


@given(st.lists(st.sampled_from(STEPS + 4 * STEPS[3:]), min_size=3, max_size=7), st.integers(0, 2))
def test_the_sum_is_exact_whoever_drops_out_and_whenever(last: list[str], more: int) -> None:
    threshold = min(len(last), max(3, len(last) // 2 + 1) + more)
    if last.count("revealed") >= threshold:
        total, expected = serve(len(last), threshold, last)
        np.testing.assert_array_equal(total, expected)
    else:
        with pytest.raises(SecureError, match=r"members .*, . must; begin a new round"):
            serve(len(last), threshold, last)


@pytest.mark.parametrize("step", STEPS[:3])
def test_the_sum_is_exact_after_one_dropout(step: str) -> None:
    total, expected = serve(5, 3, ["revealed", step, "revealed", "revealed", "masked"])
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("step", STEPS[:3])
def test_a_round_that_too_many_left_is_refused(step: str) -> None:
    with pytest.raises(SecureError, match=r"2 members .*, 3 must; begin a new round"):
        serve(5, 3, ["revealed", step, step, step, "revealed"])


def test_a_hundred_thousand_numbers_of_ten_members_take_less_than_two_seconds() -> None:
    vectors, start = random(10, 100_000), perf_counter()
    members, cohort = joined(10)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    masked = mask(members, sealed, {i: x for i, x in vectors.items() if i > 11})  # two drop out
    total = unmask(
        cohort, add(masked), list(masked), {i: members[i].reveal(masked) for i in masked}, owners=list(members)
    )
    assert perf_counter() - start < 2
    np.testing.assert_array_equal(total, add({i: vectors[i] for i in masked}))


def chi_square(vector: Ring) -> float:
    """Of its bytes against uniform ones: 255 give or take 23; 400 is once in 10^7."""
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    return float(((counts - vector.nbytes / 256) ** 2).sum() / (vector.nbytes / 256))


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1])
def test_a_masked_vector_looks_uniform_and_never_the_same(value: int) -> None:
    seen: list[Ring] = []
    for _ in range(2):
        members, cohort = joined(3)
        sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
        seen += mask(members, sealed, dict.fromkeys(members, np.full(1000, value, np.uint32))).values()
    assert all(chi_square(y) < 400 and chi_square(y - z) < 400 for y in seen for z in seen if y is not z)
    assert all((y != z).all() for y in seen for z in seen if y is not z)


def test_the_server_is_refused_one_members_vector() -> None:
    members, cohort, _, masked = to_masked(4)
    revealed = {i: m.reveal(masked) for i, m in members.items()}
    with pytest.raises(SecureError, match="1 members revealed their shares, 3 must"):
        unmask(cohort, masked[10], [10], {10: revealed[10]}, owners=members)
    with pytest.raises(SecureError, match="not each within the next"):
        unmask(cohort, masked[10], [10], revealed, owners=members)
    with pytest.raises(
        SecureError, match="shares that were revealed of member 13 fit its keys"
    ):  # shares of its self-mask
        unmask(
            cohort, add(masked) - masked[13], [10, 11, 12], {i: revealed[i] for i in (10, 11, 12)}, owners=list(members)
        )


def test_a_vector_without_its_self_mask_is_still_masked() -> None:
    members, cohort, vectors, masked = to_masked(4, 1000)
    revealed = {i: m.reveal(masked) for i, m in members.items()}
    bare = masked[10] - self_mask(cohort, revealed, 10)
    assert chi_square(bare) < 400 and chi_square(bare - vectors[10]) < 400 and (bare != vectors[10]).all()


def test_a_vector_that_comes_too_late_is_still_masked() -> None:
    members, cohort, vectors, masked = to_masked(5, 1000)
    revealed = {i: members[i].reveal([10, 11, 12, 13]) for i in (10, 11, 12, 13)}
    seed = combine(cohort, revealed, 14)
    assert (
        secure_aggregation._public(secure_aggregation._masking_key(seed, ROUND, 14)) == cohort.keys[14].masking
    )  # the server has this key
    bare = masked[14] - add(
        {i: secure_aggregation._pairwise(seed, cohort, me=14, other=i, size=1000) for i in revealed}
    )
    assert chi_square(bare - vectors[14]) < 400 and (bare != vectors[14]).all()  # and yet not the vector


def combine(cohort: Roster, revealed: Mapping[int, Mapping[int, bytes]], owner: int) -> bytes:
    some = sorted(revealed)[: cohort.threshold]
    return Shamir.combine([(cohort.places[i], revealed[i][owner]) for i in some], False)


def self_mask(cohort: Roster, revealed: Mapping[int, Mapping[int, bytes]], owner: int) -> Ring:
    seed = combine(cohort, revealed, owner)
    assert (
        secure_aggregation._derive(seed, "mark", ROUND, owner) == cohort.keys[owner].commitment
    )  # the server has this seed
    return secure_aggregation._stream(secure_aggregation._derive(seed, "self-mask", ROUND, owner), 1000)


def test_fewer_shares_than_threshold_give_another_secret() -> None:
    members, cohort = joined(5, 4)
    seed, sealed = members[10].own, {i: m.share(cohort) for i, m in members.items()}
    opened = {i: members[i]._open(cohort, 10, sealed[10][i])[1] for i in (11, 12, 13, 14)}
    shares = [(cohort.places[i], share) for i, share in opened.items()]
    assert Shamir.combine(shares, False) == seed != Shamir.combine(shares[:3], False)


def test_a_member_reveals_once() -> None:
    members, *_ = to_masked(5)
    first = members[10].reveal([10, 11, 12])
    for member in (members[10], again(members[10])):
        assert member.reveal([12, 11, 10]) == first
        for other in ([10, 11, 13], [10, 11, 12, 13], [10, 11, 12, 13, 14]):
            with pytest.raises(SecureError, match="revealed for survivors other than"):
                member.reveal(other)


def test_a_member_shares_once_and_masks_once() -> None:
    members, cohort = joined(3)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    with pytest.raises(SecureError, match="it has shared its secrets; join a new round"):
        again(members[10]).share(cohort)
    members[10].mask(random(3)[10], inbox(sealed, 10))
    with pytest.raises(SecureError, match="it masks one vector"):
        again(members[10]).mask(random(3)[11], inbox(sealed, 10))


def test_a_member_takes_one_step_after_the_other() -> None:
    members, cohort = joined(3)
    with pytest.raises(SecureError, match="it masks one vector, after it has shared"):
        members[10].mask(random(3)[10], {})
    members[10].share(cohort)
    with pytest.raises(SecureError, match="no vector in the sum yet"):
        members[10].reveal([10, 11, 12])


def test_a_member_draws_all_its_secrets_anew() -> None:
    first, second = (vars(Participant.join(10, ROUND).keys).values() for _ in range(2))
    assert not set(first) & set(second)


def test_a_member_masks_with_enough_others_or_not_at_all() -> None:
    members, cohort = joined(5)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    with pytest.raises(SecureError, match="2 members shared their secrets, 3 must"):
        members[10].mask(random(5)[10], {11: sealed[11][10]})
    members[10].mask(random(5)[10], {i: sealed[i][10] for i in (11, 12)})


@pytest.mark.parametrize("survivors", [[11, 12, 13], [10, 11, 12, 14], [10, 11], [10, 10, 11]])
def test_survivors_are_itself_and_enough_of_those_it_masked_with(survivors: list[int]) -> None:
    members, cohort = joined(5)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items() if i < 14}
    members[10].mask(random(5)[10], inbox(sealed, 10))
    with pytest.raises(SecureError, match=r"not it and others of|members sent a masked vector, 3 must"):
        members[10].reveal(survivors)


def test_only_whole_numbers_are_masked() -> None:
    members, cohort = joined(3)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    with pytest.raises(SecureError, match="uint32, not of float64; encode"):
        members[10].mask(np.ones(3), inbox(sealed, 10))  # type: ignore[arg-type]


def test_a_member_looks_for_itself_in_the_roster() -> None:
    members, cohort = joined(4)
    stranger = Participant.join(10, ROUND)
    for other in (
        replace(cohort, keys={i: k for i, k in cohort.keys.items() if i != 10}),
        replace(cohort, keys=dict(cohort.keys) | {10: stranger.keys}),
        replace(cohort, context="run 7, round 4"),
    ):
        with pytest.raises(SecureError, match="has not its keys; send it the roster it joined"):
            members[10].share(other)


@pytest.mark.parametrize(
    ("n", "threshold", "says"),
    [
        (2, 2, "2 members joined; a sum hides a vector from 3"),
        (3, 2, "threshold is 2; of 3 members, take 3 to 3"),
        (6, 3, "threshold is 3; of 6 members, take 4 to 6"),
        (6, 7, "threshold is 7"),
    ],
)
def test_a_cohort_that_protects_nobody_is_refused(n: int, threshold: int, says: str) -> None:
    with pytest.raises(SecureError, match=says):
        joined(n, threshold)


@pytest.mark.parametrize("colluders", range(5))
def test_no_two_groups_with_a_threshold_each_have_colluders_alone_in_common(colluders: int) -> None:
    """So nobody gets shares of both secrets of a member by telling one group that it stayed, the other that it left."""
    for n in range(fewest_members(colluders), 20):
        threshold, honest = least_threshold(n, colluders=colluders), n - colluders
        assert threshold <= n
        assert not any(min(one, honest - one) + colluders >= threshold for one in range(honest + 1))


def test_a_roster_of_five_whose_secrets_take_three_shares_is_refused_where_one_may_be_in_league() -> None:
    """Member 14 hands the server its shares: with those of two groups, told otherwise, both secrets of 10 come out."""
    members, cohort = joined(5, 3)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    mask(members, sealed, random(5))
    spy = members[14].shares[10]
    own = [spy.own, *(members[i].reveal([10, 11, 14])[10] for i in (10, 11))]
    masking = [spy.masking, *(members[i].reveal([12, 13, 14])[10] for i in (12, 13))]
    assert all(own) and all(masking) and len(own) == len(masking) == cohort.threshold
    with pytest.raises(SecureError, match="threshold is 3; of 5 members, take 4 to 5"):
        replace(cohort, colluders=1)


@pytest.mark.parametrize(
    "change", [lambda a, b: b, lambda a, b: replace(a, masking=b.sealing), lambda a, b: replace(a, commitment=b"short")]
)
def test_a_roster_holds_each_key_once(change: Callable[[Keys, Keys], Keys]) -> None:
    _, cohort = joined(4)
    with pytest.raises(SecureError, match="occurs twice or is not of 32 bytes"):
        replace(cohort, keys=dict(cohort.keys) | {10: change(cohort.keys[10], cohort.keys[11])})


def test_a_key_with_which_every_secret_is_zero_is_refused() -> None:
    members, cohort = joined(4)
    keys = dict(cohort.keys) | {11: replace(cohort.keys[11], sealing=bytes(32))}
    with pytest.raises(SecureError, match="is not a public key"):
        members[10].share(replace(cohort, keys=keys))
