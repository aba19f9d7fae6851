"""Flower: the factors aggregated by a strategy of Flower's own, as `flwr:FedAdam`.

Beutel et al., Flower: A Friendly Federated Learning Research Framework (2020), https://arxiv.org/abs/2007.14390

    x = A, B and head as one vector,   x <- aggregate_train(x_1, ..., x_K)

Factors are averaged, so FedIT's error stays. Flower's objects remember between rounds; here each round makes a new one
and what it remembers is state, so that a run resumes. Vectors are float64: Krum's distances and Adam's second moments
have few digits left of float32.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from operator import itemgetter
from threading import get_ident
from typing import Any, NamedTuple, cast, get_type_hints

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid, strategy
from flwr.serverapp.strategy import FedAvg
from pydantic import TypeAdapter, ValidationError

from fedlora.errors import StrategyError, nearest
from fedlora.jobs import Client, Job
from fedlora.lora import LoRA, map_factors
from fedlora.messages.parts import content_hash
from fedlora.strategy import Strategy
from fedlora.vectors import from_vector, to_vector

WRAPS = "it goes round another strategy, which a name cannot say; take privacy from this program's own settings"
TREES = "it joins decision trees, and an adapter has none; take flwr:FedAvg"
REFUSED = {
    "FedProx": "its proximal term is the clients' part; take flwr:FedAvg with train.prox",
    "QFedAvg": "it weighs clients by their loss before they train, which is not measured; take flwr:FedAvg",
    "FedXgbBagging": TREES,
    "FedXgbCyclic": TREES,
    "DifferentialPrivacyClientSideAdaptiveClipping": WRAPS,
    "DifferentialPrivacyClientSideFixedClipping": WRAPS,
    "DifferentialPrivacyServerSideAdaptiveClipping": WRAPS,
    "DifferentialPrivacyServerSideFixedClipping": WRAPS,
}
OFFERED: dict[str, type[FedAvg]] = {
    name: cls
    for name, cls in vars(strategy).items()
    if isinstance(cls, type) and issubclass(cls, FedAvg) and name not in REFUSED
}
OF_MEANS = ("FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad")  # need the weighted mean alone
WITHOUT_STEP = ("FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")  # equal updates come out as sent
UNWEIGHTED = ("FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")
MEMORY = ("m_t", "v_t", "momentum_vector")  # the attributes in which Flower's objects keep arrays between rounds


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA
    round: int  # finished; Flower counts from 1
    memory: dict[str, Any]  # attribute of Flower's object -> tensors


@dataclass(frozen=True)
class FlowerStrategy(Strategy[State]):
    """A strategy of Flower\'s own, by the name of its class and its numbers."""

    name: str  # of a class of flwr.serverapp.strategy
    options: tuple[tuple[str, int | float], ...] = ()

    kinds = ("lora", "dora", "vera")
    up = down = "r * (d_in + d_out)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sums_only", self.name in OF_MEANS)
        object.__setattr__(self, "own_weights", self.name in UNWEIGHTED)
        object.__setattr__(self, "continues", self.name in WITHOUT_STEP)

    def init(self, lora: LoRA) -> State:
        return State(lora, 0, {})

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=state.lora)

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        start = to_vector(state.lora, torch.float64)
        vectors = [to_vector(u.over(state.lora), torch.float64) for u in updates]  # `over`: in the order of the start
        # Flower breaks Krum's ties by order; ordered by content, no order of clients changes what comes out
        named = [(content_hash(x.numpy().tobytes()), w, x) for x, w in zip(vectors, weights, strict=True)]
        replies = [reply(x, w) for _, w, x in sorted(named, key=itemgetter(0, 1))]
        with quiet():
            flower = build_flower_strategy(self.name, dict(self.options))
            flower.configure_train(state.round + 1, arrays(start), ConfigRecord(), cast(Grid, None))
            for attribute, value in state.memory.items():
                setattr(flower, attribute, to_numpy(value))
            result, _ = flower.aggregate_train(state.round + 1, replies)
        if result is None:
            raise StrategyError(
                f"round {state.round + 1}: flwr:{self.name} made nothing of the updates of {len(updates)} clients: "
                "ask a larger cohort, or lower its num_malicious_nodes"
            )
        vector = torch.tensor(next(iter(result.values())).numpy())
        return State(typed(from_vector(vector, state.lora), state.lora), state.round + 1, memory_of(flower))

    def adapter(self, state: State) -> LoRA:
        return state.lora


def load(name: str, options: Mapping[str, Any]) -> FlowerStrategy:
    """The strategy of Flower's with this name.

    Raises `StrategyError` where Flower has none, where it has no meaning for adapters, and for an option or a value
    that it does not take.
    """
    if name in REFUSED:
        raise StrategyError(f"flwr:{name} is not for adapters here: {REFUSED[name]}")
    if name not in OFFERED:
        raise StrategyError(f'Flower has no strategy "{name}" for here; {nearest(name, OFFERED)}')
    known = options_of(OFFERED[name])
    values: dict[str, int | float] = {}
    for option, value in options.items():
        if option not in known:
            raise StrategyError(f'strategy flwr:{name} has no option "{option}"; {nearest(option, known)}')
        values[option] = _typed(f"option {option} of strategy flwr:{name}", value, known[option])
    try:
        with quiet():
            build_flower_strategy(name, values)
    except ValueError as e:
        raise StrategyError(f"strategy flwr:{name} cannot be built: {e}") from e
    return FlowerStrategy(name, tuple(sorted(values.items())))


def _typed(where: str, value: Any, kind: type) -> int | float:
    """The value as this type of number."""
    try:
        number: int | float = TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        raise StrategyError(f"{where} = {value!r}: {e.errors()[0]['msg']}") from e
    return number


def options_of(cls: type[FedAvg]) -> dict[str, type]:
    """The numbers that a strategy's rule takes, by name; who is asked and how clients train is set by the run."""
    own = signature(cls).parameters.keys() - signature(FedAvg).parameters.keys() - {"eta_l"}  # eta_l is the clients'
    return {name: kind for name, kind in get_type_hints(cls.__init__).items() if name in own and kind in (int, float)}


def build_flower_strategy(name: str, options: Mapping[str, int | float]) -> FedAvg:
    """Flower's object; with a fraction of 0 its `configure_train` notes where the round starts, and asks nobody."""
    return OFFERED[name](fraction_train=0.0, **cast(dict[str, Any], options))


def memory_of(flower: FedAvg) -> dict[str, Any]:
    """What Flower's object keeps for the next round, as tensors by attribute."""
    kept = {attribute: vars(flower).get(attribute) for attribute in MEMORY}
    return {attribute: to_torch(value) for attribute, value in kept.items() if value is not None}


def arrays(vector: torch.Tensor) -> ArrayRecord:
    """The vector in Flower's form."""
    return ArrayRecord({"x": Array(vector.numpy())})


def reply(vector: torch.Tensor, weight: float) -> Message:
    """A client's reply that crossed no network."""
    content = RecordDict({"arrays": arrays(vector), "metrics": MetricRecord({"num-examples": float(weight)})})
    metadata = Metadata(0, "", 0, 0, "", "", 0.0, 0.0, MessageType.TRAIN)
    # without metadata a Message asks the process which task of Flower's it is, and here it may be none
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload, no-any-return]


def to_torch(value: Any) -> Any:
    """Arrays in dicts and lists as tensors in dicts and tuples, which a checkpoint can hold."""
    if isinstance(value, dict):
        return {k: to_torch(v) for k, v in value.items()}
    return tuple(to_torch(v) for v in value) if isinstance(value, list | tuple) else torch.tensor(value)


def to_numpy(value: Any) -> Any:
    """The arrays, dicts and lists that `to_torch` was given, as copies."""
    if isinstance(value, dict):
        return {k: to_numpy(v) for k, v in value.items()}
    return [to_numpy(v) for v in value] if isinstance(value, list | tuple) else np.array(value)


def typed(lora: LoRA, like: LoRA) -> LoRA:
    """Every matrix in the type that it has in `like`, or in float32 where that is wider."""

    return map_factors(lambda t, there: t.to(torch.promote_types(there.dtype, torch.float32)), lora, like)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Flower's log for this thread, because it tells of messages and nodes, of which there are none here."""
    logger, here = logging.getLogger("flwr"), get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    logger.addFilter(elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(elsewhere)
