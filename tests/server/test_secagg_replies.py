"""What one member of secure aggregation says wrong is its own failure: the others have their mean without it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.checks.small_models import small_model
from fedlora.encoding.client_data import ClientData
from fedlora.errors import Failure, FailureKind
from fedlora.jobs import MaskingTerms, SecAggStep
from fedlora.messages.parts import PartTracker
from fedlora.metrics import Metrics
from fedlora.privacy.secure_aggregation import Keys
from fedlora.run.plan import RoundResult
from fedlora.server.rounds import fit
from fedlora.server.secagg_replies import Joined, repeated_keys
from fedlora.simulations.serial import Serial
from fedlora.strategy import Client, Job, Update, load
from tests.server.test_secure_aggregation import PLAN, RANK, SECURE, START, Line, apart, line

LIAR = 2
SIX = replace(PLAN, cohort=6, secure=SECURE)
ROWS = [client.train_rows for client in small_model("bert").clients[1:3]]
Said = dict[str, str]
Change = Callable[[Said], Said]


@dataclass
class Forged:
    """A fleet in which one member's answer in one step of round 1, or its masked update, is another."""

    fleet: Line
    step: str
    change: Callable[[Any], Any]
    round: int = 0
    masking: list[MaskingTerms] = field(default_factory=list)  # of the jobs that went out

    @property
    def traffic(self) -> PartTracker:
        return self.fleet.traffic

    def clients(self) -> Sequence[Client]:
        return self.fleet.clients()

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        step = next(iter(asks.values()))
        self.round = step.round if step.step == "join" else self.round
        replies = dict(self.fleet.ask(asks))
        said = replies.get(LIAR)
        if (step.step, self.round) == (self.step, 0) and said is not None and not isinstance(said, Failure):
            replies[LIAR] = self.change(dict(said))
        return replies

    def train(self, jobs: Mapping[int, Job]) -> Iterator[tuple[int, Update | Failure]]:
        self.masking += [job.masking for job in jobs.values() if job.masking]
        for i, answer in self.fleet.train(jobs):
            forge = (self.step, self.round, i) == ("train", 0, LIAR) and isinstance(answer, Update)
            yield i, replace(answer, masked=self.change(answer.masked)) if forge else answer

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        return self.fleet.evaluate(jobs)


def forged(folder: Path, step: str, change: Callable[[Any], Any], rounds: int = 1) -> list[RoundResult]:
    fleet = Forged(line(folder, (RANK,) * 6), step, change)
    return list(fit(load("fedavg"), fleet, START, replace(SIX, rounds=rounds)))


def honest(folder: Path, **silent: int) -> RoundResult:
    return next(fit(load("fedavg"), line(folder, (RANK,) * 6, **silent), START, replace(PLAN, cohort=6)))


def saying(name: str, value: str) -> Change:
    return lambda said: said | {name: value}


def without(name: str) -> Change:
    return lambda said: {key: value for key, value in said.items() if key != name}


AT_JOINING = {
    "-30 examples": saying("examples", "-30"),
    "no examples": saying("examples", "0"),
    "nan examples": saying("examples", "nan"),
    "1e300 examples": saying("examples", "1e300"),
    "half an example": saying("examples", "10.5"),
    "x examples": saying("examples", "x"),
    "digits of another script": saying("examples", "٣"),
    "negative records": saying("records", "-1"),
    "no key": without("sealing"),
    "one word more": saying("more", "00"),
    "a key that is no hexadecimal": saying("masking", "zz" * 32),
    "a short key": saying("mark", "00" * 31),
    "a key of zeros, with which every secret is zero": saying("sealing", "00" * 32),
    "one key twice": lambda said: said | {"masking": said["sealing"]},
}
WHEN_SHARING = {
    "nothing for one": without("3"),
    "something for itself": saying("2", "00" * 60),
    "no hexadecimal": saying("3", "x" * 120),
    "a short message": saying("3", "00" * 59),
    "nothing": lambda _: {},
}
WHEN_REVEALING = {
    "no hexadecimal": saying("3", "zz"),
    "a short share": saying("3", "00" * 15),
    "a share of a stranger": saying("9", "00" * 16),
    "nothing": lambda _: {},
    "another share": saying("3", "00" * 16),
    "a share less": without("3"),
    "other shares of all": lambda said: dict.fromkeys(said, "11" * 16),
}


@pytest.mark.parametrize(
    ("step", "change"),
    [("join", c) for c in AT_JOINING.values()] + [("share", c) for c in WHEN_SHARING.values()],
    ids=[*AT_JOINING, *WHEN_SHARING],
)
def test_who_says_what_cannot_be_before_masking_is_left_out_alone(step: str, change: Change, tmp_path: Path) -> None:
    done = forged(tmp_path / "secure", step, change)[0]
    assert {i: f.kind for i, f in done.failed.items()} == {LIAR: FailureKind.REFUSED}
    assert apart(done.state, honest(tmp_path / "plain", train=LIAR).state) < 2e-7


@pytest.mark.parametrize("change", WHEN_REVEALING.values(), ids=WHEN_REVEALING)
def test_who_reveals_what_cannot_be_is_done_without(change: Change, tmp_path: Path) -> None:
    done = forged(tmp_path / "secure", "reveal", change)[0]
    assert not done.failed and apart(done.state, honest(tmp_path / "plain").state) < 2e-7


def test_two_members_with_one_key_are_both_left_out() -> None:
    keys = [Keys(sealing=bytes([3 * i]), masking=bytes([3 * i + 1]), commitment=bytes([3 * i + 2])) for i in range(4)]
    keys[3] = replace(keys[3], masking=keys[1].sealing)
    assert repeated_keys({i: Joined(k, 10) for i, k in enumerate(keys)}) == {1, 3}


def test_nobody_weighs_more_than_by_what_it_said_when_it_joined_the_run(tmp_path: Path) -> None:
    done = forged(tmp_path / "secure", "join", saying("examples", "999999999999"))[0]
    assert not done.failed and apart(done.state, honest(tmp_path / "plain").state) < 2e-7


def test_a_client_with_most_examples_has_half_of_the_weight_at_most(tmp_path: Path) -> None:
    """With 240, 4 and 5 examples the sum would be the first one's update, but for 2 %."""
    where = small_model("bert")
    rows = [rows[:n] for rows, n in zip([where.clients[0].train_rows * 60, *ROWS], (240, 4, 5), strict=True)]
    serial = Serial(where.model, [ClientData(where.model.encoder, r) for r in rows], (RANK,) * 3, tmp_path)
    fleet = Forged(Line(serial), "nothing", lambda x: x)
    done = next(fit(load("fedavg"), fleet, START, replace(PLAN, cohort=3, secure=SECURE)))
    assert not done.failed and [c.examples for c in fleet.clients()] == [240, 4, 5]
    assert [w.weight for w in fleet.masking] == pytest.approx([1 / 2, 2 / 9, 5 / 18])


def test_a_message_that_one_receiver_cannot_open_is_done_without(tmp_path: Path) -> None:
    done = forged(tmp_path / "secure", "share", saying("3", "00" * 60))[0]
    assert not done.failed and apart(done.state, honest(tmp_path / "plain").state) < 2e-7


def test_who_deals_shares_that_nobody_can_open_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    first, second = forged(tmp_path, "share", lambda said: dict.fromkeys(said, "00" * 60), rounds=2)
    assert first.skipped and first.failed[LIAR].kind == FailureKind.REFUSED and not second.skipped


@pytest.mark.parametrize("by", [2**30, 2**31 - 1])
def test_a_masked_vector_that_brings_the_sum_beyond_reach_is_no_sum(by: int, tmp_path: Path) -> None:
    """Nobody can be named, as any member could have done it; the run goes on."""
    first, second = forged(tmp_path, "train", lambda masked: masked + torch.tensor(by, dtype=torch.int32), rounds=2)
    assert first.skipped and all(torch.equal(first.state.B[m], b) for m, b in START.B.items())
    assert "a member sent what is no update" in first.failed[0].reason and not second.skipped
