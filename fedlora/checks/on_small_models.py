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
from fedlora.messages.sketch import scatter_rows
from fedlora.models import peft_files
from fedlora.models.peft_files import save_peft
from fedlora.server import upload_checks
from fedlora.server.rounds import sample
from fedlora.simulations.serial import Serial
from fedlora.strategies.head import Head
from fedlora.strategy import Client, Job, Sender, Strategy, Update, declare, next_state

from .federation import ALIKE, MIXED, PLAN, lab, model_of
from .random_clients import keeps, mean, private, start_apart
from .small_models import KINDS, RANK, Fleets, SmallModel, world
from .verdict import Skip, agree, identical

Some = Strategy[Any]


def check_what_trains_moves_and_nothing_else(strategy: Some, fleets: Fleets = Serial) -> None:
    """Every matrix of a side that a job trains moves; the others stay as they were, to the bit."""
    with lab(strategy, world("bert"), fleets) as here:
        for t, state in here.states():
            for i, job in here.jobs(state, t).items():
                before, (_, after) = here.worn(i, job), here.trained(i, job)
                _has_moved(f"{strategy}: client {i} in round {t}", job, before, after)


def check_gradients_reach_what_trains_alone(strategy: Some, fleets: Fleets = Serial) -> None:
    """With a job's sides set to train, the gradient of every other matrix, the base's too, is None."""
    where = world("bert")
    with lab(strategy, where, fleets) as here:
        for t, state in here.states():
            job = here.jobs(state, t)[0]
            here.trained(0, job)
            where.model.loss(where.batch).backward()  # type: ignore[no-untyped-call]
            reached = {id(p): n for n, p in where.model.net.named_parameters() if p.grad is not None}
            wanted = {id(p) for p in where.model.set_trainable(job.trains)}
            claim = f"{strategy}: round {t} trains {job.trains}, and"
            wrong = [n for p, n in reached.items() if p not in wanted]
            assert not wrong, f"{claim} a gradient reached {wrong[0]}"
            assert wanted <= set(reached), f"{claim} {len(wanted - set(reached))} matrices of these got none"


def check_messages_hold_what_is_shared_alone(strategy: Some, fleets: Fleets = Serial) -> None:
    """Nothing but the shared sides is in an update, nor in the message that carries it."""
    with lab(strategy, world("bert"), fleets) as here:
        for t, state in here.states():
            job = here.jobs(state, t)[0]
            update, _ = here.trained(0, job)
            sent = "".join(s for s in SIDES if update.lora.side(s))
            claim = f"{strategy}: round {t} shares {job.shares}"
            assert set(sent) == set(job.shares), f"{claim}, and {sent} was sent"
            arrived = upload_checks.validated_update(codec.pack_update(update, job.round), job)
            same = isinstance(arrived, Update) and identical(arrived.lora, update.lora)
            assert same, f"{claim}, and its message holds another update than was made"


def check_numbers_sent_are_as_declared(strategy: Some, fleets: Fleets = Serial) -> Skip | None:
    """`up` and `down` say how many numbers cross the wire in a round; those of a shared head come on top."""
    if not (strategy.up and strategy.down):
        return Skip("it does not declare both up and down")
    for ranks in (ALIKE[:2], MIXED[:2]) if strategy.mixed_ranks else (ALIKE[:2],):
        with lab(strategy, world("bert"), fleets, ranks, replace(PLAN, rounds=4, cohort=2)) as here:
            rounds = here.played()
            for t in (2, 3):
                jobs = here.jobs(rounds[t - 1].state, t)
                if any(part.D for job in jobs.values() for part in job.offset):
                    continue  # folded, and no longer the steady state
                for way, sent in (("up", rounds[t].bytes_up), ("down", rounds[t].bytes_down)):
                    said = sum(4 * _numbers(getattr(strategy, way), job, ranks, i) for i, job in jobs.items())
                    claim = f"{strategy}: {way} = {getattr(strategy, way)!r} makes {said} bytes in round {t}"
                    assert said == sent, f"{claim} for clients of ranks {tuple(ranks)}, and {sent} were counted"
    return None


def check_a_model_is_its_weights_plus_s_times_the_product(strategy: Some, fleets: Fleets = Serial) -> None:
    """A client computes as a plain model does whose weights are W + s (offset + B A), summed densely."""
    for kind in KINDS:
        where = world(kind)
        with lab(strategy, where, fleets, MIXED if strategy.mixed_ranks else ALIKE) as here:
            _, jobs = here.after()
            for i, job in jobs.items():
                worn = here.worn(i, job)
                plain = _plain(where, model_of(job, worn, worn), worn.H)
                claim = f"{kind}, s = {where.s:.3g}: client {i} computes otherwise than W + s (offset + B A)"
                agree(strategy, claim, {"the logits": where.logits()}, {"the logits": plain})


def check_an_exported_adapter_is_the_model_that_was_trained(strategy: Some, fleets: Fleets = Serial) -> None:
    """Saved as PEFT saves and loaded by plain PEFT on a clean base, what is delivered gives the clients' logits."""
    for kind in KINDS:
        where = world(kind)
        with lab(strategy, where, fleets) as here, TemporaryDirectory() as folder:
            state, jobs = here.after()
            adapter = strategy.adapter(state)
            save_peft(where.model, adapter, Path(folder))
            stranger = {"the logits": where.of(peft_files.load_adapter(where.config, where.form, Path(folder)))}
            plain = {"the logits": _plain(where, delta(adapter), adapter.H)}
            agree(strategy, f"{kind}: the export is not what is delivered", stranger, plain)
            if not private(jobs[0]) and not start_apart(strategy, [*jobs.values()]):
                here.worn(0, jobs[0])
                claim = f"{kind}: the export is not the model of the clients"
                agree(strategy, claim, stranger, {"the logits": where.logits()})


def check_what_a_client_keeps_is_its_own(strategy: Some, fleets: Fleets = Serial) -> Skip | None:
    """What clients do not share, a local head at least, is what each last wrote, whoever trained in between."""
    with lab(Head(strategy, "local"), world("bert"), fleets) as here:
        _, jobs = here.after()
        if not (own := keeps(jobs[0])):
            return Skip("its clients train no head, and share all that they train")
        wrote = {i: here.trained(i, job)[1].only(own) for i, job in jobs.items()}
        for i, job in jobs.items():
            claim = f"{strategy}: the {own} of client {i}"
            assert identical(here.worn(i, job).only(own), wrote[i]), f"{claim} is not what it last wrote"
            others = [j for j in jobs if j != i and identical(wrote[j], wrote[i])]
            assert not others, f"{claim} is that of client {others[0]}, whose data are others"
    return None


def check_a_client_that_slept_wears_the_model(strategy: Some, fleets: Fleets = Serial) -> Skip | None:
    """A client that was never asked before computes, from its first job alone, with the model that is delivered."""
    where = world("llama")
    clients = [client_data.client(i, RANK) for i, client_data in enumerate(where.clients_data)]

    def sleeps(seed: int) -> bool:
        return all(c.id != 2 for t in range(PLAN.rounds) for c in sample(clients, 2, seed, t))

    with lab(strategy, where, fleets, plan=replace(PLAN, cohort=2, seed=next(filter(sleeps, count())))) as here:
        state, jobs = here.after()
        if start_apart(strategy, [*jobs.values()]):
            return Skip("it is told who sent what, and its clients start from models of their own")
        adapter, job = strategy.adapter(state), jobs[2]
        worn = here.worn(2, job)
        if private(job):
            for s in job.shares:
                agree(strategy, f"a client that slept wears another {s}", worn.side(s), adapter.side(s))
            return None
        got = where.logits()
        where.model.set_adapter(adapter)
        agree(strategy, "a client that slept wears another model", {"the logits": got}, {"the logits": where.logits()})
    return None


def check_real_training_is_exact_where_declared(strategy: Some, fleets: Fleets = Serial) -> Skip | None:
    """Where it declares `exact`, the new model is the mean, by examples, of the models that clients really trained."""
    if not strategy.exact:
        return Skip("it does not declare exact")
    with lab(strategy, world("bert"), fleets, MIXED if strategy.mixed_ranks else ALIKE) as here:
        ideal: Side = {}
        before: Side = {}
        for t, state in here.states():
            jobs = here.jobs(state, t)
            start = {i: here.worn(i, job) for i, job in jobs.items()}
            now = model_of(jobs[0], start[0], start[0])
            if ideal:
                claim = f"the step of round {t - 1} is not the mean of the clients' steps"
                agree(strategy, claim, _minus(now, before), _minus(ideal, before), close=1e-3)
            done = {i: here.trained(i, job) for i, job in jobs.items()}
            models = [model_of(job, start[i], done[i][1]) for i, job in jobs.items()]
            ideal, before = mean(models, [float(update.examples) for update, _ in done.values()]), now
    return None


def check_senders_are_those_of_the_updates(strategy: Some, fleets: Fleets = Serial) -> Skip | None:
    """A strategy that declares `needs_senders` is told of each update, in their order, which client trained it."""
    if not strategy.needs_senders:
        return Skip("it does not declare needs_senders")
    heard = _Heard(strategy)
    trained: list[dict[int, Update]] = []
    with lab(heard, world("bert"), fleets) as here:
        for t, state in here.states():
            jobs = here.jobs(state, t)
            updates = {i: here.trained(i, job)[0] for i, job in jobs.items()}
            whole = {c.id: strategy.client_init(state, c) for c in here.fleet.clients()}
            trained.append({i: replace(u, lora=scatter_rows(whole[i], u.lora)) for i, u in updates.items()})
    for t, (loras, senders) in enumerate(heard.calls):
        where = f"{strategy}: in round {t}"
        assert len(senders) == len(loras), f"{where} it gets {len(loras)} updates and {len(senders)} senders"
        for lora, sender in zip(loras, senders, strict=True):
            own = trained[t][sender.id]
            assert identical(lora, own.lora), f"{where} the update of client {sender.id} is another client's"
            known = sender.examples, sender.loss
            assert known == (own.examples, own.loss), f"{where} what is told of client {sender.id} is not its own"
    return None


def check_it_works_with_the_kinds_it_declares(strategy: Some, fleets: Fleets = Serial) -> Skip | None:
    """With every kind of adapter in `kinds`, clients train for two rounds, and what trains moves."""
    kinds = [kind for kind in strategy.kinds if kind != "lora"]
    for kind in kinds:
        with lab(strategy, world("llama", kind), fleets) as here:
            for t, state in here.states():
                job = here.jobs(state, t)[0]
                before, (_, after) = here.worn(0, job), here.trained(0, job)
                _has_moved(f"{strategy}: with {kind}, client 0 in round {t}", job, before, after)
    return None if kinds else Skip("it declares lora alone")


@dataclass(frozen=True)
class _Heard(Strategy[Any]):
    """A strategy, and what its `aggregate` was called with."""

    inner: Some
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


def _has_moved(who: str, job: Job, before: LoRA, after: LoRA) -> None:
    for s, m, was in before.matrices():
        moved = not torch.equal(was, after.side(s)[m])
        did = "moved" if moved else "did not move"
        assert moved == (s in job.trains), f"{who}, told to train {job.trains}, {did} {s} of {m}"


def _numbers(formula: str, job: Job, ranks: Sequence[int], i: int) -> int:
    """A declared formula, summed over the modules of client i's job, and its head where that is shared."""
    total = sum(h.numel() for h in job.start.H.values()) if "H" in job.shares else 0
    for m, a in job.start.A.items():
        newest = job.offset[-1].A.get(m) if job.offset else None
        names = {"r": ranks[i], "d_in": a.shape[1], "d_out": job.start.B[m].shape[0], "t": job.round}
        names |= {"K": len(ranks), "R": sum(ranks), "q": 0 if newest is None else len(newest)}
        total += eval(formula, {"__builtins__": {}}, names)
    return total


def _plain(where: SmallModel, product: Side, head: Side) -> Tensor:
    """The logits of the base with these products, (d_out, d_in), in its weights, and this head."""
    net = deepcopy(where.clean)
    modules: dict[str, Any] = dict(net.named_modules())
    with torch.no_grad():
        for m, p in product.items():
            transposed = type(modules[m]).__name__ == "Conv1D"
            modules[m].weight += where.s * (p.T if transposed else p)
        for name, h in head.items():
            net.get_parameter(name).copy_(h)
    return where.of(net)


def _minus(x: Side, y: Side) -> Side:
    return {m: x[m] - y[m] for m in x}
