"""Shares of secrets: whose are refused, and what a member's state gives away."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedlora.errors import FedloraError, SecureError
from fedlora.privacy.secure_aggregation import Participant, Roster, unmask
from tests.privacy.test_secure_aggregation import ROUND, Sealed, add, again, inbox, joined, mask, random, to_masked


def tampered(sealed: Sealed) -> bytes:
    return sealed[11][10][:-1] + bytes([sealed[11][10][-1] ^ 1])


@pytest.mark.parametrize(
    "forge",
    [tampered, lambda s: s[11][10][:20], lambda s: b"", lambda s: s[12][10], lambda s: s[11][12], lambda s: s[10][11]],
    ids=["tampered", "cut", "empty", "of another sender", "for another receiver", "its own, sent back"],
)
def test_a_share_that_is_not_the_senders_to_it_is_refused(forge: Callable[[Sealed], bytes]) -> None:
    members, cohort = joined(3)
    sealed: Sealed = {i: m.share(cohort) for i, m in members.items()}
    with pytest.raises(SecureError, match="member 10 refuses: shares from 11 are damaged, or of another round"):
        members[10].mask(random(3)[10], inbox(sealed, 10) | {11: forge(sealed)})
    masked = mask(members, sealed, random(3))  # the refusal changed nothing
    np.testing.assert_array_equal(
        unmask(cohort, add(masked), list(masked), {i: m.reveal(masked) for i, m in members.items()}), add(random(3))
    )


def renamed(member: Participant, context: str) -> Participant:
    """A member that uses its secrets in another round, which no member does: to see that nothing else lets it."""
    return replace(member, context=context)


def test_a_share_of_another_round_is_refused_even_under_the_same_secrets() -> None:
    members, cohort = joined(3)
    old: Sealed = {i: again(m).share(cohort) for i, m in members.items()}
    later = {i: renamed(m, "run 7, round 4") for i, m in members.items()}
    now = Roster("run 7, round 4", {i: m.keys for i, m in later.items()}, 3)
    new: Sealed = {i: m.share(now) for i, m in later.items()}
    with pytest.raises(SecureError, match="shares from 11 are damaged, or of another round"):
        later[10].mask(random(3)[10], {11: old[11][10], 12: new[12][10]})


def test_members_who_were_shown_different_rosters_open_none_of_each_others_shares() -> None:
    members, cohort = joined(4)
    other = replace(cohort, keys=dict(cohort.keys) | {13: Participant.join(13, ROUND).keys})
    sealed: Sealed = {10: members[10].share(cohort), 11: members[11].share(other), 12: members[12].share(cohort)}
    with pytest.raises(SecureError, match="shares from 11 are damaged, or of another round, roster"):
        members[10].mask(random(4)[10], inbox(sealed, 10))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s | {12: s[12][:5]}, "what member 11 revealed is malformed"),
        (lambda s: {10: s[10]}, "what member 11 revealed is malformed"),
        (lambda s: s | {12: bytes(16)}, "the shares revealed of 12 do not fit it"),
        (lambda s: s | {13: bytes(16)}, "the shares revealed of 13 do not fit it"),
        (lambda s: s | {14: bytes(16)}, "not each within the next"),
    ],
)
def test_a_malformed_share_is_refused(change: Callable[[Mapping[int, bytes]], dict[int, bytes]], says: str) -> None:
    members, cohort, _, masked = to_masked(4)
    some = [10, 11, 12]
    revealed = {i: dict(members[i].reveal(some)) for i in some}
    with pytest.raises(SecureError, match=says):
        unmask(cohort, add({i: masked[i] for i in some}), some, revealed | {11: change(revealed[11])})


def test_a_damaged_state_is_refused_and_shows_no_secret() -> None:
    member = Participant.join(1, ROUND)
    assert repr(member.own) not in repr(member) and again(member) == member
    for state in (b"", b"[]", b"{}", member.dumps()[:-9], member.dumps().replace(b"own", b"won")):
        with pytest.raises(FedloraError, match=r"state of .* bytes is damaged"):
            Participant.loads(state)
