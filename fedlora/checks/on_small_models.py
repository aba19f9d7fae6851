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

from fedlora.jobs import is_personal, kept_part, own_sides, shared_part, trained_letters
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
from fedlora.strategy import Client, Job, Sender, Strategy, Update, catalogue, declare, next_state

from .federation import PLAN, SmallFederation, alike, mixed, model_for, model_of, small_federation
from .random_clients import mean, start_apart
from .small_models import KINDS, Fleets, SmallModel
from .verdict import ContractBroken, Skip, agree, identical, require

AnyStrategy = Strategy[Any]
MOST_STEPS = 5  # local steps of which each is looked at by itself


def check_what_trains_moves_and_nothing_else(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """Every matrix of a side that a job trains moves; the others stay as they were, to the bit."""
    with small_federation(strategy, model_for(strategy, "bert"), fleets) as federation:
        for t, state in federation.states():
            for i, job in federation.jobs(state, t).items():
                _check_moves(federation, i, job, f"{strategy}: client {i} in round {t}")


def check_gradients_reach_what_trains_alone(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """With the sides of a step set to train, the gradient of every other matrix, the base's too, is None."""
    small = model_for(strategy, "bert")
    with small_federation(strategy, small, fleets) as federation:
        for t, job in federation.first_jobs():
            federation.train(0, job)
            small.model.loss(small.batch).backward()  # type: ignore[no-untyped-call]
            last = job.sides_of(job.training.steps - 1)
            letters = last if job.turns else trained_letters(job)
            _check_gradients(small, letters, f"{strategy}: round {t} trains {last} in its last step, and")


def _check_gradients(small: SmallModel, sides: str, claim: str) -> None:
    reached = {id(p): name for name, p in small.model.net.named_parameters() if p.grad is not None}
    trained = {id(p) for p in small.model.set_trainable(sides)}  # this clears gradients, so it comes second
    others = [reached[i] for i in reached.keys() - trained]
    require(not others, f"{claim} a gradient reached {', '.join(others)}")
    require(trained <= reached.keys(), f"{claim} {len(trained - reached.keys())} matrices of these got none")


def check_local_steps_train_the_sides_in_turn(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """Where a job trains sides in turn, a step moves those of its turn, B = 0 or not; the others stay to the bit."""
    with small_federation(strategy, model_for(strategy, "bert"), fleets) as federation:
        for t, job in federation.first_jobs():
            if not job.turns:
                return Skip("its jobs train all their sides in every step")
            _check_turns(federation, job, f"{strategy}: in round {t} step")
    return None


def _check_turns(federation: SmallFederation, job: Job, claim: str) -> None:
    """Have client 0 do the job for 1 step, 2, ...: each moves the sides in turn, from where the one before was."""
    before = federation.load(0, job)
    for step in range(min(len(job.turns) + 1, MOST_STEPS)):
        longer = replace(job, training=replace(job.training, steps=step + 1, weight_decay=0.1))
        _, after = federation.train(0, longer)
        for s, m, matrix in before.matrices():
            moved = not torch.equal(matrix, after.side(s)[m])
            named = f"{claim} {step + 1} is to train {job.sides_of(step)}, and {s} of {m}"
            require(moved == (s in job.sides_of(step)), f"{named} {'moved' if moved else 'did not move'}")
        before = after


def check_messages_hold_what_is_shared_alone(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """Nothing but the shared sides is in an update, nor in the message that carries it."""
    with small_federation(strategy, model_for(strategy, "bert"), fleets) as federation:
        for t, job in federation.first_jobs():
            update, trained = federation.train(0, job)
            sent = [s for s in SIDES if update.lora.side(s)]
            claim = f"{strategy}: round {t} shares {job.shares}"
            require(set(sent) == set(job.shares), f"{claim}, and {''.join(sent)} was sent")
            if job.keeps_rank:
                same = identical(update.lora, shared_part(job, trained))
                require(same, f"{claim}, and what was sent is not what was trained of them")
            arrived = upload_checks.validated_update(unpack(codec.pack_update(update, job.round)), job)
            same = isinstance(arrived, Update) and identical(arrived.lora, update.lora)
            require(same, f"{claim}, and its message holds another update than was made")


def check_a_second_pass_is_of_what_the_first_trained(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """In a second pass each client sends what is asked of the factors that it has just trained, and trains nothing."""
    if strategy.exchanges == 1:
        return Skip("its rounds have one pass")
    with small_federation(strategy, model_for(strategy, "bert"), fleets) as federation:
        for t, state in federation.states():
            done = {i: federation.train(i, job) for i, job in federation.jobs(state, t).items()}
            updates, weights = [u.lora for u, _ in done.values()], [float(u.examples) for u, _ in done.values()]
            senders = [Sender(i, u.examples, u.loss) for i, (u, _) in done.items()]
            for i, job in federation.jobs(next_state(strategy, state, updates, weights, senders), t).items():
                sent, asked = federation.train(i, job)[0], shared_part(job, done[i][1])
                claim = f"in the second pass of round {t} client {i}"
                agree(strategy, f"{claim} sends what is not of the factors that it trained", sent.lora.A, asked.A)
                alone = sent.examples == done[i][0].examples and not sent.lora.only("BHR")
                require(alone, f"{strategy}: {claim} has another weight than in the first, or sends more")
    return None


def check_numbers_sent_are_as_declared(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """`up` and `down` say how many numbers cross the wire in a round; those of a shared head come on top."""
    if not (strategy.up and strategy.down):
        return Skip("it does not declare both up and down, as up = 'r * d_out' of numbers a round and module")
    small = model_for(strategy, "bert")
    _check_numbers(strategy, small, fleets, alike(small)[:2])
    if strategy.mixed_ranks:
        _check_numbers(strategy, small, fleets, mixed(small)[:2])
    return None


def _check_numbers(strategy: AnyStrategy, small: SmallModel, fleets: Fleets, ranks: Sequence[int]) -> None:
    """Hold the bytes of rounds 2 and 3 against the declared formulas; in earlier rounds clients are sent what stays."""
    plan = replace(PLAN, rounds=4, cohort=2)
    with small_federation(strategy, small, fleets, ranks, plan) as federation:
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
    def declared(formula: str) -> int:
        heads = sum(4 * job.correction.only("H").numel() for job in jobs.values() if way == "down")
        return heads + sum(4 * _numbers(formula, job, ranks, i) for i, job in jobs.items())

    formula: str = getattr(strategy, way)
    if declared(formula) != counted:
        makes = f"{strategy}: {way} = {formula!r} makes {declared(formula)} {claim}, and {counted} were counted"
        known = {getattr(entry.default, way) for entry in catalogue()} - {""}
        right = [repr(one) for one in sorted(known, key=len) if declared(one) == counted]
        require(False, makes, f"declare {way} = {' or '.join(right) or 'what it is'}, or leave up and down out")


def check_a_model_is_its_weights_plus_s_times_the_product(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """A client computes as a plain model does whose weights are W + s (offset + B A), summed densely."""
    for small in (model_for(strategy, kind) for kind in KINDS):
        ranks = mixed(small) if strategy.mixed_ranks else alike(small)
        with small_federation(strategy, small, fleets, ranks) as federation:
            _, jobs = federation.after()
            for i, job in jobs.items():
                loaded = federation.load(i, job)
                plain = _plain_logits(small, model_of(job, loaded, loaded), loaded.H)
                claim = f"{small.kind}, s = {small.s:.3g}: client {i} computes otherwise than W + s (offset + B A)"
                _agree_on_logits(strategy, claim, small.logits(), plain)


def check_an_exported_adapter_is_the_model_that_was_trained(strategy: AnyStrategy, fleets: Fleets = Serial) -> None:
    """Saved as PEFT saves and loaded by plain PEFT on a clean base, what is delivered gives the clients' logits."""
    for small in (model_for(strategy, kind) for kind in KINDS):
        with small_federation(strategy, small, fleets) as federation:
            state, jobs = federation.after()
            adapter = strategy.adapter(state)
            exported = _exported_logits(small, adapter)
            plain = _plain_logits(small, delta(adapter), adapter.H)
            _agree_on_logits(strategy, f"{small.kind}: the export is not what is delivered", exported, plain)
            if not is_personal(jobs[0]) and not start_apart(strategy, [*jobs.values()]):
                federation.load(0, jobs[0])
                claim = f"{small.kind}: the export is not the model of the clients"
                _agree_on_logits(strategy, claim, exported, small.logits())


def check_what_a_client_keeps_is_its_own(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """What clients do not share, a local head at least, is what each last wrote, whoever trained in between."""
    with small_federation(Head(strategy, "local"), model_for(strategy, "bert"), fleets) as federation:
        _, jobs = federation.after()
        if not kept_part(jobs[0], jobs[0].start):
            return Skip("its clients train no head, and share all that they train")
        wrote = {i: kept_part(job, federation.train(i, job)[1]) for i, job in jobs.items()}
        for i, job in jobs.items():
            claim = f"{strategy}: the {own_sides(job) or 'rows'} of client {i}"
            found = kept_part(job, federation.load(i, job))
            require(identical(found, wrote[i]), f"{claim} is not what it last wrote")
            _check_nobody_elses(i, wrote, claim)
    return None


def _check_nobody_elses(i: int, wrote: dict[int, LoRA], claim: str) -> None:
    for j in wrote.keys() - {i}:
        require(not identical(wrote[j], wrote[i]), f"{claim} is that of client {j}, whose data are others")


def check_a_client_that_slept_computes_with_the_model(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """A client that was never asked before computes, from its first job alone, with the model that is delivered."""
    small = model_for(strategy, "llama")
    plan = replace(PLAN, cohort=2, seed=_seed_without_client_2(small))
    with small_federation(strategy, small, fleets, plan=plan) as federation:
        state, jobs = federation.after()
        if start_apart(strategy, [*jobs.values()]):
            return Skip("it is told who sent what, and its clients start from models of their own")
        adapter, job = strategy.adapter(state), jobs[2]
        loaded = federation.load(2, job)
        if own_sides(job):
            for s in job.shares:
                agree(strategy, f"a client that slept has another {s}", loaded.side(s), adapter.side(s))
            return None
        found = small.logits()
        small.model.set_adapter(adapter)
        _agree_on_logits(strategy, "a client that slept has another model", found, small.logits())
    return None


def _seed_without_client_2(small: SmallModel) -> int:
    """The first seed by which the plan's cohorts of two never hold client 2."""
    clients = [data.client(i, small.lora.rank) for i, data in enumerate(small.clients)]

    def is_drawn(seed: int) -> bool:
        cohorts = [sample(clients, 2, seed, t) for t in range(PLAN.rounds)]
        return any(client.id == 2 for cohort in cohorts for client in cohort)

    return next(seed for seed in count() if not is_drawn(seed))


def check_real_training_is_exact_where_declared(strategy: AnyStrategy, fleets: Fleets = Serial) -> Skip | None:
    """Where it declares `exact`, the new model is the mean, by examples, of the models that clients really trained."""
    if not strategy.exact:
        return Skip("it does not declare exact")
    small = model_for(strategy, "bert")
    ranks = mixed(small) if strategy.mixed_ranks else alike(small)
    with small_federation(strategy, small, fleets, ranks) as federation:
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
    with small_federation(recorded, model_for(strategy, "bert"), fleets) as federation:
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
        _check_kind(strategy, kind, fleets)
    return None


def _check_kind(strategy: AnyStrategy, kind: Any, fleets: Fleets) -> None:
    """Have clients train with this kind of adapter; whatever goes wrong is the declaration's."""
    with small_federation(strategy, model_for(strategy, "llama", kind), fleets) as federation:
        try:
            _check_first_client_moves(federation, f"{strategy}: with {kind}, client 0")
        except Exception as e:
            claim = f"{strategy} declares {kind} among its kinds, and its rounds end in {type(e).__name__}: {e}"
            raise ContractBroken(claim, f"take {kind} out of kinds") from e


def _check_first_client_moves(federation: SmallFederation, claim: str) -> None:
    for t, job in federation.first_jobs():
        _check_moves(federation, 0, job, f"{claim} in round {t}")


def _check_moves(federation: SmallFederation, i: int, job: Job, claim: str) -> None:
    """Have the client do the job: every matrix that it trains must move, and no other."""
    before, (_, after) = federation.load(i, job), federation.train(i, job)
    moves = {(s, m): not torch.equal(matrix, after.side(s)[m]) for s, m, matrix in before.matrices()}
    if job.training.optimizer == "sgd":  # where a gradient is small its step is below rounding: one of a side will do
        moves = {(s, m): any(moves[key] for key in moves if key[0] == s) for s, m in moves}
    for (s, m), moved in moves.items():
        verb = "moved" if moved else "did not move"
        require(moved == (s in job.trains), f"{claim}, told to train {job.trains}, {verb} {s} of {m}")


def _numbers(formula: str, job: Job, ranks: Sequence[int], i: int) -> int:
    """A declared formula, summed over the modules of client i's job, and its head where that is shared."""
    total = sum(h.numel() for h in job.start.H.values()) if "H" in job.shares else 0
    newest = job.offset[-1].A if job.offset else {}
    for m, a in job.start.A.items():
        names = {"r": ranks[i], "d_in": a.shape[1], "d_out": job.start.B[m].shape[0], "t": job.round}
        names |= {
            "l": job.keeps_rank,
            "K": len(ranks),
            "R": sum(ranks),
            "r_max": max(ranks),
            "q": len(newest[m]) if m in newest else 0,
        }
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
