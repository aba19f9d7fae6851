"""Shares of secrets: whose are refused, and what a member's state gives away."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedlora.errors import FedloraError, SecureError, SumLost
from fedlora.privacy.secure_aggregation import Participant, Roster, unmask
from tests.privacy.test_secure_aggregation import ROUND, Sealed, add, again, inbox, joined, mask, random, to_masked


def tampered(sealed: Sealed) -> bytes:
    return sealed[11][10][:-1] + bytes([sealed[11][10][-1] ^ 1])


@pytest.mark.parametrize(
    "forge",
    [tampered, lambda s: s[11][10][:20], lambda s: b"", lambda s: s[12][10], lambda s: s[11][12], lambda s: s[10][11]],
    ids=["tampered", "cut", "empty", "of another sender", "for another receiver", "its own, sent back"],
)
@pytest.mark.parametrize("stays", [True, False])
def test_a_share_that_is_not_the_senders_to_it_is_not_held_and_others_make_up_for_it(
    forge: Callable[[Sealed], bytes], stays: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Member 10 masks all the same; where 11 is unmasked, or its masks are taken off, it has no share to reveal."""
    members, cohort = joined(5)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    masked = {10: members[10].mask(random(5)[10], inbox(sealed, 10) | {11: forge(sealed)})}
    assert "shares from 11 are damaged, or of another round" in caplog.text
    masked |= mask(members, sealed, {i: x for i, x in random(5).items() if i > 11 or (i == 11 and stays)})
    revealed = {i: members[i].reveal(masked) for i in masked}
    assert 11 not in revealed[10]
    total = unmask(cohort, add(masked), list(masked), revealed, owners=members)
    np.testing.assert_array_equal(total, add({i: random(5)[i] for i in masked}))


def test_a_member_masks_nothing_where_it_can_open_too_few_shares() -> None:
    members, cohort = joined(5)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    with pytest.raises(SecureError, match="2 members shared their secrets, 3 must"):
        members[10].mask(random(5)[10], inbox(sealed, 10) | dict.fromkeys((11, 12, 13), b""))


def test_a_member_whose_shares_no_secret_fits_is_named() -> None:
    members, cohort = joined(4)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    masked = {i: m.mask(random(4)[i], inbox(sealed, i) | ({} if i == 11 else {11: b""})) for i, m in members.items()}
    revealed = {i: m.reveal(masked) for i, m in members.items()}
    with pytest.raises(SumLost, match="no 3 of the 1 shares that were revealed of member 11 fit its keys") as lost:
        unmask(cohort, add(masked), list(masked), revealed, owners=members)
    assert lost.value.member == 11


def renamed(member: Participant, context: str) -> Participant:
    """A member that uses its secrets in another round, which no member does: to see that nothing else lets it."""
    return replace(member, context=context)


def test_a_share_of_another_round_is_refused_even_under_the_same_secrets() -> None:
    members, cohort = joined(3)
    old: Sealed = {i: again(m).share(cohort) for i, m in members.items()}
    later = {i: renamed(m, "run 7, round 4") for i, m in members.items()}
    now = Roster("run 7, round 4", {i: m.keys for i, m in later.items()}, 3)
    new: Sealed = {i: m.share(now) for i, m in later.items()}
    with pytest.raises(SecureError, match="2 members shared their secrets, 3 must"):
        later[10].mask(random(3)[10], {11: old[11][10], 12: new[12][10]})


def test_members_who_were_shown_different_rosters_open_none_of_each_others_shares() -> None:
    members, cohort = joined(4)
    other = replace(cohort, keys=dict(cohort.keys) | {13: Participant.join(13, ROUND).keys})
    sealed: Sealed = {10: members[10].share(cohort), 11: members[11].share(other), 12: members[12].share(cohort)}
    with pytest.raises(SecureError, match="2 members shared their secrets, 3 must"):
        members[10].mask(random(4)[10], inbox(sealed, 10))


WRONG = pytest.mark.parametrize(
    ("change", "of"),
    [
        (lambda s: s | {12: s[12][:5]}, 12),
        (lambda s: {11: s[11], 12: s[12], 13: s[13]}, 10),
        (lambda s: s | {12: bytes(16)}, 12),
        (lambda s: s | {13: bytes(16)}, 13),
    ],
    ids=["cut", "left out", "wrong", "wrong, of one that dropped out"],
)
Change = Callable[[Mapping[int, bytes]], dict[int, bytes]]


@WRONG
def test_a_wrong_share_leaves_no_sum_where_all_are_needed(change: Change, of: int) -> None:
    members, cohort, _, masked = to_masked(4)
    some = [10, 11, 12]
    revealed = {i: dict(members[i].reveal(some)) for i in some}
    revealed[11] = change(revealed[11])
    with pytest.raises(SumLost, match=f"were revealed of member {of} fit its keys"):
        unmask(cohort, add({i: masked[i] for i in some}), some, revealed, owners=members)


@WRONG
def test_a_wrong_share_is_left_out_where_enough_others_are_right(change: Change, of: int) -> None:
    members, cohort, vectors, masked = to_masked(7)
    some = [10, 11, 12, 14, 15, 16]
    revealed = {i: dict(members[i].reveal(some)) for i in some}
    revealed[11] = change(revealed[11])
    total = unmask(cohort, add({i: masked[i] for i in some}), some, revealed, owners=members)
    np.testing.assert_array_equal(total, add({i: vectors[i] for i in some}))


def test_a_member_that_reveals_wrong_shares_of_all_is_told(caplog: pytest.LogCaptureFixture) -> None:
    members, cohort, vectors, masked = to_masked(7)
    revealed = {i: dict(m.reveal(masked)) for i, m in members.items()}
    revealed[10] = dict.fromkeys(members, bytes(16))
    total = unmask(cohort, add(masked), list(masked), revealed, owners=members)
    np.testing.assert_array_equal(total, add(vectors))
    assert "shares that [10] revealed are not those they were given" in caplog.text


def test_a_damaged_state_is_refused_and_shows_no_secret() -> None:
    member = Participant.join(1, ROUND)
    assert repr(member.own) not in repr(member) and again(member) == member
    for state in (b"", b"[]", b"{}", member.dumps()[:-9], member.dumps().replace(b"own", b"won")):
        with pytest.raises(FedloraError, match=r"state of .* bytes is damaged"):
            Participant.loads(state)
