"""What every strategy must do with real models: small transformers, clients that train, messages that are counted."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedlora.lora import SIDES, LoRA, Side, delta
from fedlora.messages import codec
from fedlora.messages.envelope import unpack
from fedlora.messages.sketch import scatter_rows
from fedlora.models import peft_files
from fedlora.models.peft_files import save_peft
from fedlora.server import upload_checks
from fedlora.server.rounds import sample
from fedlora.simulations.serial import Serial
from fedlora.strategies.head import Head
from fedlora.strategy import Client, Job, Sender, Strategy, Update, declare, next_state

from .federation import ALIKE, MIXED, PLAN, SmallFederation, model_of, small_federation
from .random_clients import kept_sides, mean, start_apart, unshared
from .small_models import KINDS, RANK, Fleets, SmallModel, small_model
from .verdict import Skip, agree, identical, require

AnyStrategy = Strategy[Any]


def check_what_trains_moves_and_nothing_else(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """Every matrix of a side that a job trains moves; the others stay as they were, to the bit."""
    with small_federation(strategy, small_model("bert"), fleets) as federation:
        for t, state in federation.states():
            for i, job in federation.jobs(state, t).items():
                _check_moves(federation, i, job, f"{strategy}: client {i} in round {t}")


def check_gradients_reach_what_trains_alone(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """With a job's sides set to train, the gradient of every other matrix, the base's too, is None."""
    small = small_model("bert")
    with small_federation(strategy, small, fleets) as federation:
        for t, job in federation.first_jobs():
            federation.train(0, job)
            small.model.loss(small.batch).backward()  # type: ignore[no-untyped-call]
            _check_gradients(small, job, f"{strategy}: round {t} trains {job.trains}, and")


def _check_gradients(small: SmallModel, job: Job, claim: str) -> None:
    reached = {id(p): name for name, p in small.model.net.named_parameters() if p.grad is not None}
    trained = {id(p) for p in small.model.set_trainable(job.trains)}  # this clears gradients, so it comes second
    others = [reached[i] for i in reached.keys() - trained]
    require(not others, f"{claim} a gradient reached {', '.join(others)}")
    require(trained <= reached.keys(), f"{claim} {len(trained - reached.keys())} matrices of these got none")


def check_messages_hold_what_is_shared_alone(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """Nothing but the shared sides is in an update, nor in the message that carries it."""
    with small_federation(strategy, small_model("bert"), fleets) as federation:
        for t, job in federation.first_jobs():
            update, _ = federation.train(0, job)
            sent = [s for s in SIDES if update.lora.side(s)]
            claim = f"{strategy}: round {t} shares {job.shares}"
            require(set(sent) == set(job.shares), f"{claim}, and {''.join(sent)} was sent")
            arrived = upload_checks.validated_update(unpack(codec.pack_update(update, job.round)), job)
            same = isinstance(arrived, Update) and identical(arrived.lora, update.lora)
            require(same, f"{claim}, and its message holds another update than was made")


def check_numbers_sent_are_as_declared(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """`up` and `down` say how many numbers cross the wire in a round; those of a shared head come on top."""
    if not (strategy.up and strategy.down):
        return Skip("it does not declare both up and down")
    _check_numbers(strategy, fleets, ALIKE[:2])
    if strategy.mixed_ranks:
        _check_numbers(strategy, fleets, MIXED[:2])
    return None


def _check_numbers(strategy: AnyStrategy, fleets: Fleets, ranks: Sequence[int]) -> None:
    """Hold the bytes of rounds 2 and 3 against the declared formulas; in earlier rounds clients are sent what stays."""
    plan = replace(PLAN, rounds=4, cohort=2)
    with small_federation(strategy, small_model("bert"), fleets, ranks, plan) as federation:
        rounds = federation.played()
        for t in (2, 3):
            jobs = federation.jobs(rounds[t - 1].state, t)
            if not _is_densified(jobs):
                claim = f"bytes in round {t} for clients of ranks {tuple(ranks)}"
                _check_bytes(strategy, "up", jobs, ranks, rounds[t].bytes_up, claim)
                _check_bytes(strategy, "down", jobs, ranks, rounds[t].bytes_down, claim)


def _is_densified(jobs: dict[int, Job]) -> bool:
    """Has the offset become a dense part? Then the round is not of the steady state that formulas are of."""
    parts = [part for job in jobs.values() for part in job.offset]
    return any(part.D for part in parts)


def _check_bytes(
    strategy: AnyStrategy, way: str, jobs: dict[int, Job], ranks: Sequence[int], counted: int, claim: str
) -> None:
    formula: str = getattr(strategy, way)
    declared = sum(4 * _numbers(formula, job, ranks, i) for i, job in jobs.items())
    makes = f"{strategy}: {way} = {formula!r} makes {declared} {claim}"
    require(declared == counted, f"{makes}, and {counted} were counted")


def check_a_model_is_its_weights_plus_s_times_the_product(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """A client computes as a plain model does whose weights are W + s (offset + B A), summed densely."""
    ranks = MIXED if strategy.mixed_ranks else ALIKE
    for small in map(small_model, KINDS):
        with small_federation(strategy, small, fleets, ranks) as federation:
            _, jobs = federation.after()
            for i, job in jobs.items():
                loaded = federation.load(i, job)
                plain = _plain_logits(small, model_of(job, loaded, loaded), loaded.H)
                claim = f"{small.kind}, s = {small.s:.3g}: client {i} computes otherwise than W + s (offset + B A)"
                _agree_on_logits(strategy, claim, small.logits(), plain)


def check_an_exported_adapter_is_the_model_that_was_trained(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """Saved as PEFT saves and loaded by plain PEFT on a clean base, what is delivered gives the clients' logits."""
    for small in map(small_model, KINDS):
        with small_federation(strategy, small, fleets) as federation:
            state, jobs = federation.after()
            adapter = strategy.adapter(state)
            exported = _exported_logits(small, adapter)
            plain = _plain_logits(small, delta(adapter), adapter.H)
            _agree_on_logits(strategy, f"{small.kind}: the export is not what is delivered", exported, plain)
            if not unshared(jobs[0]) and not start_apart(strategy, [*jobs.values()]):
                federation.load(0, jobs[0])
                claim = f"{small.kind}: the export is not the model of the clients"
                _agree_on_logits(strategy, claim, exported, small.logits())


def check_what_a_client_keeps_is_its_own(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """What clients do not share, a local head at least, is what each last wrote, whoever trained in between."""
    with small_federation(Head(strategy, "local"), small_model("bert"), fleets) as federation:
        _, jobs = federation.after()
        sides = kept_sides(jobs[0])
        if not sides:
            return Skip("its clients train no head, and share all that they train")
        wrote = {i: federation.train(i, job)[1].only(sides) for i, job in jobs.items()}
        for i, job in jobs.items():
            claim = f"{strategy}: the {sides} of client {i}"
            found = federation.load(i, job).only(sides)
            require(identical(found, wrote[i]), f"{claim} is not what it last wrote")
            _check_nobody_elses(i, wrote, claim)
    return None


def _check_nobody_elses(i: int, wrote: dict[int, LoRA], claim: str) -> None:
    for j in wrote.keys() - {i}:
        require(not identical(wrote[j], wrote[i]), f"{claim} is that of client {j}, whose data are others")


def check_a_client_that_slept_computes_with_the_model(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """A client that was never asked before computes, from its first job alone, with the model that is delivered."""
    small = small_model("llama")
    plan = replace(PLAN, cohort=2, seed=_seed_without_client_2(small))
    with small_federation(strategy, small, fleets, plan=plan) as federation:
        state, jobs = federation.after()
        if start_apart(strategy, [*jobs.values()]):
            return Skip("it is told who sent what, and its clients start from models of their own")
        adapter, job = strategy.adapter(state), jobs[2]
        loaded = federation.load(2, job)
        if unshared(job):
            for s in job.shares:
                agree(strategy, f"a client that slept has another {s}", loaded.side(s), adapter.side(s))
            return None
        found = small.logits()
        small.model.set_adapter(adapter)
        _agree_on_logits(strategy, "a client that slept has another model", found, small.logits())
    return None


def _seed_without_client_2(small: SmallModel) -> int:
    """The first seed by which the plan's cohorts of two never hold client 2."""
    clients = [data.client(i, RANK) for i, data in enumerate(small.clients)]

    def is_drawn(seed: int) -> bool:
        cohorts = [sample(clients, 2, seed, t) for t in range(PLAN.rounds)]
        return any(client.id == 2 for cohort in cohorts for client in cohort)

    return next(seed for seed in count() if not is_drawn(seed))


def check_real_training_is_exact_where_declared(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """Where it declares `exact`, the new model is the mean, by examples, of the models that clients really trained."""
    if not strategy.exact:
        return Skip("it does not declare exact")
    ranks = MIXED if strategy.mixed_ranks else ALIKE
    with small_federation(strategy, small_model("bert"), fleets, ranks) as federation:
        before: Side = {}
        ideal: Side = {}
        for t, state in federation.states():
            now, trained = _start_and_mean(federation, federation.jobs(state, t))
            if ideal:
                claim = f"the step of round {t - 1} is not the mean of the clients' steps"
                agree(strategy, claim, _minus(now, before), _minus(ideal, before), close=1e-3)
            before, ideal = now, trained
    return None


def _start_and_mean(federation: SmallFederation, jobs: dict[int, Job]) -> tuple[Side, Side]:
    """The model from which clients start a round, and the mean, by examples, of the models that they train in it."""
    start = {i: federation.load(i, job) for i, job in jobs.items()}
    now = model_of(jobs[0], start[0], start[0])
    models, examples = [], []
    for i, job in jobs.items():
        update, trained = federation.train(i, job)
        models.append(model_of(job, start[i], trained))
        examples.append(float(update.examples))
    return now, mean(models, examples)


def check_senders_are_those_of_the_updates(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """A strategy that declares `needs_senders` is told of each update, in their order, which client trained it."""
    if not strategy.needs_senders:
        return Skip("it does not declare needs_senders")
    recorded = _Recorded(strategy)
    trained: list[dict[int, Update]] = []
    with small_federation(recorded, small_model("bert"), fleets) as federation:
        for t, state in federation.states():
            trained.append({i: _widened(federation, state, t, i) for i in federation.jobs(state, t)})
    for t, (loras, senders) in enumerate(recorded.calls):
        _check_senders(loras, senders, trained[t], f"{strategy}: in round {t}")
    return None


def _widened(federation: SmallFederation, state: Any, t: int, i: int) -> Update:
    """The update of client i in round t as `aggregate` gets it: a sketch's rows in their place."""
    update, _ = federation.train(i, federation.jobs(state, t)[i])
    client = federation.fleet.clients()[i]
    return replace(update, lora=scatter_rows(federation.strategy.client_init(state, client), update.lora))


def _check_senders(loras: Sequence[LoRA], senders: Sequence[Sender], trained: dict[int, Update], claim: str) -> None:
    """Hold what `aggregate` was told of each client against the update that this client made."""
    require(len(senders) == len(loras), f"{claim} it gets {len(loras)} updates and {len(senders)} senders")
    for lora, sender in zip(loras, senders, strict=True):
        update = trained[sender.id]
        require(identical(lora, update.lora), f"{claim} the update of client {sender.id} is another client's")
        known = sender.examples, sender.loss
        require(known == (update.examples, update.loss), f"{claim} what is told of client {sender.id} is not its own")


@dataclass(frozen=True)
class _Recorded(Strategy[Any]):
    """A strategy, and the arguments of every call of its `aggregate`."""

    inner: AnyStrategy
    calls: list[tuple[Sequence[LoRA], Sequence[Sender]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        declare(self, self.inner)

    def init(self, lora: LoRA) -> Any:
        return self.inner.init(lora)

    def client_init(self, state: Any, client: Client) -> Job:
        return self.inner.client_init(state, client)

    def aggregate(
        self, state: Any, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> Any:
        self.calls.append((updates, senders))
        return next_state(self.inner, state, updates, weights, senders)

    def adapter(self, state: Any) -> LoRA:
        return self.inner.adapter(state)


def check_it_works_with_the_kinds_it_declares(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """With every kind of adapter in `kinds`, clients train for two rounds, and what trains moves."""
    kinds = [kind for kind in strategy.kinds if kind != "lora"]
    if not kinds:
        return Skip("it declares lora alone")
    for kind in kinds:
        small = small_model("llama", kind)
        with small_federation(strategy, small, fleets) as federation:
            _check_first_client_moves(federation, f"{strategy}: with {kind}, client 0")
    return None


def _check_first_client_moves(federation: SmallFederation, claim: str) -> None:
    for t, job in federation.first_jobs():
        _check_moves(federation, 0, job, f"{claim} in round {t}")


def _check_moves(federation: SmallFederation, i: int, job: Job, claim: str) -> None:
    """Have the client do the job: every matrix that it trains must move, and no other."""
    before, (_, after) = federation.load(i, job), federation.train(i, job)
    for s, m, matrix in before.matrices():
        moved = not torch.equal(matrix, after.side(s)[m])
        verb = "moved" if moved else "did not move"
        require(moved == (s in job.trains), f"{claim}, told to train {job.trains}, {verb} {s} of {m}")


def _numbers(formula: str, job: Job, ranks: Sequence[int], i: int) -> int:
    """A declared formula, summed over the modules of client i's job, and its head where that is shared."""
    total = sum(h.numel() for h in job.start.H.values()) if "H" in job.shares else 0
    newest = job.offset[-1].A if job.offset else {}
    for m, a in job.start.A.items():
        names = {"r": ranks[i], "d_in": a.shape[1], "d_out": job.start.B[m].shape[0], "t": job.round}
        names |= {"K": len(ranks), "R": sum(ranks), "q": len(newest[m]) if m in newest else 0}
        total += eval(formula, {"__builtins__": {}}, names)
    return total


def _exported_logits(small: SmallModel, adapter: LoRA) -> Tensor:
    """The logits of the adapter, saved as a PEFT folder and loaded by plain PEFT on a clean base."""
    with TemporaryDirectory() as folder:
        save_peft(small.model, adapter, Path(folder))
        return small.logits_of(peft_files.load_adapter(small.config, small.schema, Path(folder)))


def _plain_logits(small: SmallModel, product: Side, head: Side) -> Tensor:
    """The logits of the base with s times these products, (d_out, d_in), in its weights, and with this head."""
    net = deepcopy(small.clean)
    modules: dict[str, Any] = dict(net.named_modules())
    with torch.no_grad():
        for m, p in product.items():
            transposed = type(modules[m]).__name__ == "Conv1D"
            modules[m].weight += small.s * (p.T if transposed else p)
        for name, h in head.items():
            net.get_parameter(name).copy_(h)
    return small.logits_of(net)


def _agree_on_logits(strategy: AnyStrategy, claim: str, got: Tensor, want: Tensor) -> None:
    agree(strategy, claim, {"the logits": got}, {"the logits": want})


def _minus(x: Side, y: Side) -> Side:
    return {m: x[m] - y[m] for m in x}
