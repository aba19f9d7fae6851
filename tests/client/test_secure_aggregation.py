"""A client masks its update of a round once: a killed server gets no second sum, and the run goes on."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.client.secure_aggregation import SecAggClient
from fedlora.errors import FailureKind, MaskedBefore, SecureError
from fedlora.jobs import Job, MaskingTerms, SecAggStep, Update
from fedlora.run.plan import ResumePoint, RoundResult
from fedlora.server.rounds import fit
from fedlora.strategy import load
from tests.server.test_secure_aggregation import PLAN, SECURE, START, Line, line

MASKED = replace(PLAN, cohort=4, secure=SECURE)


def sent(fleet: Line) -> list[Update]:
    """The masked updates that a server got."""
    return [heard for heard in fleet.heard if isinstance(heard, Update)]


def four(folder: Path, **silent: int) -> Line:
    """Four clients, with what they keep in this folder."""
    return line(folder, (2,) * 4, **silent)


def play(fleet: Line, rounds: int, past: ResumePoint | None = None) -> list[RoundResult]:
    return list(fit(load("fedavg"), fleet, START, replace(MASKED, rounds=rounds), past))


def test_a_round_asked_for_again_without_one_client_has_no_second_sum(tmp_path: Path) -> None:
    """A server that was killed after it took the masks off asks again while client 3 is away."""
    first = four(tmp_path)
    played = play(first, 1)
    assert len(sent(first)) == 4
    again = four(tmp_path, join=3)
    done = play(again, 2)
    assert done[0].skipped and not done[1].skipped
    assert [f.kind for i, f in sorted(done[0].failed.items()) if i != 3] == [FailureKind.MASKED] * 3
    assert all(torch.equal(done[0].state.B[m], b) for m, b in START.B.items()) and played[0].state.B
    assert len(sent(again)) == 3  # of round 2 alone


def test_a_round_goes_on_with_those_that_have_not_masked_it(tmp_path: Path) -> None:
    six = (2,) * 6
    before = next(fit(load("fedavg"), line(tmp_path, six), START, replace(MASKED, cohort=3)))
    done = next(fit(load("fedavg"), line(tmp_path, six), START, replace(MASKED, cohort=6)))
    assert not done.skipped and set(done.failed) == set(before.asked) and len(done.asked) == 6


def test_it_says_so_in_words_that_name_the_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    play(four(tmp_path), 1)
    with caplog.at_level(logging.WARNING, "fedlora"):
        play(four(tmp_path), 2)
    assert "has masked its update of round 1" in caplog.text and "round 1 is skipped: 0 of 4 answers" in caplog.text


def test_an_earlier_round_is_not_masked_either(tmp_path: Path) -> None:
    """As after a checkpoint that was lost: the rounds up to the last one masked are skipped."""
    play(four(tmp_path), 3)
    done = play(four(tmp_path), 4)
    assert [round.skipped for round in done] == [True, True, True, False]


def test_a_second_mask_is_refused_in_the_same_attempt_too_before_anything_is_trained(tmp_path: Path) -> None:
    fleet = four(tmp_path)
    play(fleet, 1)
    client = SecAggClient(tmp_path / "0", 0)
    with pytest.raises(MaskedBefore):
        client.reply(SecAggStep("join", "round 1 (another)", round=0))
    assert client.reply(SecAggStep("join", "round 2 (one)", round=1)).keys() == {"sealing", "masking", "mark"}


def test_a_client_masks_nothing_that_would_be_most_of_the_sum(tmp_path: Path) -> None:
    terms = MaskingTerms(context="round 1", weight=0.6, reach=1.0, members=3, inbox={})
    with pytest.raises(SecureError, match=r"client 0 would have 0.6 of the weight of round 1"):
        SecAggClient(tmp_path, 0).refuse(Job(START, masking=terms))


def test_a_client_joins_no_roster_that_one_other_and_the_server_could_undo(tmp_path: Path) -> None:
    """Of five, three shares let two groups have one member alone in common, which reveals to both."""
    clients = {i: SecAggClient(tmp_path / str(i), i) for i in range(5)}
    said = {i: client.reply(SecAggStep("join", "round 1")) for i, client in clients.items()}
    roster = {i: (s["sealing"], s["masking"], s["mark"]) for i, s in said.items()}
    step = SecAggStep("share", "round 1", roster=roster, threshold=3)
    with pytest.raises(SecureError, match="threshold is 3; of 5 members, take 4 to 5"):
        clients[0].reply(step)
    assert len(clients[0].reply(replace(step, threshold=4))) == 4


def test_a_note_that_cannot_be_read_is_a_refusal(tmp_path: Path) -> None:
    play(four(tmp_path), 1)
    (tmp_path / "0" / "masked.json").write_bytes(b"{")
    with pytest.raises(SecureError, match="cannot be read, and says which rounds client 0 has masked"):
        SecAggClient(tmp_path / "0", 0).refuse_masked(5)
