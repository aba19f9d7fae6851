"""The contract is worth what it catches: bugs that were published, or could be, each with the check that finds it.

A broken strategy is its sound twin with one method or declaration changed; the twin passes the same check.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fedlora.checks import algebra, declarations, training
from fedlora.checks.contract import Check, verify
from fedlora.checks.report import check
from fedlora.lora import SIDES, LoRA, average, contrast, delta, join, leading, scale, shares, stack
from fedlora.metrics import Metrics
from fedlora.rounds import Answers, Failure
from fedlora.simulations.serial import Serial
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex_lora import FedEx, State
from fedlora.strategies.fedsa_lora import FedSALoRA
from fedlora.strategies.ffa_lora import FFALoRA
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.florist import FLoRIST
from fedlora.strategies.fslora import FSLoRA
from fedlora.strategies.head import Head
from fedlora.strategies.hetlora import HetLoRA
from fedlora.strategy import Client, Job, Strategy

Updates = Sequence[LoRA]
Weights = Sequence[float]


def each(lora: LoRA, change: Any) -> LoRA:
    """The adapter with every matrix changed."""
    return LoRA(**{s: {m: change(t) for m, t in lora.side(s).items()} for s in SIDES})


def turned(part: LoRA) -> LoRA:
    """The transpose of every product that is square; the others as they are."""
    dense = {m: d.T if d.shape[0] == d.shape[1] else d for m, d in delta(part).items()}
    return LoRA(D=dense)


class TransposesTheResidual(FedEx):
    """The released FedEx-LoRA adds the transpose; with square modules nothing complains."""

    def aggregate(self, state: State, updates: Updates, weights: Weights) -> State:
        parts = (*state.parts, turned(contrast(updates, weights)))
        return State(average(updates, weights), parts, state.round + 1)


class WeighsTwice(FedAvg):
    """A mean whose weights were in the terms already."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        p = shares(weights)
        terms = [each(u, lambda t, c=c: c * t) for c, u in zip(p, updates, strict=True)]
        return each(average(terms, weights), lambda t: len(p) * t)


class TakesTheFirstOnly(FedAvg):
    """FLoRA's released FedIT assigns the sum to a misspelt name, and returns the first term."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return each(updates[0], lambda t: shares(weights)[0] * t)


class MergesTheLastOnly(FLoRA):
    """FSLoRA's stacking baseline loads every client over the one before."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights) -> Any:
        return super().aggregate(state, updates[-1:], weights[-1:])


class IgnoresTheWeights(FedEx):
    """All clients alike, whatever their examples."""

    def aggregate(self, state: State, updates: Updates, weights: Weights) -> State:
        return super().aggregate(state, updates, [1.0 for _ in weights])


class WeighsByTheScale(FedAvg):
    """Weights taken for shares, though they sum to anything."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return each(average(updates, weights), lambda t: sum(weights) / 6 * t)


class TellsFactorsByShape(FLoRA):
    """FLoRA's released code weighs what has as many rows as the rank has, which B may have too."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights) -> Any:
        def weighed(u: LoRA, p: float) -> LoRA:
            rank = {m: a.shape[0] for m, a in u.A.items()}
            sides = {s: {m: p * t if t.shape[0] == rank[m] else t for m, t in u.side(s).items()} for s in "AB"}
            return LoRA(**sides, H=u.H)

        sound = super().aggregate(state, updates, weights)
        part = join(*[weighed(u, p) for u, p in zip(updates, shares(weights), strict=True)])
        return sound._replace(stacks=(*state.stacks, part))


class SendsTheLastResidualOnly(FedEx):
    """An offset since last time, where clients that sat out rounds need all of it."""

    def client_init(self, state: State, client: Client) -> Job:
        return replace(super().client_init(state, client), offset=state.parts[-1:])


class DeliversNoOffset(FedEx):
    """The residuals that clients wear are not in the adapter."""

    def adapter(self, state: State) -> LoRA:
        return state.lora


class NeverSketches(FSLoRA):
    """FSLoRA's released code compares a parameter's name with "lora_B", which none has: all train the full rank."""

    def client_init(self, state: Any, client: Client) -> Job:
        return replace(super().client_init(state, client), sketch={})


class SketchesTwiceTheSame(FSLoRA):
    """Rows drawn with replacement."""

    def client_init(self, state: Any, client: Client) -> Job:
        return Job(start=state.lora, sketch={m: [0, 0] for m in state.lora.A})


class SumsInHalf(FedAvg):
    """A running sum in the type of what is sent."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        def mean(s: str, m: str) -> Tensor:
            return reduce(torch.add, [p * u.side(s)[m] for p, u in zip(shares(weights), updates, strict=True)]).float()

        return LoRA(**{s: {m: mean(s, m) for m in updates[0].side(s)} for s in SIDES})


class KeepsHalf(FedAvg):
    """A right mean, stored in the type of what was sent."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        dtype = next(iter(updates[0].A.values())).dtype
        return each(average(updates, weights), lambda t: t.to(dtype))


class AddsInPlace(FedAvg):
    """The server's own step, written into the state it was given."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        mean = average(updates, weights)
        for s in SIDES:
            for m, t in state.side(s).items():
                t.copy_(mean.side(s)[m])
        return state


class Interpolates(FedAvg):
    """Each client moves the mean a share of the way, so the last has the most say."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        for p, update in zip(shares(weights), updates, strict=True):
            state = average([state, update], [1 - p, p])
        return state


class Seen(NamedTuple):
    lora: LoRA
    seen: set[int]


@dataclass(frozen=True)
class KeepsASet(Strategy[Seen]):
    """A state of what no checkpoint holds."""

    sums_only = True
    continues = True

    def init(self, lora: LoRA) -> Seen:
        return Seen(lora, set())

    def client_init(self, state: Seen, client: Client) -> Job:
        return Job(start=state.lora)

    def aggregate(self, state: Seen, updates: Updates, weights: Weights) -> Seen:
        return Seen(average(updates, weights), state.seen | {len(updates)})

    def adapter(self, state: Seen) -> LoRA:
        return state.lora


ROUNDS_SEEN: list[int] = []


class RemembersOutside(FedAvg):
    """A round that hangs on how often it was asked."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        ROUNDS_SEEN.append(len(updates))
        return each(average(updates, weights), lambda t: t * (1 + 0.01 * len(ROUNDS_SEEN)))


class FoldsAlphaTwice(FLoRA):
    """s belongs to the model, and stands in the product besides."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights) -> Any:
        sound = super().aggregate(state, updates, weights)
        return sound._replace(stacks=(*state.stacks, scale(stack(updates, weights), 2.0)))


class BuildsTheProduct(FedEx):
    """The residual as a difference of dense products."""

    def aggregate(self, state: State, updates: Updates, weights: Weights) -> State:
        delta(stack(updates, weights))
        return super().aggregate(state, updates, weights)


class BringsNoA(FFALoRA):
    """A is frozen, so it is taken for known; a client that is new has another."""

    def client_init(self, state: LoRA, client: Client) -> Job:
        return replace(super().client_init(state, client), start=state.only("BH"))


class CutsToOwnRank(FedAvg):
    """Factors of the client's rank go out, and come back to a mean that takes one rank only."""

    mixed_ranks = True

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=leading(state, client.rank))


class DecaysTheHead(FedAvg):
    """The head shrinks on the server, whoever it belongs to."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        mean = average(updates, weights)
        return LoRA(mean.A, mean.B, {m: 0.9 * h for m, h in mean.H.items()})


class TruncatedSaysExact(FLoRIST):
    def __post_init__(self) -> None:
        object.__setattr__(self, "exact", True)


class PaddedSaysExact(HetLoRA):
    exact = True


class FedExSaysSums(FedEx):
    sums_only = True


class FedExSaysLittleIsSent(FedEx):
    down = "r * (d_in + d_out)"


class FedExSaysDora(FedEx):
    kinds = ("lora", "dora")


class FFASaysInexact(FFALoRA):
    exact = False


class FLoRASaysItContinues(FLoRA):
    continues = True


BITES: list[tuple[Strategy[Any], Strategy[Any], Check]] = [
    (TransposesTheResidual(), FedEx(), declarations.check_exact_is_as_declared),
    (TransposesTheResidual(), FedEx(), training.check_real_training_is_exact_where_declared),
    (WeighsTwice(), FedAvg(), declarations.check_sums_only_is_as_declared),
    (TakesTheFirstOnly(), FedAvg(), algebra.check_order_of_clients_changes_nothing),
    (TakesTheFirstOnly(), FedAvg(), algebra.check_equal_updates_do_what_one_does),
    (MergesTheLastOnly(), FLoRA(), declarations.check_exact_is_as_declared),
    (IgnoresTheWeights(), FedEx(), declarations.check_exact_is_as_declared),
    (IgnoresTheWeights(), FedEx(), training.check_real_training_is_exact_where_declared),
    (WeighsByTheScale(), FedAvg(), algebra.check_scale_of_weights_changes_nothing),
    (TellsFactorsByShape(), FLoRA(), algebra.check_rank_may_be_a_dimension),
    (SendsTheLastResidualOnly(), FedEx(), algebra.check_a_client_that_slept_is_right_after_one_job),
    (SendsTheLastResidualOnly(), FedEx(), training.check_a_client_that_slept_wears_the_model),
    (DeliversNoOffset(), FedEx(), algebra.check_what_is_delivered_is_what_clients_start_from),
    (DeliversNoOffset(), FedEx(), training.check_an_exported_adapter_is_the_model_that_was_trained),
    (NeverSketches(), FSLoRA(), training.check_numbers_sent_are_as_declared),
    (NeverSketches(), FSLoRA(), declarations.check_mixed_ranks_are_as_declared),
    (SketchesTwiceTheSame(), FSLoRA(), algebra.check_jobs_are_complete),
    (SumsInHalf(), FedAvg(), algebra.check_half_precision_is_summed_in_single),
    (KeepsHalf(), FedAvg(), algebra.check_half_precision_is_summed_in_single),
    (AddsInPlace(), FedAvg(), algebra.check_arguments_are_left_alone),
    (Interpolates(), FedAvg(), algebra.check_order_of_clients_changes_nothing),
    (KeepsASet(), FedAvg(), algebra.check_state_survives_a_checkpoint),
    (RemembersOutside(), FedAvg(), algebra.check_nothing_is_remembered_but_the_state),
    (FoldsAlphaTwice(), FLoRA(), declarations.check_exact_is_as_declared),
    (FoldsAlphaTwice(), FLoRA(), algebra.check_one_client_alone_is_followed),
    (BuildsTheProduct(), FedEx(), algebra.check_no_product_is_built_on_the_server),
    (BringsNoA(), FFALoRA(), algebra.check_jobs_are_complete),
    (CutsToOwnRank(), HetLoRA(), declarations.check_mixed_ranks_are_as_declared),
    (DecaysTheHead(), FedAvg(), algebra.check_a_head_that_is_not_shared_stays_with_its_owner),
    (TruncatedSaysExact(), FLoRIST(), declarations.check_exact_is_as_declared),
    (PaddedSaysExact(), HetLoRA(), declarations.check_exact_is_as_declared),
    (FedExSaysSums(), FedEx(), declarations.check_sums_only_is_as_declared),
    (FedExSaysLittleIsSent(), FedEx(), training.check_numbers_sent_are_as_declared),
    (FedExSaysDora(), FedAvg(), training.check_it_works_with_the_kinds_it_declares),
    (FFASaysInexact(), FFALoRA(), declarations.check_exact_is_as_declared),
    (FLoRASaysItContinues(), FLoRA(), declarations.check_continues_is_as_declared),
]


@pytest.mark.parametrize(("broken", "sound", "check"), BITES, ids=lambda x: getattr(x, "__name__", type(x).__name__))
def test_a_broken_strategy_fails_where_its_sound_twin_passes(
    broken: Strategy[Any], sound: Strategy[Any], check: Check
) -> None:
    assert verify(check, sound).outcome == "passed"
    failed = verify(check, broken)
    assert failed.outcome == "failed" and failed.detail.startswith(str(broken))


class Altered(Serial):
    """A fleet whose clients do another job than the one they are given."""

    def change(self, job: Job) -> Job:
        raise NotImplementedError

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        return super().train({i: self.change(job) for i, job in jobs.items()})

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        return super().evaluate({i: self.change(job) for i, job in jobs.items()})


class ThawsA(Altered):
    """The E2E baseline of FedEx-LoRA's release freezes A before PEFT wraps the model, and so not at all."""

    def change(self, job: Job) -> Job:
        return replace(job, trains="ABH")


class NeverTrains(Altered):
    """A learning rate that a schedule, made anew every round, never lets off the ground."""

    def change(self, job: Job) -> Job:
        return replace(job, training=replace(job.training, lr=1e-30))


class TransposesTheOffset(Altered):
    """The released FedEx-LoRA, on the client: right for Conv1D, wrong for Linear, silent where a module is square."""

    def change(self, job: Job) -> Job:
        return replace(job, offset=tuple(turned(part) for part in job.offset))


class WearsTheLastPartOnly(Altered):
    """The client takes an absolute offset for one since last time, and starts from the base every time."""

    def change(self, job: Job) -> Job:
        return replace(job, offset=job.offset[-1:])


class TakesSTwice(Altered):
    """alpha is in the configuration, and in the factors once more."""

    def change(self, job: Job) -> Job:
        return replace(job, gain={m: 2.0 for m in job.start.A})


class ForgetsTheGain(Altered):
    """A sketch of k of r directions without its factor r / k."""

    def change(self, job: Job) -> Job:
        return replace(job, gain={})


class HandsOneAdapterAround(Serial):
    """FedSA-LoRA's release trains one model object: B and head go from client to client."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._stores = [self._stores[0] for _ in self._stores]


class SendsTheHead(Serial):
    """A head that is the client's own is in its message all the same."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        for i, answer in super().train(jobs):
            assert not isinstance(answer, Failure)
            yield i, replace(answer, lora=answer.lora.over(self._model.read().only("H")))


CLIENTS: list[tuple[type[Serial], Strategy[Any], Any]] = [
    (ThawsA, FFALoRA(), training.check_what_trains_moves_and_nothing_else),
    (ThawsA, FFALoRA(), training.check_gradients_reach_what_trains_alone),
    (NeverTrains, FedAvg(), training.check_what_trains_moves_and_nothing_else),
    (TransposesTheOffset, FedEx(), training.check_a_model_is_its_weights_plus_s_times_the_product),
    (WearsTheLastPartOnly, FedEx(), training.check_a_client_that_slept_wears_the_model),
    (TakesSTwice, FedAvg(), training.check_a_model_is_its_weights_plus_s_times_the_product),
    (TakesSTwice, FLoRA(), training.check_an_exported_adapter_is_the_model_that_was_trained),
    (ForgetsTheGain, FSLoRA(), training.check_a_model_is_its_weights_plus_s_times_the_product),
    (HandsOneAdapterAround, FedSALoRA(), training.check_what_a_client_keeps_is_its_own),
    (HandsOneAdapterAround, FedAvg(), training.check_what_a_client_keeps_is_its_own),
    (SendsTheHead, FedSALoRA(), training.check_messages_hold_what_is_shared_alone),
    (SendsTheHead, Head(FedAvg(), "local"), training.check_messages_hold_what_is_shared_alone),
]


@pytest.mark.parametrize(("fleet", "strategy", "check"), CLIENTS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_broken_client_fails_where_a_sound_one_passes(
    fleet: type[Serial], strategy: Strategy[Any], check: Any
) -> None:
    assert check(strategy) is None
    with pytest.raises(AssertionError):
        check(strategy, fleet)
