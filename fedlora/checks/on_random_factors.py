"""What every strategy must do, whatever its mathematics, told from random factors without a model."""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedlora.lora import SIDES, LoRA, delta, map_factors
from fedlora.run.plan import Plan
from fedlora.sections import Training
from fedlora.server.rounds import job_for
from fedlora.storage import checkpoint
from fedlora.storage.checkpoint import Checkpoint
from fedlora.strategies.anchored import Anchored
from fedlora.strategies.head import Head
from fedlora.strategy import Client, Job, Strategy

from .played_rounds import models, rounds, spread, trained
from .random_clients import (
    RANK,
    TIGHT,
    Clients,
    added,
    aggregated,
    fresh,
    mean,
    moved,
    private,
    start_apart,
    wears,
)
from .verdict import Skip, agree, apart, identical, leaves

Some = Strategy[Any]
LARGE = {"query": (400, 300)}  # where a product is far larger than its factors
COPIES = 50
OWN_WAY = Plan(rounds=3, cohort=3, training=Training(lr=0.5, batch_size=3))  # settings unlike those that are default
APART = Skip("it is told who sent what, and its clients start from models of their own")


def check_order_of_clients_changes_nothing(strategy: Some) -> None:
    """The order in which clients answer changes nothing."""
    for now in rounds(strategy):
        back = aggregated(strategy, now.state, now.work[::-1], now.weights[::-1])
        claim = f"round {now.t} ends elsewhere when the clients answer in reverse"
        agree(strategy, claim, models(now.clients, back), models(now.clients, now.after))


def check_scale_of_weights_changes_nothing(strategy: Some) -> None:
    """Weights have no scale: all of them ten thousand times as large do the same."""
    for now in rounds(strategy):
        other = aggregated(strategy, now.state, now.work, [1e4 * w for w in now.weights])
        claim = f"round {now.t} ends elsewhere when all weights are ten thousand times as large"
        agree(strategy, claim, models(now.clients, other), models(now.clients, now.after))


def check_twice_the_weight_counts_as_two_clients(strategy: Some) -> Skip | None:
    """A client of twice the weight does what two clients do that send the same."""
    for now in rounds(strategy):
        ends = (
            aggregated(strategy, now.state, now.work, [2.0, 1.0, 1.0]),
            aggregated(strategy, now.state, [now.work[0], *now.work], [1.0] * 4),
            aggregated(strategy, now.state, now.work, [1.0] * 3),
        )
        doubled, two, alike = (models(now.clients, end) for end in ends)
        ignored = [m for m, t in doubled.items() if not apart({m: t}, {m: two[m]}).near]
        if ignored and apart({m: doubled[m] for m in ignored}, {m: alike[m] for m in ignored}).near:
            return Skip("it gives clients weights of its own")
        agree(strategy, f"in round {now.t} a client of twice the weight does not count as two", doubled, two)
    return None


def check_arguments_are_left_alone(strategy: Some) -> None:
    """No method changes what it is given, to the bit."""
    start, clients = fresh(), Clients(strategy)
    before: Any = deepcopy(start)
    state = strategy.init(start)
    assert identical(start, before), f"{strategy}: init changed the adapter it was given"
    for t in range(3):
        given = state, clients.work(state, t), clients.weights
        before = deepcopy(given)
        calls: dict[str, Callable[[], Any]] = {
            "client_init": partial(clients.job, state, 0),
            "adapter": partial(strategy.adapter, state),
            "notes": partial(strategy.notes, state),
            "aggregate": partial(aggregated, strategy, *given),
        }
        for name, call in calls.items():
            call()
            assert identical(given, before), f"{strategy}: {name} changed what it was given in round {t}"
        state = aggregated(strategy, *given)


def check_options_are_those_of_a_frozen_dataclass(strategy: Some) -> None:
    """Its options are the fields of a frozen dataclass, so that a run which is resumed has the same strategy."""
    made = getattr(type(strategy), "__dataclass_params__", None)
    assert made is not None and made.frozen, f"{strategy}: {type(strategy).__name__} is no dataclass with frozen=True"


def check_nothing_is_remembered_but_the_state(strategy: Some) -> None:
    """The same state and updates give the same answer to the bit, whatever was asked in between."""
    for now in rounds(strategy):
        aggregated(strategy, now.state, now.work[::-1], now.weights)
        again = aggregated(strategy, now.state, now.work, now.weights)
        assert identical(again, now.after), f"{strategy}: round {now.t} done again from the same state ends elsewhere"


def check_state_survives_a_checkpoint(strategy: Some) -> None:
    """A state read back from disk is the same to the bit, and so is what comes of it."""
    for now in rounds(strategy):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), Checkpoint(now.t, now.state, {}))
            found = checkpoint.latest(Path(folder))
        assert found is not None, f"{strategy}: the state of round {now.t} was written and could not be read back"
        assert identical(found.state, now.state), f"{strategy}: the state of round {now.t} came back as another"
        after = aggregated(strategy, found.state, now.work, now.weights)
        assert identical(after, now.after), f"{strategy}: round {now.t} ends elsewhere from a state read back"


def check_jobs_are_complete(strategy: Some) -> None:
    """A job brings every side, shares only what it trains, and its offset and sketch fit the modules."""
    shapes = {m: t.shape for m, t in delta(fresh()).items()}
    for now in rounds(strategy):
        for work in now.work:
            job, where = work.job, f"{strategy}: the job of round {now.t}"
            missing = [s for s in "ABH" if job.start.side(s).keys() != fresh().side(s).keys()]
            assert not missing, f"{where} starts from no whole {missing[0]}; a client may hold none"
            assert set(job.shares) <= set(job.trains) <= set(SIDES), f"{where} trains {job.trains}, shares {job.shares}"
            empty = [s for s in job.trains if not job.start.side(s)]
            assert not empty, f"{where} trains {empty}, and brings none to start from"
            wrong = [m for p in job.offset for m, t in delta(p).items() if t.shape != shapes.get(m)]
            assert not wrong, f"{where} has an offset that does not fit {wrong[0]}"
            for m, rows in job.sketch.items():
                good = len(set(rows)) == len(rows) > 0 and set(rows) <= set(range(len(job.start.A[m])))
                assert good, f"{where} sketches rows {list(rows)} of the {len(job.start.A[m])} at {m}"


def check_jobs_leave_to_the_run_what_it_fills_in(strategy: Some) -> None:
    """A job sets nothing that the run fills in, and overrides none but training settings, which reach the client."""
    for now in rounds(strategy):
        for i, work in enumerate(now.work):
            client = Client(i, i + 1, now.clients.ranks[i])
            told = asdict(job_for(strategy, now.state, client, OWN_WAY, now.t).training)
            meant = {**asdict(OWN_WAY.training), **work.job.overrides}
            meant |= {name: work.job.lr_factor * meant[name] for name in ("lr", "head_lr")}
            assert told == meant, f"{strategy}: in round {now.t} client {i} is to train by {meant}, and is told {told}"


def check_what_is_delivered_is_what_clients_start_from(strategy: Some) -> Skip | None:
    """The adapter that is delivered is the model of the next job or, where clients keep a factor, what they share."""
    for now in rounds(strategy):
        if start_apart(strategy, now.clients.jobs(now.after)):
            return APART
        delivered = strategy.adapter(now.after)
        job = now.clients.job(now.after, 0)
        _agree_on_the_model(strategy, f"after round {now.t} clients start from another model", delivered, job)
    return None


def check_a_client_that_slept_is_right_after_one_job(strategy: Some) -> Skip | None:
    """The job of a client that was never asked before has in it all that the others were sent over the rounds."""
    clients = Clients(strategy)
    state = strategy.init(fresh())
    for t in range(3):
        work = clients.work(state, t, who=(0, 1))
        state = aggregated(strategy, state, work, [1.0, 2.0])
        if start_apart(strategy, clients.jobs(state)):
            return APART
        slept, claim = clients.job(state, 2), f"after {t + 1} rounds a client that slept is sent"
        _agree_on_the_model(strategy, f"{claim} not the run's model", strategy.adapter(state), slept)
        if strategy.exact:
            ideal = mean([w.model for w in work], [1.0, 2.0])
            agree(strategy, f"{claim} not the mean of the others' models", clients.model(state, 2), ideal)
    return None


def check_one_client_alone_is_followed(strategy: Some) -> Skip | None:
    """The model that a client alone trained is the next model, whatever becomes of its factors."""
    for now in rounds(strategy, (RANK,)):
        distance = apart(models(now.clients, now.after), trained(now.work))
        if not distance.near and not (strategy.exact or strategy.continues):
            return Skip(f"it is neither exact nor does it continue: a client alone is missed {distance}")
        assert distance.near, f"{strategy}: in round {now.t} the model of a client alone is missed {distance}"
    return None


def check_equal_updates_do_what_one_does(strategy: Some) -> None:
    """Fifty clients that send the same do what one of them does."""
    for now in rounds(strategy):
        many = aggregated(strategy, now.state, now.work[:1] * COPIES, [1.0] * COPIES)
        one = aggregated(strategy, now.state, now.work[:1], [1.0])
        claim = f"{COPIES} equal updates in round {now.t} do not do what one of them does"
        agree(strategy, claim, models(now.clients, many), models(now.clients, one))


def check_half_precision_is_summed_in_single(strategy: Some) -> None:
    """Factors in bfloat16 are summed in float32 or wider, and no state is narrower."""
    clients = Clients(strategy)
    state = strategy.init(fresh(dtype=torch.float32))
    for t in range(2):
        work = clients.work(state, t)[0]
        half = _cast(work.update, torch.bfloat16)
        one = aggregated(strategy, state, [replace(work, update=_cast(half, torch.float32))], [1.0])
        state = aggregated(strategy, state, [replace(work, update=half)] * COPIES, [1.0] * COPIES)
        small = [x.dtype for x in leaves(state) if x.is_floating_point() and x.element_size() < 4]
        assert not small, f"{strategy}: from updates in bfloat16 the state of round {t} holds {small[0]}, not float32"
        claim = f"{COPIES} equal updates in bfloat16 do not do what one of them does in float32"
        agree(strategy, claim, models(clients, state), models(clients, one), close=1e-4)


def check_rank_may_be_a_dimension(strategy: Some) -> None:
    """Nothing takes A for B, or a matrix for its transpose, where the rank is a module's smaller dimension."""
    for now in rounds(strategy, start=fresh(TIGHT)):
        shapes = {m: tuple(t.shape) for m, t in delta(strategy.adapter(now.after)).items()}
        assert shapes == TIGHT, f"{strategy}: at rank {RANK} it delivers {shapes} for modules of {dict(TIGHT)}"
        where = f"at rank {RANK}, a dimension of each module,"
        if strategy.exact:
            ideal = spread(now.ideal, len(now.work))
            agree(strategy, f"{where} it misses the mean of the models", models(now.clients, now.after), ideal)
        ends = (aggregated(strategy, now.state, now.work[:1] * n, [1.0] * n) for n in (2, 1))
        twice, once = (models(now.clients, end) for end in ends)
        agree(strategy, f"{where} a client that is there twice counts otherwise than once", twice, once)


def check_a_start_that_is_not_zero_is_taken_off(strategy: Some) -> None:
    """Anchored, as with PiSSA's start, it begins with the pretrained model, and keeps what it declares from there."""
    anchored, start = Anchored(strategy), moved(fresh(), "B", "start")
    about, product = "anchored at a start that is not zero, it", delta(start)
    for now in rounds(anchored, start=start):
        job = now.work[0].job
        if now.t == 0:
            worn = added(job, *wears(job, LoRA()))
            shifted = {m: worn[m] + p for m, p in product.items()}  # rounding is relative to what cancels
            agree(strategy, f"{about} does not begin with the pretrained model", shifted, product)
        if strategy.exact:
            ideal = spread(now.ideal, len(now.work))
            agree(strategy, f"{about} misses the mean in round {now.t}", models(now.clients, now.after), ideal)
        if not _is_personal(job) and not start_apart(strategy, now.clients.jobs(now.after)):
            delivered, next_job = anchored.adapter(now.after), now.clients.job(now.after, 0)
            _agree_on_the_model(strategy, f"{about} delivers another model than is worn", delivered, next_job)


def check_a_head_that_is_not_shared_stays_with_its_owner(strategy: Some) -> None:
    """Wrapped so that heads are local or frozen, no head is asked for, and the server's stays as it was."""
    policies: tuple[Literal["local", "frozen"], ...] = ("local", "frozen")
    for policy in policies:
        wrapped = Head(strategy, policy)
        for now in rounds(wrapped):
            job = now.work[0].job
            asked = f"trains {job.trains} and shares {job.shares}"
            assert "H" not in job.shares, f"{strategy}: with a {policy} head the job {asked}"
            assert policy == "local" or "H" not in job.trains, f"{strategy}: with a {policy} head the job {asked}"
            claim = f"with a {policy} head the server's own changes in round {now.t}"
            agree(strategy, claim, wrapped.adapter(now.after).H, fresh().H)


def check_no_product_is_built_on_the_server(strategy: Some) -> None:
    """No tensor as large as an adapted weight is made: at seven billion parameters there would be no room for it."""
    clients = Clients(strategy)
    state = strategy.init(fresh(LARGE))
    work = clients.work(state, 0)
    dense = max(d_out * d_in for d_out, d_in in LARGE.values())
    watch: Any = _Largest  # untyped
    with watch() as largest:
        state = aggregated(strategy, state, work, clients.weights)
        strategy.adapter(state)
        clients.job(state, 0)
    shape = largest.shape
    assert shape.numel() < dense, f"{strategy}: a tensor of {tuple(shape)} was made for modules of {LARGE}"


class _Largest(TorchFunctionMode):
    """Remembers the shape of the largest tensor that any function of torch's returns."""

    shape = torch.Size([0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, Tensor) and t.numel() > self.shape.numel():
                self.shape = t.shape
        return made


def _agree_on_the_model(strategy: Some, claim: str, adapter: LoRA, job: Job) -> None:
    """Hold a job, as one who keeps nothing yet gets it, against an adapter: the model, or what is shared of it."""
    if _is_personal(job):
        for s in job.shares:
            agree(strategy, f"{claim} (side {s})", job.start.side(s), adapter.side(s))
        return
    start, offset = wears(job, LoRA())
    agree(strategy, claim, {**added(job, start, offset), **start.H}, {**delta(adapter), **adapter.H})


def _is_personal(job: Job) -> bool:
    """Has each client a factor, and so a product, of its own?"""
    return bool(set("ABR") & set(private(job)))


def _cast(lora: LoRA, dtype: torch.dtype) -> LoRA:
    return map_factors(lambda t: t.to(dtype), lora)
