"""What every strategy must do, whatever its mathematics: checked on random factors, without a model."""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedlora.jobs import own_sides, shared_start
from fedlora.lora import LoRA, Side, delta, map_factors, split_rank
from fedlora.run.plan import Plan, job_for
from fedlora.sections import Training
from fedlora.storage import checkpoint
from fedlora.storage.checkpoint import Checkpoint
from fedlora.strategies.anchored import Anchored
from fedlora.strategies.head import Head
from fedlora.strategy import Client, Job, Strategy

from .played_rounds import PlayedRound, models, rounds, trained
from .random_clients import (
    RANK,
    TIGHT,
    Clients,
    added,
    aggregated,
    fresh,
    mean,
    moved,
    start_and_offset,
    start_apart,
)
from .verdict import ContractBroken, Skip, agree, apart, declared, differing, identical, leaves, require

AnyStrategy = Strategy[Any]
T = TypeVar("T")
LARGE = {"query": (400, 300)}  # where a product is far larger than its factors
COPIES = 50
OWN_WAY = Plan(rounds=3, cohort=3, training=Training(lr=0.5, batch_size=3))  # settings unlike those that are default
STATE = "make the state of LoRA, tensors, numbers, strings, and tuples, dicts and dataclasses of these"
WIDE = "take fedlora.lora.at_least_float32 of what is summed, as average does"
OFFSET = "the offset of a job is all that was added since the first round, as clients may sleep; adapter has it too"
APART = Skip("it is told who sent what, and its clients start from models of their own")


def check_order_of_clients_changes_nothing(strategy: AnyStrategy) -> None:
    """The order in which clients answer changes nothing."""
    remedy = "the place of an update tells nothing: use all alike, or declare needs_senders to be told whose each is"
    for now in rounds(strategy):
        claim = f"round {now.t} ends elsewhere when the clients answer in another order"
        work, weights = _turned(now.work), _turned(now.weights)
        agree(strategy, claim, now.models_from(work, weights), now.models, remedy=remedy)


def _turned(values: list[T]) -> list[T]:
    """The values with the first one last: in reverse, every second one of three would stay where it was."""
    return [*values[1:], *values[:1]]


def check_scale_of_weights_changes_nothing(strategy: AnyStrategy) -> None:
    """Weights have no scale: all of them ten thousand times as large do the same."""
    remedy = "the weights are not divided by their sum; fedlora.lora.normalised and average do it"
    for now in rounds(strategy):
        claim = f"round {now.t} ends elsewhere when all weights are ten thousand times as large"
        agree(strategy, claim, now.models_from(now.work, [1e4 * w for w in now.weights]), now.models, remedy=remedy)


def check_twice_the_weight_counts_as_two_clients(strategy: AnyStrategy) -> Skip | None:
    """A client of twice the weight does what two clients do that send the same, but where it declares `own_weights`."""
    held = True
    for now in rounds(strategy):
        doubled = now.models_from(now.work, [2.0, 1.0, 1.0])
        two = now.models_from([now.work[0], *now.work], [1.0] * 4)
        held = held and apart(doubled, two).near
        if not strategy.own_weights:
            ignored = _are_ignored(doubled, two, alike=now.models_from(now.work, [1.0] * 3))
            cause = "the weights change nothing" if ignored else "the weights count otherwise than once"
            remedy = f"{cause}: give them to average as they are, or declare own_weights = True for a rule of its own"
            claim = f"in round {now.t} a client of twice the weight does not count as two"
            agree(strategy, claim, doubled, two, remedy=remedy)
    if not strategy.own_weights:
        return None
    declared(strategy, "own_weights", not held, "a client of twice the weight counts as two")
    return Skip("it declares own_weights")


def _are_ignored(doubled: Side, two: Side, alike: Side) -> bool:
    """Where a doubled weight does not count as two clients, does it count for nothing, as if all were alike?"""
    differ = differing(doubled, two)
    return bool(differ) and apart({m: doubled[m] for m in differ}, {m: alike[m] for m in differ}).near


def check_state_survives_a_checkpoint(strategy: AnyStrategy) -> None:
    """A state read back from disk is the same to the bit, and so is what comes of it."""
    for now in rounds(strategy):
        found, claim = _stored_and_read_back(now), f"{strategy}: the state of round {now.t}"
        if found is None:
            raise ContractBroken(f"{claim} was written and could not be read back", STATE)
        require(identical(found.state, now.state), f"{claim} came back as another", STATE)
        after = aggregated(strategy, found.state, now.work, now.weights)
        require(identical(after, now.after), f"{strategy}: round {now.t} ends elsewhere from a state read back")


def _stored_and_read_back(now: PlayedRound) -> Checkpoint | None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), Checkpoint(now.t, now.state, {}))
        return checkpoint.latest(Path(folder))


def check_jobs_leave_to_the_run_what_it_fills_in(strategy: AnyStrategy) -> None:
    """A job sets nothing that the run fills in, and overrides none but training settings, which reach the client."""
    for now in rounds(strategy):
        for i, work in enumerate(now.work):
            client = Client(i, i + 1, now.clients.ranks[i])
            told = asdict(job_for(strategy, now.state, client, OWN_WAY, now.t).training)
            meant = {**asdict(OWN_WAY.training), **work.job.overrides}
            meant |= {name: work.job.lr_factor * meant[name] for name in ("lr", "head_lr")}
            claim = f"{strategy}: in round {now.t} client {i} is to train by {meant}, and is told {told}"
            require(told == meant, claim)


def check_what_is_delivered_is_what_clients_start_from(strategy: AnyStrategy) -> Skip | None:
    """The adapter that is delivered is the model of the next job or, where clients keep a factor, what they share."""
    for now in rounds(strategy):
        if start_apart(strategy, now.clients.jobs(now.after)):
            return APART
        delivered = strategy.adapter(now.after)
        job = now.clients.job(now.after, 0)
        _agree_on_the_model(strategy, f"after round {now.t} clients start from another model", delivered, job)
    return None


def check_rows_that_stay_with_clients_are_theirs_alone(strategy: AnyStrategy) -> Skip | None:
    """Where rows of the rank stay with clients, a job brings those of the very first start, and nothing is added."""
    for now in rounds(strategy):
        for i, work in enumerate(now.work):
            if not work.job.keeps_rank:
                return Skip("none of its jobs has rows stay with clients")
            jobs = work.job, now.clients.job(strategy.init(fresh()), i)
            brought, first = (split_rank(job.start, work.job.keeps_rank)[1] for job in jobs)
            claim = f"{strategy}: in round {now.t} the rows that stay with a client start from others than at first"
            require(identical(brought, first), claim)
            sent = [{m: t.shape for m, t in x.A.items()} for x in (work.update, shared_start(work.job))]
            require(sent[0] == sent[1], f"{strategy}: in round {now.t} rows are sent that stay with a client")
    return None


def check_a_client_that_slept_is_right_after_one_job(strategy: AnyStrategy) -> Skip | None:
    """The job of a client that was never asked before has in it all that the others were sent over the rounds."""
    clients, weights = Clients(strategy), [1.0, 2.0]
    state = strategy.init(fresh())
    for t in range(3):
        work = clients.work(state, t, who=(0, 1))
        state = aggregated(strategy, state, work, weights)
        if start_apart(strategy, clients.jobs(state)):
            return APART
        claim = f"after {t + 1} rounds a client that slept is sent"
        _agree_on_the_model(strategy, f"{claim} not the run's model", strategy.adapter(state), clients.job(state, 2))
        if strategy.exact:
            ideal = mean([w.model for w in work], weights)
            agree(strategy, f"{claim} not the mean of the others' models", clients.model(state, 2), ideal)
    return None


def check_one_client_alone_is_followed(strategy: AnyStrategy) -> Skip | None:
    """The model that a client alone trained is the next model, whatever becomes of its factors."""
    promised = strategy.exact or strategy.continues
    for now in rounds(strategy, (RANK,)):
        distance = apart(now.models, trained(now.work))
        if not distance.near and not promised:
            return Skip(f"it is neither exact nor does it continue: a client alone is missed {distance}")
        claim = f"{strategy}: in round {now.t} the model of a client alone is missed {distance}"
        require(distance.near, claim, "what one client sends is what the next round starts from")
    return None


def check_equal_updates_do_what_one_does(strategy: AnyStrategy) -> None:
    """Fifty clients that send the same do what one of them does."""
    for now in rounds(strategy):
        many = now.models_from(now.work[:1] * COPIES, [1.0] * COPIES)
        alone = now.models_from(now.work[:1], [1.0])
        claim = f"{COPIES} equal updates in round {now.t} do not do what one of them does"
        agree(
            strategy, claim, many, alone, remedy="a mean of equal updates is that update: divide by the sum of weights"
        )


def check_half_precision_is_summed_in_single(strategy: AnyStrategy) -> None:
    """Factors in bfloat16 are summed in float32 or wider, and no state is narrower."""
    clients = Clients(strategy)
    state = strategy.init(fresh(dtype=torch.float32))
    for t in range(2):
        work = clients.work(state, t)[0]
        half = replace(work, update=_cast(work.update, torch.bfloat16))
        single = replace(work, update=_cast(half.update, torch.float32))
        alone = aggregated(strategy, state, [single], [1.0])
        state = aggregated(strategy, state, [half] * COPIES, [1.0] * COPIES)
        for tensor in leaves(state):
            wide = not tensor.is_floating_point() or tensor.element_size() >= 4
            claim = f"{strategy}: from updates in bfloat16 the state of round {t} holds {tensor.dtype}, not float32"
            require(wide, claim, WIDE)
        claim = f"{COPIES} equal updates in bfloat16 do not do what one of them does in float32"
        agree(strategy, claim, models(clients, state), models(clients, alone), close=1e-4, remedy=WIDE)


def check_rank_may_be_a_dimension(strategy: AnyStrategy) -> None:
    """Nothing takes A for B, or a matrix for its transpose, where the rank is a module's smaller dimension."""
    where = f"at rank {RANK}, a dimension of each module,"
    for now in rounds(strategy, start=fresh(TIGHT)):
        shapes = {m: tuple(product.shape) for m, product in delta(strategy.adapter(now.after)).items()}
        require(shapes == TIGHT, f"{strategy}: at rank {RANK} it delivers {shapes} for modules of {dict(TIGHT)}")
        if strategy.exact:
            agree(strategy, f"{where} it misses the mean of the models", now.models, now.ideal_for_all)
        twice = now.models_from(now.work[:1] * 2, [1.0] * 2)
        once = now.models_from(now.work[:1], [1.0])
        agree(strategy, f"{where} a client that is there twice counts otherwise than once", twice, once)


def check_a_start_that_is_not_zero_is_taken_off(strategy: AnyStrategy) -> None:
    """Anchored, as with PiSSA's start, it begins with the pretrained model, and keeps what it declares from there."""
    anchored, start = Anchored(strategy), moved(fresh(), "B", "start")
    claim = "anchored at a start that is not zero, it"
    for now in rounds(anchored, start=start):
        job = now.work[0].job
        if now.t == 0:
            _agree_on_nothing_added(strategy, f"{claim} does not begin with the pretrained model", job, delta(start))
        if strategy.exact:
            agree(strategy, f"{claim} misses the mean in round {now.t}", now.models, now.ideal_for_all)
        if not _is_personal(job) and not start_apart(strategy, now.clients.jobs(now.after)):
            delivered, next_job = anchored.adapter(now.after), now.clients.job(now.after, 0)
            _agree_on_the_model(strategy, f"{claim} delivers another model than clients use", delivered, next_job)


def check_a_head_that_is_not_shared_stays_with_its_owner(strategy: AnyStrategy) -> None:
    """Wrapped so that heads are local or frozen, no head is asked for, and the server's stays as it was."""
    _check_head(strategy, "local", trains=True)
    _check_head(strategy, "frozen", trains=False)


def _check_head(strategy: AnyStrategy, policy: Literal["local", "frozen"], *, trains: bool) -> None:
    wrapped = Head(strategy, policy)
    for now in rounds(wrapped):
        job = now.work[0].job
        claim = f"{strategy}: with a {policy} head the job trains {job.trains} and shares {job.shares}"
        require("H" not in job.shares, claim)
        require(trains or "H" not in job.trains, claim)
        changed = f"with a {policy} head the server's own changes in round {now.t}"
        agree(strategy, changed, wrapped.adapter(now.after).H, fresh().H)


def check_no_product_is_built_on_the_server(strategy: AnyStrategy) -> None:
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
    claim = f"{strategy}: a tensor of {tuple(shape)} was made for modules of {LARGE}"
    require(shape.numel() < dense, claim, "stay in factors, as fedlora.lora.stack, residual and truncate do")


class _Largest(TorchFunctionMode):
    """Remembers the shape of the largest tensor that any function of torch's returns."""

    shape = torch.Size([0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, Tensor):
                self.shape = max(self.shape, value.shape, key=torch.Size.numel)
        return made


def _agree_on_the_model(strategy: AnyStrategy, claim: str, adapter: LoRA, job: Job) -> None:
    """Compare an adapter with the job of a client that keeps nothing yet: as models, or side by side if shared."""
    if _is_personal(job):
        for s in job.shares:
            agree(strategy, f"{claim} (side {s})", job.start.side(s), adapter.side(s), remedy=OFFSET)
        return
    start, offset = start_and_offset(job, LoRA())
    model, delivered = {**added(job, start, offset), **start.H}, {**delta(adapter), **adapter.H}
    agree(strategy, claim, model, delivered, remedy=OFFSET)


def _agree_on_nothing_added(strategy: AnyStrategy, claim: str, job: Job, product: Side) -> None:
    """Hold that a client starts with the pretrained model, where the offset takes `product` off the same again."""
    model = added(job, *start_and_offset(job, LoRA()))
    agree(strategy, claim, {m: model[m] + p for m, p in product.items()}, product)  # rounding is relative to `product`


def _is_personal(job: Job) -> bool:
    """Has each client a factor, and so a product, of its own?"""
    return bool(set("ABR") & set(own_sides(job)))


def _cast(lora: LoRA, dtype: torch.dtype) -> LoRA:
    return map_factors(lambda t: t.to(dtype), lora)
