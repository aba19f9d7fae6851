"""Strategies with a bug each, published or easily made: a sound one with one method or declaration changed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora.lora import (
    SIDES,
    LoRA,
    append_rank,
    average,
    delta,
    join,
    leading,
    map_factors,
    normalised,
    residual,
    scale,
    stack,
)
from fedlora.sections import Training
from fedlora.strategies.dual import Dual
from fedlora.strategies.fedask import FedASK
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex_lora import FedEx, State
from fedlora.strategies.fedmomentum import FedMomentum
from fedlora.strategies.ffa_lora import FFALoRA
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.florist import FLoRIST
from fedlora.strategies.fslora import FSLoRA
from fedlora.strategies.hetlora import HetLoRA
from fedlora.strategies.q_ffl import QFFL
from fedlora.strategies.ravan import Ravan
from fedlora.strategies.scaffold import Scaffold
from fedlora.strategy import Client, Job, Sender, Strategy
from tests.support.clustered import Clustered

Updates = Sequence[LoRA]
Weights = Sequence[float]


def scaled(lora: LoRA, factor: float) -> LoRA:
    """The adapter with every matrix, factors and head, times `factor`."""
    return map_factors(lambda t: factor * t, lora)


def turned(part: LoRA) -> LoRA:
    """The transpose of every product that is square; the others as they are."""
    dense = {m: d.T if d.shape[0] == d.shape[1] else d for m, d in delta(part).items()}
    return LoRA(D=dense)


class TransposesTheResidual(FedEx):
    """The released FedEx-LoRA adds the transpose; with square modules nothing complains."""

    def aggregate(self, state: State, updates: Updates, weights: Weights) -> State:
        parts = (*state.parts, turned(residual(updates, weights)))
        return State(average(updates, weights), parts, state.round + 1)


class WeighsTwice(FedAvg):
    """A mean whose weights were in the terms already."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        p = normalised(weights)
        terms = [scaled(u, c) for c, u in zip(p, updates, strict=True)]
        return scaled(average(terms, weights), len(p))


class TakesTheFirstOnly(FedAvg):
    """FLoRA's released FedIT assigns the sum to a misspelt name, and returns the first term."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return scaled(updates[0], normalised(weights)[0])


class MergesTheLastOnly(FLoRA):
    """FSLoRA's stacking baseline loads every client over the one before."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights) -> Any:
        return super().aggregate(state, updates[-1:], weights[-1:])


class TransposesB(FedAvg):
    """B by the convention of another library."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        mean = average(updates, weights)
        return LoRA(mean.A, {m: b.T for m, b in mean.B.items()}, mean.H)


class WeighsAllAlike(FedAvg):
    """A mean of the updates, whatever their weights."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return average(updates, [1.0 for _ in updates])


class IgnoresTheWeights(FedEx):
    """All clients alike, whatever their examples."""

    def aggregate(self, state: State, updates: Updates, weights: Weights) -> State:
        return super().aggregate(state, updates, [1.0 for _ in weights])


class SquaresTheWeights(FedAvg):
    """p_i on the update, and on the sum again."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return super().aggregate(state, updates, [w * w for w in weights])


class WeighsByTheScale(FedAvg):
    """Weights taken for shares, though they sum to anything."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return scaled(average(updates, weights), sum(weights) / 6)


class TellsFactorsByShape(FLoRA):
    """FLoRA's released code weighs what has as many rows as the rank has, which B may have too."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights) -> Any:
        def weighed(u: LoRA, p: float) -> LoRA:
            rank = {m: a.shape[0] for m, a in u.A.items()}
            sides = {s: {m: p * t if t.shape[0] == rank[m] else t for m, t in u.side(s).items()} for s in "AB"}
            return LoRA(**sides, H=u.H)

        sound = super().aggregate(state, updates, weights)
        part = join(*[weighed(u, p) for u, p in zip(updates, normalised(weights), strict=True)])
        return sound._replace(stacks=(*state.stacks, part))


class SendsTheLastResidualOnly(FedEx):
    """An offset since last time, where clients that sat out rounds need all of it."""

    def client_init(self, state: State, client: Client) -> Job:
        return replace(super().client_init(state, client), offset=state.parts[-1:])


class DeliversNoOffset(FedEx):
    """The residuals in the clients' models are not in the adapter."""

    def adapter(self, state: State) -> LoRA:
        return state.lora


class TakesTheStartForZero(FLoRA):
    """What is delivered is what was stacked; before the first round that is nothing, whatever clients start from."""

    def adapter(self, state: Any) -> LoRA:
        return join(*state.stacks).over(LoRA(H=state.lora.H))


class FillsTheRows(Dual):
    """Rows that stay with clients begin, for a new one, with a mean of rows that were sent."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        sent = average(updates, weights)
        return append_rank(sent, leading(sent.only("AB"), self.local))


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
            return reduce(
                torch.add, [p * u.side(s)[m] for p, u in zip(normalised(weights), updates, strict=True)]
            ).float()

        return LoRA(**{s: {m: mean(s, m) for m in updates[0].side(s)} for s in SIDES})


class KeepsHalf(FedAvg):
    """A right mean, stored in the type of what was sent."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        dtype = next(iter(updates[0].A.values())).dtype
        return map_factors(lambda t: t.to(dtype), average(updates, weights))


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
        for p, update in zip(normalised(weights), updates, strict=True):
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


@dataclass
class CountsOnItself(Strategy[LoRA]):
    """A step that shrinks with the rounds, which are counted on the object: a resumed run starts from none."""

    rounds: int = 0
    sums_only = True

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state)

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        self.rounds += 1
        return average([average(updates, weights), state], [1.0, 0.1 * self.rounds])

    def adapter(self, state: LoRA) -> LoRA:
        return state


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


class ScalesTheRest(FedMomentum):
    """The rest times s, which the model multiplies in already; public code, which adds by hand, forgets it."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights) -> Any:
        sound = super().aggregate(state, updates, weights)
        return sound._replace(parts=(*sound.parts[:-1], scale(sound.parts[-1], 2.0))) if sound.parts else sound


class ForgetsTheRest(FedMomentum):
    """The rest of the last round alone, as if W were new in each."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights) -> Any:
        return super().aggregate(state._replace(parts=()), updates, weights)


class ShrinksToTheEnergy(FedMomentum):
    """The rank falls to what holds the energy, as in public code, and the client is sent factors of another shape."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights) -> Any:
        return super().aggregate(state, updates, weights)._replace(lora=leading(state.lora, 3))


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


class TakesSendersUnsaid(Clustered):
    """It does not declare that it needs senders, and gets none."""

    needs_senders = False


class ClustersSaySums(Clustered):
    sums_only = True


class ClustersByPosition(Clustered):
    """The order of the updates is taken for the clients' ids."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights, senders: Sequence[Sender] = ()) -> Any:
        counted = [replace(sender, id=i) for i, sender in enumerate(senders)]
        return super().aggregate(state, updates, weights, counted)


class AveragesScalesApart(Ravan):
    """The mean of the heads' sizes on the mean of their directions, as where scales and cores are averaged apart."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        sizes = [{m: core.norm(dim=(1, 2), keepdim=True) for m, core in u.R.items()} for u in updates]
        heads = [LoRA(R={m: u.R[m] / n for m, n in size.items()}) for u, size in zip(updates, sizes, strict=True)]
        mean = average([LoRA(R=size) for size in sizes], weights)
        R = {m: mean.R[m] * core for m, core in average(heads, weights).R.items()}
        return LoRA(R=R).over(super().aggregate(state, updates, weights))


class SwapsTheHeads(Ravan):
    """The heads come back in another order than they were sent in."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        mean = super().aggregate(state, updates, weights)
        return LoRA(R={m: core.flip(0) for m, core in mean.R.items()}).over(mean)


class FillsTheBlocks(Ravan):
    """A core of all r^2 numbers, of which a mask was to keep the blocks."""

    def init(self, lora: LoRA) -> LoRA:
        blocks = super().init(lora)
        return LoRA(R={m: torch.block_diag(*core) for m, core in blocks.R.items()}).over(blocks)


class LosesItsScales(Ravan):
    """Heads are scaled where they stay, and no scale is in what is sent."""

    def client_init(self, state: LoRA, client: Client) -> Job:
        return replace(super().client_init(state, client), shares="H")


class WeighsByLossesUnsaid(QFFL):
    needs_losses = False


class CorrectsWhatRests(Scaffold):
    """A is frozen, and its gradient corrected all the same."""

    def client_init(self, state: Any, client: Client) -> Job:
        return replace(super().client_init(state, client), trains="BH", shares="BH")


class SetsItsTraining(FedAvg):
    """A learning rate of its own for each client, where the run's settings are put over it."""

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, training=Training(lr=1e-3 / (client.id + 1)))


class AsksOnce(FedASK):
    """A round ends with the sketch, and the projection comes out of the next round's training."""

    exchanges = 1


class SketchesForEach(FedASK):
    """Every client draws an Omega of its own, so that the sum of the sketches is a sketch of nothing."""

    def client_init(self, state: Any, client: Client) -> Job:
        job = super().client_init(state, client)
        return replace(job, right={m: x.roll(client.id, 0) for m, x in job.right.items()})


class ProjectsObliquely(FedASK):
    """Q is the sketch as it is, without orthonormal columns: Q Q^T is no projection."""

    def aggregate(self, state: Any, updates: Updates, weights: Weights) -> Any:
        after = super().aggregate(state, updates, weights)
        if not after.between:
            return after
        return after._replace(between=LoRA(B=average(updates, weights).B).over(after.between))
