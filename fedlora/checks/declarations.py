"""What a strategy declares, held against what happens on random factors, in both directions."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from fedlora.jobs import own_sides
from fedlora.lora import SIDES, LoRA, split_rank
from fedlora.messages.sketch import select_rows
from fedlora.server.aggregation import WeightedSum
from fedlora.strategy import Job, Strategy, next_state

from .played_rounds import ALIKE, MIXED, PlayedRound, models, rounds
from .random_clients import RANK, aggregated
from .verdict import NOWHERE, Skip, apart, declared, identical, require


def check_exact_is_as_declared(strategy: Strategy[Any]) -> None:
    """`exact` says whether the new model is the weighted mean of the clients' models, shared heads included."""
    worst = NOWHERE
    for now in _with_all_ranks(strategy):
        worst = worst.or_worse(apart(now.models, now.ideal_for_all))
    is_mean = "it is the mean of the clients' models in every round"
    off = f"it is off the mean of the clients' models {worst}"
    declared(strategy, "exact", worst.near, is_mean if worst.near else off)


def check_sums_only_is_as_declared(strategy: Strategy[Any]) -> Skip | None:
    """`sums_only` says whether the weighted mean of the updates does what all of them do."""
    if strategy.needs_senders and not strategy.sums_only:
        return Skip("it is told who sent what, and a mean has no sender")
    worst = NOWHERE
    for now in _with_all_ranks(strategy) if strategy.sums_only else rounds(strategy):
        summed = aggregated(strategy, now.state, now.work, now.weights, seen=_summed)
        worst = worst.or_worse(apart(models(now.clients, summed), now.models))
    differs = f"the mean of the updates gives a model that differs {worst}"
    declared(strategy, "sums_only", worst.near, "the mean of the updates does what all do" if worst.near else differs)
    return None


def check_needs_senders_is_as_declared(strategy: Strategy[Any]) -> None:
    """`needs_senders` says whether `aggregate` takes the senders of the updates, which a sum of them has not."""
    takes = "senders" in signature(strategy.aggregate).parameters
    declared(strategy, "needs_senders", takes, f"its aggregate {'takes' if takes else 'does not take'} senders")
    contradicts = strategy.needs_senders and strategy.sums_only
    claim = f"{strategy} declares needs_senders and sums_only, and a sum of updates has no sender"
    require(not contradicts, claim, "declare one of the two")


def check_needs_losses_is_as_declared(strategy: Strategy[Any]) -> None:
    """`needs_losses` says whether the model depends on the training losses that clients tell."""
    worst = NOWHERE
    for now in rounds(strategy):
        losses = [work.sender.loss for work in now.work]
        turned = zip(now.work, [*losses[1:], losses[0]], strict=True)
        others = [replace(work, sender=replace(work.sender, loss=loss)) for work, loss in turned]
        worst = worst.or_worse(apart(now.models_from(others, now.weights), now.models))
    declared(strategy, "needs_losses", not worst.near, f"with other losses its model differs {worst}")


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
        job, own = now.clients.job(now.after, 0), own_sides(work.job)  # what stays is not looked at
        start, end = (split_rank(x, work.job.keeps_rank)[0] for x in (job.start, work.trained))
        for s in set(SIDES) - set(own):
            worst = worst.or_worse(apart(start.side(s), end.side(s)))
    differs = f"what a client alone is sent next differs from where it was {worst}"
    declared(strategy, "continues", worst.near, "a client alone is sent what it ended with" if worst.near else differs)


def check_exchanges_are_as_declared(strategy: Strategy[Any]) -> None:
    """`exchanges` says how often a round asks its clients: all train at first, none does in a second pass."""
    for now in rounds(strategy):
        _check_pass(strategy, now.clients.jobs(now.state), 0)
        if strategy.exchanges > 1:
            senders = [w.sender for w in now.work]
            between = next_state(strategy, now.state, now.updates, now.weights, senders)
            _check_pass(strategy, now.clients.jobs(between), 1)


def _check_pass(strategy: Strategy[Any], jobs: Sequence[Job], exchange: int) -> None:
    """Hold what one pass asks of all clients: one kind of work, and the same projections to the bit."""
    for job in jobs:
        second = bool(job.left) and not job.trains
        as_meant = second if exchange else bool(job.trains) and not job.left
        asks = f"pass {exchange + 1} has a client train {job.trains or 'nothing'}" + " and brings it left" * bool(
            job.left
        )
        remedy = "declare exchanges = 2 where a round's second jobs have left and train nothing, else leave it at 1"
        require(as_meant, f"{strategy} declares exchanges = {strategy.exchanges}, and {asks}", remedy)
        alike = identical([job.right, job.left], [jobs[0].right, jobs[0].left])
        claim = f"{strategy}: clients get projections of their own, of whose sum nothing can be told"
        require(alike, claim, "make right and left of the state alone, and not of the client")


def _with_all_ranks(strategy: Strategy[Any]) -> Iterator[PlayedRound]:
    """Rounds of clients alike, and then of clients of mixed ranks where the strategy takes them."""
    yield from rounds(strategy, ALIKE)
    if strategy.mixed_ranks:
        yield from rounds(strategy, MIXED)


def _summed(updates: Sequence[LoRA], weights: Sequence[float]) -> tuple[list[LoRA], list[float]]:
    """The weighted mean of updates, as the server makes it of sums, and their whole weight."""
    total = WeightedSum()
    for update, weight in zip(updates, weights, strict=True):
        total.add(update, weight)
    return [total.mean()], [total.weight]


def _other_ranks(strategy: Strategy[Any]) -> Iterator[str]:
    """A sentence for every module in which a client is sent another rank than its own, in rounds of mixed ranks."""
    for now in rounds(strategy, MIXED):
        for rank, work in zip(MIXED, now.work, strict=True):
            for m, a in select_rows(work.job).start.A.items():
                if len(a) != rank:
                    yield f"a client of rank {rank} was sent rank {len(a)} at {m}"
        models(now.clients, now.after)
