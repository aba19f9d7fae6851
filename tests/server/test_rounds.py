"""The round loop, with a small fleet whose clients move as the test says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.errors import Failure, RoundFailed, StrategyError
from fedlora.lora import LoRA
from fedlora.messages.parts import PartTracker
from fedlora.metrics import Metrics
from fedlora.privacy.client_level import ClientLevelDP
from fedlora.run.plan import Plan, ResumePoint, RoundResult
from fedlora.sections import Policy, SecureConfig, Training
from fedlora.server.aggregation import Answers
from fedlora.server.rounds import fit, sample, stalled
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategy import Client, Job, Update, load
from tests.support.adapters import factors, fresh


@dataclass
class Few:
    """Clients that add their own number to all they train; some never answer."""

    size: int = 4
    deaf: Mapping[int, int] = field(default_factory=dict)  # client -> round from which it does not answer
    traffic: PartTracker = field(default_factory=PartTracker)
    jobs: list[Job] = field(default_factory=list)

    def clients(self) -> Sequence[Client]:
        return [Client(i, examples=i + 1, rank=4) for i in range(self.size)]

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        self.jobs += jobs.values()
        yield from ((i, self._one(i, job)) for i, job in jobs.items())

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        return {i: Metrics(1, 10, 10.0 * (i + 1), 5) for i in jobs}

    def _one(self, i: int, job: Job) -> Update | Failure:
        if i in self.deaf and job.round >= self.deaf[i]:
            return Failure("the line is dead")
        sides = {s: {m: t + i for m, t in job.start.side(s).items()} for s in job.shares}
        return Update(LoRA(**sides), examples=i + 1, loss=float(i))


def run(fleet: Few, plan: Plan, past: ResumePoint | None = None, strategy: Any = FedAvg()) -> list[RoundResult]:  # noqa: B008
    return list(fit(strategy, fleet, fresh(), plan, past))


def test_weights_are_examples_or_uniform() -> None:
    by_examples, uniform = (
        run(Few(2), Plan(1, 2, policy=Policy(weights=w)))[0]
        for w in ("examples", "uniform")  # type: ignore[arg-type]
    )
    assert by_examples.train_loss == pytest.approx(2 / 3) and uniform.train_loss == pytest.approx(1 / 2)
    assert_close(by_examples.state.A["q"], fresh().A["q"] + 2 / 3)
    assert_close(uniform.state.A["q"], fresh().A["q"] + 1 / 2)


def test_a_cohort_depends_on_seed_and_round_alone() -> None:
    clients = Few(20).clients()
    assert sample(clients, 5, 1, 3) == sample(clients[::-1], 5, 1, 3)
    assert sample(clients, 5, 1, 3) != sample(clients, 5, 1, 4) != sample(clients, 5, 2, 4)


def test_a_job_knows_its_place_in_the_run() -> None:
    fleet = Few()
    run(fleet, Plan(rounds=3, cohort=2, seed=9))
    assert [(j.round, j.rounds, j.seed) for j in fleet.jobs] == [(t, 3, 9) for t in (0, 0, 1, 1, 2, 2)]


def test_a_client_that_fails_is_named_and_the_round_goes_on() -> None:
    done = run(Few(deaf={2: 0}), Plan(1, 4))[0]
    assert done.failed == {2: Failure("the line is dead")} and done.record()["answered"] == 3


def test_below_quorum_the_run_stops_and_says_why() -> None:
    fleet = Few(deaf={0: 1, 1: 1, 2: 1})
    with pytest.raises(RoundFailed, match=r"round 2: 1 of 4 clients answered.*the line is dead"):
        run(fleet, Plan(3, 4))


def test_below_quorum_a_round_can_be_skipped() -> None:
    policy = Policy(below_quorum="skip", quorum=1.0)
    first, second = run(Few(deaf={0: 1}), Plan(2, 4, policy=policy))
    assert second.train_loss is None and second.state is first.state


@pytest.mark.parametrize("below_quorum", ["stop", "skip"])
@pytest.mark.parametrize("away", [(3,), (0, 1, 2, 3)])
def test_with_client_level_privacy_a_round_is_released_whoever_answers(below_quorum: Any, away: Sequence[int]) -> None:
    """Whether it is released would tell who was drawn: those that are away, or others."""
    hidden = ClientLevelDP(noise=1.0, rate=1.0, population=4, delta=1e-2, clip=1.0)
    plan = Plan(2, 4, policy=Policy(below_quorum=below_quorum, quorum=1.0), client_level=hidden, metrics=False)
    rounds = run(Few(deaf=dict.fromkeys(away, 0)), plan)
    assert not any(done.skipped for done in rounds)
    assert all(done.client_level and done.client_level.charges[0].steps == done.number for done in rounds)


def test_a_run_in_which_nobody_ever_answers_fails() -> None:
    with pytest.raises(RoundFailed, match="no client answered"):
        run(Few(deaf=dict.fromkeys(range(4), 0)), Plan(2, 4, policy=Policy(below_quorum="skip")))


def test_a_resumed_run_ends_where_the_whole_one_does() -> None:
    plan = Plan(rounds=4, cohort=2, seed=3)
    whole = run(Few(), plan)
    rest = run(Few(), plan, ResumePoint(2, whole[1].state))
    assert [r.number for r in rest] == [3, 4]
    assert torch.equal(rest[-1].state.A["q"], whole[-1].state.A["q"])


def test_evaluation_keeps_its_cadence_and_never_misses_the_last_round() -> None:
    seen = Metrics(1, 1, 1.0, 1)
    rounds = run(Few(), Plan(5, 2, policy=Policy(eval_every=2), evaluate=lambda _: seen))
    assert [r.number for r in rounds if r.eval] == [2, 4, 5]


def test_clients_are_evaluated_with_mean_worst_and_spread() -> None:
    values = run(Few(), Plan(1, 2, evaluate_clients=True))[0].eval_clients
    assert values is not None and values["clients"] == 4 and values["worst_client"] == 3


def test_every_clients_own_figures_are_in_the_record_of_a_round() -> None:
    """Two of four clients are drawn; all four are measured, on one example each."""
    each = run(Few(deaf={0: 0}), Plan(1, 4, evaluate_clients=True))[0].record()["each"]
    assert each["3"] == {
        **{"rank": 4, "examples": 4, "train_loss": 3.0},
        **{"heldout": 1, "loss": 4.0, "perplexity": 54.5982, "token_accuracy": 0.5},
    }
    assert {*each} == {"0", "1", "2", "3"} and {*each["0"]} == {*each["3"]} - {"examples", "train_loss"}


def test_a_client_that_is_not_measured_has_its_training_alone() -> None:
    each = run(Few(), Plan(1, 2))[0].record()["each"]
    assert len(each) == 2 and all({*own} == {"rank", "examples", "train_loss"} for own in each.values())


@pytest.mark.parametrize(
    "hiding",
    [
        {"metrics": False},
        {"client_level": ClientLevelDP(noise=1.0, rate=1.0, population=4, delta=1e-2, clip=1.0)},
    ],
    ids=["records", "clients"],
)
def test_what_is_hidden_of_single_clients_is_in_no_record(hiding: Any) -> None:
    assert "each" not in run(Few(), Plan(1, 4, **hiding))[0].record()


def test_under_masks_nothing_of_a_single_client_is_told() -> None:
    assert Plan(1, 4).tells_each and not Plan(1, 4, secure=SecureConfig(aggregation=True)).tells_each


def test_of_many_clients_a_sample_is_evaluated_another_in_every_round() -> None:
    asked = list[tuple[int, ...]]()

    class Noted(Few):
        def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
            asked.append(tuple(jobs))
            return super().evaluate(jobs)

    for _ in range(2):
        run(Noted(20), Plan(2, 2, policy=Policy(eval_clients=5), evaluate_clients=True))
    run(Noted(20), Plan(1, 2, policy=Policy(eval_clients=0), evaluate_clients=True))
    assert [len(clients) for clients in asked] == [5, 5, 5, 5, 20]
    assert asked[:2] == asked[2:4] and asked[0] != asked[1]


def test_no_better_loss_stops_the_run_early() -> None:
    losses = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    plan = Plan(5, 2, policy=Policy(patience=2), evaluate=lambda _: Metrics(1, 1, next(losses), 0))
    assert len(run(Few(), plan)) == 4
    assert stalled([3, 2, 2.5, 2.1], 2) and not stalled([3, 2, 2.5, 1.9], 2) and not stalled([3, 2, 2.5], 0)


@dataclass(frozen=True)
class InTurn(FedAvg):
    """A strategy whose clients train sides in turn, or filter, as a test says."""

    turns: tuple[str, ...] = ("BH", "AH")
    smoothing: tuple[float, ...] = ()

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(state, turns=self.turns, smoothing=self.smoothing)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"turns": ("BH", "BH")}, "turns train BH, and the job ABH"),
        ({"turns": ("BH", "ARH")}, "turns train ABHR, and the job ABH"),
        ({"turns": ("BB", "AH")}, "a side is named twice"),
        ({"smoothing": (0.5, 0.5)}, "an odd number, the same from either end, and sum to 1"),
        ({"smoothing": (0.2, 0.3, 0.5)}, "an odd number, the same from either end, and sum to 1"),
    ],
)
def test_turns_and_filters_that_cannot_be_are_refused_before_anybody_trains(wrong: dict[str, Any], said: str) -> None:
    fleet = Few()
    with pytest.raises(
        StrategyError, match=f"strategy InTurn makes a job whose turns or smoothing cannot be: .*{said}"
    ):
        run(fleet, Plan(1, 2), strategy=InTurn(**wrong))
    assert not fleet.jobs


def test_a_round_that_ends_before_a_sides_turn_is_refused_where_the_run_says_so() -> None:
    with pytest.raises(
        StrategyError, match=r"train.steps = 1 ends before the turn of A: set train.steps to a multiple"
    ):
        run(Few(), Plan(1, 2, training=Training(steps=1)), strategy=InTurn())
    assert run(Few(), Plan(1, 2, training=Training(steps=2)), strategy=InTurn())


def test_clients_that_take_too_few_steps_for_every_turn_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """An epoch of clients 0 and 1 is one step, of one and two examples."""
    run(Few(), Plan(2, 4, training=Training(batch_size=2)), strategy=InTurn())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("2 of 4 clients (client 0 is one) take so few steps a round that they never train A:")


@dataclass(frozen=True)
class Transposed(FedAvg):
    """A mistake that square matrices would hide."""

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return LoRA({m: b.T for m, b in state.B.items()}, {m: a.T for m, a in state.A.items()}, state.H)


def test_a_strategy_that_returns_wrong_shapes_is_told_which() -> None:
    with pytest.raises(StrategyError, match=r"round 1: strategy Transposed returned A \(4, 8\) and B \(6, 4\) for q"):
        run(Few(), Plan(1, 2), strategy=Transposed())


@dataclass(frozen=True)
class Exploding(FedAvg):
    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return replace(factors(1), H={m: h / 0 for m, h in state.H.items()})


def test_numbers_that_are_none_do_not_reach_the_clients() -> None:
    with pytest.raises(StrategyError, match=r"not finite at head.weight; a lower train.lr may help"):
        run(Few(), Plan(1, 2), strategy=Exploding())


def test_strategies_that_cannot_be_built_say_why() -> None:
    with pytest.raises(StrategyError, match='there is no strategy "fedaxg"; did you mean "fedavg"'):
        load("fedaxg")
    with pytest.raises(StrategyError, match='strategy FedAvg has no option "lam"'):
        load("fedavg", lam=1)
    with pytest.raises(StrategyError, match='no module named "nowhere"'):
        load("nowhere.at_all:Mine")


def test_the_largest_step_holds_for_every_fleet() -> None:
    with pytest.raises(RoundFailed, match=r"1 of 3 clients answered.*server.largest_step = 1e-06"):
        run(Few(3), Plan(1, 3, policy=Policy(largest_step=1e-6)))


def test_a_step_beyond_all_others_and_a_weight_beyond_all_others_are_held_back() -> None:
    far = run(Few(9), Plan(1, 9, policy=Policy(step_ratio=1.5)))[0]
    assert set(far.failed) == {7, 8} and "times the median of its round" in far.failed[8].reason
    even, half = (run(Heavy(3), Plan(1, 3, policy=Policy(max_share=s)))[0].state.A["q"] for s in (1.0, 0.5))
    assert_close(even, fresh().A["q"] + 2.0, rtol=0, atol=1e-6)
    assert_close(half, fresh().A["q"] + (0 * 1 + 1 * 2 + 2 * 3) / 6)


@dataclass
class Heavy(Few):
    """The last client says it has a trillion examples."""

    def _one(self, i: int, job: Job) -> Update | Failure:
        done = super()._one(i, job)
        return replace(done, examples=10**12) if i == self.size - 1 and isinstance(done, Update) else done
