"""What a strategy says of itself, held against what happens on random factors, in both directions."""

from collections.abc import Iterator
from inspect import signature
from typing import Any

from fedlora.lora import SIDES
from fedlora.messages.sketch import select_rows
from fedlora.server.aggregation import WeightedSum
from fedlora.strategy import Strategy

from .played_rounds import ALIKE, MIXED, PlayedRound, models, rounds, spread
from .random_clients import RANK
from .verdict import NOWHERE, Skip, apart, declared


def check_exact_is_as_declared(strategy: Strategy[Any]) -> None:
    """`exact` says whether the new model is the weighted mean of the clients' models, shared heads included."""
    worst = NOWHERE
    for now in _with_all_ranks(strategy):
        worst = worst.or_worse(apart(models(now.clients, now.after), spread(now.ideal, len(now.work))))
    declared(strategy, "exact", worst.near, f"it is off the mean of the clients' models {worst}")


def check_sums_only_is_as_declared(strategy: Strategy[Any]) -> Skip | None:
    """`sums_only` says whether the weighted mean of the updates does what all of them do."""
    if strategy.needs_senders and not strategy.sums_only:
        return Skip("it is told who sent what, and a mean has no sender")
    worst = NOWHERE
    for now in _with_all_ranks(strategy) if strategy.sums_only else rounds(strategy):
        total = WeightedSum()
        for update, weight in zip(now.updates, now.weights, strict=True):
            total.add(update, weight)
        summed = strategy.aggregate(now.state, [total.mean()], [total.weight])
        worst = worst.or_worse(apart(models(now.clients, summed), models(now.clients, now.after)))
    declared(strategy, "sums_only", worst.near, f"the mean of the updates gives a model that differs {worst}")
    return None


def check_needs_senders_is_as_declared(strategy: Strategy[Any]) -> None:
    """`needs_senders` says whether `aggregate` takes the senders of the updates, which a sum of them has not."""
    takes = "senders" in signature(strategy.aggregate).parameters
    declared(strategy, "needs_senders", takes, f"its aggregate {'takes' if takes else 'does not take'} senders")
    both = strategy.needs_senders and strategy.sums_only
    assert not both, f"{strategy} declares needs_senders and sums_only, and a sum of updates has no sender"


def check_mixed_ranks_are_as_declared(strategy: Strategy[Any]) -> None:
    """`mixed_ranks` says whether every client is sent its own rank, and what comes back can be aggregated."""
    happened, evidence = True, f"clients of ranks {MIXED} were each sent their own"
    try:
        for now in rounds(strategy, MIXED):
            for rank, work in zip(MIXED, now.work, strict=True):
                for m, a in select_rows(work.job).start.A.items():
                    if len(a) != rank:
                        happened, evidence = False, f"a client of rank {rank} was sent rank {len(a)} at {m}"
            models(now.clients, now.after)
    except Exception as e:  # not to work at all is one of the two outcomes, however it shows
        happened, evidence = False, f"clients of ranks {MIXED} end in {type(e).__name__}: {e}"
    declared(strategy, "mixed_ranks", happened, evidence)


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
    """Rounds of clients alike, and then of clients of mixed ranks where it takes them."""
    yield from rounds(strategy, ALIKE)
    if strategy.mixed_ranks:
        yield from rounds(strategy, MIXED)
