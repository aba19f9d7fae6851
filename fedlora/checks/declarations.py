"""What a strategy declares, held against what happens on random factors, in both directions."""

from collections.abc import Iterator
from inspect import signature
from typing import Any

from fedlora.lora import SIDES, LoRA
from fedlora.messages.sketch import select_rows
from fedlora.server.aggregation import WeightedSum
from fedlora.strategy import Strategy

from .played_rounds import ALIKE, MIXED, PlayedRound, models, rounds
from .random_clients import RANK
from .verdict import NOWHERE, Skip, apart, declared, require


def check_exact_is_as_declared(strategy: Strategy[Any]) -> None:
    """`exact` says whether the new model is the weighted mean of the clients' models, shared heads included."""
    worst = NOWHERE
    for now in _with_all_ranks(strategy):
        worst = worst.or_worse(apart(now.models, now.ideal_for_all))
    declared(strategy, "exact", worst.near, f"it is off the mean of the clients' models {worst}")


def check_sums_only_is_as_declared(strategy: Strategy[Any]) -> Skip | None:
    """`sums_only` says whether the weighted mean of the updates does what all of them do."""
    if strategy.needs_senders and not strategy.sums_only:
        return Skip("it is told who sent what, and a mean has no sender")
    worst = NOWHERE
    for now in _with_all_ranks(strategy) if strategy.sums_only else rounds(strategy):
        mean, weight = _summed(now)
        summed = strategy.aggregate(now.state, [mean], [weight])
        worst = worst.or_worse(apart(models(now.clients, summed), now.models))
    declared(strategy, "sums_only", worst.near, f"the mean of the updates gives a model that differs {worst}")
    return None


def check_needs_senders_is_as_declared(strategy: Strategy[Any]) -> None:
    """`needs_senders` says whether `aggregate` takes the senders of the updates, which a sum of them has not."""
    takes = "senders" in signature(strategy.aggregate).parameters
    declared(strategy, "needs_senders", takes, f"its aggregate {'takes' if takes else 'does not take'} senders")
    contradicts = strategy.needs_senders and strategy.sums_only
    require(not contradicts, f"{strategy} declares needs_senders and sums_only, and a sum of updates has no sender")


def check_mixed_ranks_are_as_declared(strategy: Strategy[Any]) -> None:
    """`mixed_ranks` says whether every client is sent its own rank, and what comes back can be aggregated."""
    try:
        wrong = list(_other_ranks(strategy))
    except Exception as e:  # not to work at all is one of the two outcomes, however it shows
        wrong = [f"clients of ranks {MIXED} end in {type(e).__name__}: {e}"]
    evidence = wrong[-1] if wrong else f"clients of ranks {MIXED} were each sent their own"
    declared(strategy, "mixed_ranks", not wrong, evidence)


def check_continues_is_as_declared(strategy: Strategy[Any]) -> None:
    """`continues` says whether a client alone is sent the very factors it ended with."""
    worst = NOWHERE
    for now in rounds(strategy, (RANK,)):
        (work,) = now.work
        start = now.clients.job(now.after, 0).start
        own = set(work.job.trains) - set(work.job.shares)  # stays with the client: the job's is not looked at
        for s in set(SIDES) - own:
            worst = worst.or_worse(apart(start.side(s), work.trained.side(s)))
    declared(strategy, "continues", worst.near, f"what a client alone is sent next differs from where it was {worst}")


def _with_all_ranks(strategy: Strategy[Any]) -> Iterator[PlayedRound]:
    """Rounds of clients alike, and then of clients of mixed ranks where the strategy takes them."""
    yield from rounds(strategy, ALIKE)
    if strategy.mixed_ranks:
        yield from rounds(strategy, MIXED)


def _summed(now: PlayedRound) -> tuple[LoRA, float]:
    """The weighted mean of the round's updates, as the server makes it of sums, and their whole weight."""
    total = WeightedSum()
    for update, weight in zip(now.updates, now.weights, strict=True):
        total.add(update, weight)
    return total.mean(), total.weight


def _other_ranks(strategy: Strategy[Any]) -> Iterator[str]:
    """A sentence for every module in which a client is sent another rank than its own, in rounds of mixed ranks."""
    for now in rounds(strategy, MIXED):
        for rank, work in zip(MIXED, now.work, strict=True):
            for m, a in select_rows(work.job).start.A.items():
                if len(a) != rank:
                    yield f"a client of rank {rank} was sent rank {len(a)} at {m}"
        models(now.clients, now.after)
