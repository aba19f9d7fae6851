"""What a strategy must be before its mathematics can be looked at: shapes, whole jobs, and methods without memory.

The first of these that fails is the last that is run: whatever else fails then comes of it.
"""

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.jobs import holds_scales, why_rows_cannot_stay
from fedlora.lora import SIDES, LoRA, delta
from fedlora.server.adapter_checks import misfits
from fedlora.strategy import Job, Strategy

from .played_rounds import rounds
from .random_clients import Clients, aggregated, fresh
from .verdict import identical, require

AnyStrategy = Strategy[Any]
Values = Mapping[str, Any]  # by a name that a reader finds
PLAIN = (bool, int, float, str, bytes, list, dict, set, tuple, Tensor, LoRA)
STATE = "what changes between rounds belongs in the state that init and aggregate return"
COPY = "make new tensors, as `x + y` does and `x += y` does not"
DRAW = "draw from torch.Generator().manual_seed(fedlora.seeds.derive(seed, round)), the round counted in the state"


def check_options_are_those_of_a_frozen_dataclass(strategy: AnyStrategy) -> None:
    """Its options are the fields of a frozen dataclass, so that a run which is resumed has the same strategy."""
    made = getattr(type(strategy), "__dataclass_params__", None)
    frozen = made is not None and made.frozen
    name = type(strategy).__name__
    said = strategy if made else name  # the text of any other object is an address
    remedy = f"write @dataclass(frozen=True) above class {name}; {STATE}"
    require(frozen, f"{said}: {name} is no dataclass with frozen=True", remedy)


def check_adapters_fit_the_modules(strategy: AnyStrategy) -> None:
    """The adapter of every state has A (r, d_in) and B (d_out, r) for each module and the whole head, all finite."""
    for now in rounds(strategy):
        adapter = strategy.adapter(now.after)
        claim = f"{strategy}: after round {now.t} its adapter"
        kind = type(adapter).__name__
        require(isinstance(adapter, LoRA), f"{claim} is a {kind}", "return a fedlora.lora.LoRA")
        for misfit in misfits(adapter, fresh()):
            require(False, f"{claim} has {misfit}", _why_misfit(adapter, fresh()))
        for side, m, t in adapter.matrices():
            finite = bool(torch.isfinite(t).all())
            require(finite, f"{claim} has numbers in {side} of {m} that are not finite", "look for a division by zero")


def _why_misfit(adapter: LoRA, like: LoRA) -> str:
    """The mistake by which these shapes come about, as far as they tell it."""
    causes: dict[str, Callable[[str], tuple[bool, bool]]] = {
        "A and B are exchanged": lambda m: (_alike(adapter.A[m], like.B[m]), _alike(adapter.B[m], like.A[m])),
        "B is transposed": lambda m: (_alike(adapter.A[m], like.A[m]), _turned(adapter.B[m], like.B[m])),
        "A is transposed": lambda m: (_turned(adapter.A[m], like.A[m]), _alike(adapter.B[m], like.B[m])),
    }
    whole = adapter.A.keys() >= like.A.keys() and adapter.B.keys() >= like.B.keys()
    for cause, shapes in causes.items() if whole else ():
        if all(all(shapes(m)) for m in like.A):
            return f"{cause}: A is (r, d_in) and B is (d_out, r) everywhere"
    if whole and not adapter.H:
        return "the head is left out: LoRA(A, B, H) has it, and `average` keeps it"
    return "return every side of every module, as `average` does, and `x.over(y)` for what x lacks"


def _turned(t: Tensor, like: Tensor) -> bool:
    """Is this matrix of the shape of the other one's transpose, at any rank?"""
    return t.dim() == 2 and _alike(t.T, like)


def _alike(t: Tensor, like: Tensor) -> bool:
    """Has this matrix the larger dimension of the other one where the other has it? The smaller is the rank's."""
    d = int(like.shape[0] < like.shape[1])
    return t.dim() == 2 and t.shape[d] == like.shape[d]


def check_jobs_are_complete(strategy: AnyStrategy) -> None:
    """A job brings every side, shares only what it trains, and its offset, sketch and correction fit the modules."""
    for now in rounds(strategy):
        claim = f"{strategy}: the job of round {now.t}"
        for work in now.work:
            _check_sides(work.job, claim)
            _check_scales(work.job, claim)
            _check_offset(work.job, claim)
            _check_sketch(work.job, claim)
            _check_correction(work.job, claim)
            why = why_rows_cannot_stay(work.job)
            require(not why, f"{claim} cannot be done: {why}", "set keeps_rank below every rank, or leave it at 0")


def _check_sides(job: Job, claim: str) -> None:
    for s in "ABH":
        whole = job.start.side(s).keys() == fresh().side(s).keys()
        remedy = "start from every side, also from those that are not trained"
        require(whole, f"{claim} starts from no whole {s}; a client may hold none", remedy)
    nested = set(job.shares) <= set(job.trains) <= set(SIDES)
    require(nested, f"{claim} trains {job.trains}, shares {job.shares}", "share no side that is not trained")
    in_turn = set("".join(job.turns)) == set(job.trains) or not job.turns
    remedy = "trains is all that has a turn"
    require(in_turn, f"{claim} trains {job.trains}, and in turn {', '.join(job.turns)}", remedy)
    for s in job.trains:
        brings = bool(job.start.side(s))
        require(brings, f"{claim} trains {s}, and brings none to start from", f"give Job.start a side {s}")


def _check_scales(job: Job, claim: str) -> None:
    holds = holds_scales(job) or not job.scales
    require(holds, f"{claim} trains scales of heads, and shares no core to hold them", "share R too")


def _check_offset(job: Job, claim: str) -> None:
    shapes = {m: product.shape for m, product in delta(fresh()).items()}
    for part in job.offset:
        for m, product in delta(part).items():
            fits = product.shape == shapes.get(m)
            require(fits, f"{claim} has an offset that does not fit {m}", "an offset's product is (d_out, d_in)")


def _check_sketch(job: Job, claim: str) -> None:
    for m, rows in job.sketch.items():
        rank = len(job.start.A[m])
        chosen = set(rows)
        good = len(chosen) == len(rows) > 0 and chosen <= set(range(rank))
        remedy = "name each row once, counted from 0"
        require(good, f"{claim} sketches rows {list(rows)} of the {rank} at {m}", remedy)


def _check_correction(job: Job, claim: str) -> None:
    for s, m, t in job.correction.matrices():
        trained = job.start.side(s).get(m) if s in job.trains else None
        fits = trained is not None and trained.shape == t.shape
        remedy = "correct what is trained, by a matrix of its shape"
        require(fits, f"{claim} corrects the gradient of {s} {m} by {tuple(t.shape)}", remedy)


def check_arguments_are_left_alone(strategy: AnyStrategy) -> None:
    """No method changes what it is given, to the bit."""
    start, clients = fresh(), Clients(strategy)
    before = deepcopy(start)
    state = strategy.init(start)
    require(identical(start, before), f"{strategy}: init changed the adapter it was given", COPY)
    for t in range(3):
        given = state, clients.work(state, t), clients.weights
        calls: dict[str, Callable[[], Any]] = {
            "client_init": partial(clients.job, state, 0),
            "adapter": partial(strategy.adapter, state),
            "notes": partial(strategy.notes, state),
            "aggregate": partial(aggregated, strategy, *given),
        }
        for name in _that_change(given, calls):
            require(False, f"{strategy}: {name} changed what it was given in round {t}", f"in {name} {COPY}")
        state = aggregated(strategy, *given)


def _that_change(given: Any, calls: dict[str, Callable[[], Any]]) -> Iterator[str]:
    """Make the calls one after another; the names of those after which what was given is another."""
    before = deepcopy(given)
    for name, call in calls.items():
        call()
        if not identical(given, before):
            yield name


def check_nothing_is_remembered_but_the_state(strategy: AnyStrategy) -> None:
    """The same state and updates give the same answer to the bit, whatever was asked in between."""
    for now in rounds(strategy):
        before = deepcopy(_outside_the_state(strategy))
        now.aggregated(now.work[::-1], now.weights)
        again = now.aggregated(now.work, now.weights)
        if not identical(again, now.after):
            changed = [n for n, v in _outside_the_state(strategy).items() if not _same(v, before.get(n))]
            claim = f"{strategy}: round {now.t} done again from the same state ends elsewhere"
            require(False, claim, _why_elsewhere(changed))


def _why_elsewhere(changed: list[str]) -> str:
    """What to do about an answer that is another the second time, after which these had changed."""
    drawn = [name for name in changed if name in _generators()]
    if drawn:
        return f"it draws from {drawn[0]}: {DRAW}"
    kept = f"it keeps something in {changed[0]}: " if changed else ""
    return f"{kept}{STATE}"


def _generators() -> Values:
    """The state of every generator that all of a process share, by a name."""
    numpy_state: Any = np.random.get_state(legacy=True)  # typed as if it might be a dict
    return {
        "torch's global generator": torch.get_rng_state(),
        "Python's global generator": random.getstate(),
        "numpy's global generator": numpy_state[1:],
    }


def _outside_the_state(strategy: AnyStrategy) -> dict[str, Any]:
    """Where a strategy could keep something, or draw from, beside its state: its object, class and file."""
    inner, cls = getattr(strategy, "inner", None), type(strategy)
    found = dict(_generators() if inner is None else _outside_the_state(inner))
    places = {"self": vars(strategy), cls.__name__: vars(cls), cls.__module__: vars(sys.modules[cls.__module__])}
    for place, values in places.items():
        found |= {f"{place}.{n}": v for n, v in values.items() if isinstance(v, PLAIN) and not n.startswith("__")}
    return found


def _same(one: Any, other: Any) -> bool:
    """Are two values equal, tensors in them to the bit?"""
    try:
        return identical(one, other)
    except Exception:  # what no checkpoint holds, as an array or a set
        return repr(one) == repr(other)
