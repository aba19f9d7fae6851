"""What a client tells in the second pass of a round, and what it keeps to itself, whoever asks."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fedlora.checks.small_models import RANK, small_model
from fedlora.client.policy import ClientPolicy
from fedlora.client.runner import JobRunner
from fedlora.client.secure_aggregation import SecAggClient
from fedlora.errors import ClientFailed, MaskedBefore, PolicyRefusal, SecureError
from fedlora.jobs import Client, Job, MaskingTerms, PrivacyTerms, SecAggStep, Update, shared_part, shared_start
from fedlora.lora import map_factors
from fedlora.sections import Training
from fedlora.storage.client_state import ClientState
from fedlora.strategies.fedask import FedASK

SMALL = small_model("bert")
TRAINING = Training(optimizer="sgd", lr=0.1, steps=1, batch_size=4)
FIRST = replace(FedASK().client_init(FedASK().init(SMALL.start), Client(0, 1, RANK)), training=TRAINING)
LEFT = {m: torch.linalg.qr(torch.randn(b.shape[0], 4)).Q for m, b in SMALL.start.B.items()}
SECOND = Job(SMALL.start, trains="", shares="A", left=LEFT, metrics=False, training=TRAINING)
TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=1, delta=1e-3)


def runner(folder: Path, **own: object) -> JobRunner:
    return JobRunner(0, SMALL.clients[0], folder, ClientPolicy(**own), once=True)  # type: ignore[arg-type]


def test_it_is_of_what_was_trained_in_this_round(tmp_path: Path) -> None:
    mine = runner(tmp_path)
    first = mine.run(SMALL.model, FIRST)
    trained = SMALL.model.get_adapter()
    other = mine.run(SMALL.model, replace(FIRST, round=1, seed=5))  # whatever is trained later
    second = mine.run(SMALL.model, SECOND)
    assert_close(vars(second.lora), vars(shared_part(SECOND, trained)))
    assert second.examples == first.examples and second.loss is None and other.lora.B


def test_who_has_trained_nothing_in_the_round_says_so(tmp_path: Path) -> None:
    mine = runner(tmp_path)
    mine.run(SMALL.model, FIRST)
    with pytest.raises(ClientFailed, match="asked about the factors that it trained in round 3, and has none"):
        mine.run(SMALL.model, replace(SECOND, round=2))


def test_what_stays_with_a_client_is_never_projected(tmp_path: Path) -> None:
    """A server of FedSA-LoRA, whose clients keep B, asks about it by the way."""
    mine = runner(tmp_path)
    mine.run(SMALL.model, Job(SMALL.start, shares="AH", training=TRAINING))
    assert ClientState(tmp_path).of(0).B
    with pytest.raises(ClientFailed, match="and has none"):
        mine.run(SMALL.model, SECOND)


def test_it_costs_a_private_client_nothing_and_needs_a_charge(tmp_path: Path) -> None:
    mine = runner(tmp_path, private=True)
    with pytest.raises(PolicyRefusal, match="no DP-SGD"):
        mine.run(SMALL.model, SECOND)
    private = replace(FIRST, privacy=TERMS, metrics=False)
    first = mine.run(SMALL.model, private)
    second = mine.run(SMALL.model, replace(SECOND, privacy=TERMS))
    assert first.spent == second.spent and second.spent is not None and second.spent.charges == 1
    assert mine.run(SMALL.model, private).spent == first.spent  # the round taken again: it has that answer still
    with pytest.raises(ClientFailed, match="and has none"):
        mine.run(SMALL.model, replace(SECOND, privacy=TERMS, round=4))


@pytest.mark.parametrize("job", [FIRST, SECOND])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_client_that_lets_one_factor_out_projects_none(job: Job, side: str, tmp_path: Path) -> None:
    """The sketch of a product travels under the name of one factor, and tells of both."""
    with pytest.raises(PolicyRefusal, match=r"which client\.egress does not let out"):
        ClientPolicy(egress=(f"{side} *", "H *")).refuse(job, records=4)
    ClientPolicy(egress=("A *", "B *", "H *")).refuse(job, records=4)


@dataclass
class Members:
    """Clients in secure aggregation, and a server that has them do what it likes."""

    folder: Path
    clients: int
    terms: dict[str, Mapping[int, str]] = field(default_factory=dict)

    def member(self, i: int) -> SecAggClient:
        return SecAggClient(self.folder / str(i), i)

    def mask(self, job: Job, who: Collection[int], weight: float = 1 / 16) -> str:
        """Have these clients join and mask an update for this job; return the context."""
        second = bool(job.left)
        context = f"round {job.round + 1}{' second' * second}"
        join = SecAggStep("join", context, round=job.round, exchange=int(second))
        said = {i: self.member(i).reply(join) for i in who}
        roster = {i: (s["sealing"], s["masking"], s["mark"]) for i, s in said.items()}
        share = SecAggStep("share", context, roster=roster, threshold=(len(said) + 1) // 2 + 1)
        sealed = {i: self.member(i).reply(share) for i in who}
        for i in who:
            inbox = {j: sealed[j][str(i)] for j in who if j != i}
            terms = MaskingTerms(context=context, weight=weight, reach=10.0, members=len(said), inbox=inbox)
            update = Update(map_factors(torch.ones_like, shared_start(job)), 1, 0.5)
            self.member(i).mask(replace(job, masking=terms), update)
        return context

    def reveal(self, context: str, i: int, survivors: Collection[int]) -> Mapping[str, str]:
        return self.member(i).reply(SecAggStep("reveal", context, survivors=tuple(survivors)))

    def both(self, missing: Collection[int] = ()) -> str:
        """Play a first pass of all, and mask a second one without those that are missing; return its context."""
        everyone = range(self.clients)
        context = self.mask(FIRST, everyone)
        for i in everyone:
            self.reveal(context, i, everyone)
        return self.mask(SECOND, [i for i in everyone if i not in missing])


def test_a_client_reveals_nothing_where_one_of_the_first_sum_is_missing(tmp_path: Path) -> None:
    """Both sums together would tell that one's sketch: the planted bug is a server that asks all the same."""
    members = Members(tmp_path, 7)
    context = members.both(missing=[6])
    for i in range(6):
        with pytest.raises(SecureError, match=r"members \[6\] are in the round's first sum and not in its second"):
            members.reveal(context, i, range(6))


def test_nor_where_the_second_sum_lacks_one_that_masked_it(tmp_path: Path) -> None:
    members = Members(tmp_path, 5)
    context = members.both()
    with pytest.raises(SecureError, match=r"members \[4\]"):
        members.reveal(context, 0, range(4))
    assert members.reveal(context, 1, range(5))


def test_it_reveals_where_as_many_are_missing_as_a_sum_must_have(tmp_path: Path) -> None:
    members = Members(tmp_path, 7)
    assert members.reveal(members.both(missing=[4, 5, 6]), 0, range(4))


def test_a_second_sum_is_masked_once_and_with_the_first_ones_weight(tmp_path: Path) -> None:
    members = Members(tmp_path, 5)
    context = members.mask(FIRST, range(5))
    for i in range(5):
        members.reveal(context, i, range(5))
    with pytest.raises(
        SecureError, match=r"would have the weight 0\.125 in the second sum of round 1, and had 0\.0625"
    ):
        members.mask(SECOND, range(5), weight=1 / 8)
    members.mask(SECOND, range(5))
    for again in (SECOND, FIRST):
        with pytest.raises(MaskedBefore):
            members.mask(again, range(5))
    members.mask(replace(FIRST, round=1), range(5))


def test_who_is_in_no_first_sum_joins_no_second_one(tmp_path: Path) -> None:
    members = Members(tmp_path, 5)
    with pytest.raises(SecureError, match="asked for the second pass of round 1, and is in no sum of its first"):
        members.mask(SECOND, range(5))
    members.mask(FIRST, range(5))  # and no shares were revealed
    with pytest.raises(SecureError, match="in no sum of its first"):
        members.mask(SECOND, range(5))
