"""The interface of a federated algorithm, and the catalogue in which a strategy is found by its name.

A strategy is pure functions on the server, and never runs on a client: all that a client must do is data in a `Job`,
all that it did is data in an `Update`.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from inspect import getdoc, isabstract, signature
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

from . import other_names
from .errors import StrategyError, nearest
from .jobs import HIGHEST_RANK as HIGHEST_RANK
from .jobs import Client as Client
from .jobs import Job as Job
from .jobs import Update as Update
from .jobs import sent_sides
from .jobs import shared_start as shared_start
from .lora import LoRA
from .sections import Training as Training
from .strategy_files import module_of, path_and_name

GROUP = "fedlora.strategies"  # the entry-point group in which other distributions offer theirs
BUILT_IN = "fedlora.strategies"  # the package whose files are the strategies that come with fedlora
State = TypeVar("State")


@dataclass(frozen=True)
class Sender:
    """What the server knows of the client that sent an update."""

    id: int
    examples: int  # by its own count
    loss: float | None = None  # mean over its training in this round; None where it may not be told
    metrics: Mapping[str, float] = field(default_factory=dict)  # its last held-out scores; empty where it told none
    sum_of_rates: float = 1.0  # of the learning rates of the steps it took in this round


class Strategy(ABC, Generic[State]):
    """A federated LoRA algorithm: a frozen dataclass whose fields are its options.

    Its methods are pure: arguments are left alone, and all that changes between rounds is in `State`, which is made of
    `LoRA`, tensors, numbers, strings, and tuples, dicts, named tuples and dataclasses of these.
    """

    exact: ClassVar[bool] = False  # is the new model the weighted mean of the clients' models, W + s B A?
    mixed_ranks: ClassVar[bool] = False  # may clients have different ranks?
    sums_only: ClassVar[bool] = False  # does `aggregate` need no more than weighted sums of the updates?
    needs_senders: ClassVar[bool] = False  # must `aggregate` know which client sent which update?
    needs_losses: ClassVar[bool] = False  # must it know the training loss of each?
    own_weights: ClassVar[bool] = False  # does it weigh clients by a rule of its own, and not by the run's weights?
    continues: ClassVar[bool] = False  # does a client alone go on from the factors it ended with, in the same basis?
    exchanges: ClassVar[int] = 1  # passes over a round's clients, 1 or 2: `client_init` and `aggregate` once for each
    kinds: ClassVar[tuple[str, ...]] = ("lora",)  # the kinds of adapters that it has a meaning for: lora, dora, vera
    up: ClassVar[str] = ""  # numbers a client sends a round and module, as `fedlora strategies` explains it
    down: ClassVar[str] = ""  # numbers it is sent, once it holds what stays the same

    @abstractmethod
    def init(self, lora: LoRA) -> State:
        """The state before the first round, from the adapter as PEFT made it (A random, B zero, head as it is)."""

    @abstractmethod
    def client_init(self, state: State, client: Client) -> Job:
        """The work of this client in this round.

        The run fills in `privacy` and all fields below it, and refuses a job in which a strategy has set one. A client
        whose training differs from the run's settings is told so by `overrides` and `lr_factor`.
        """

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        """The next state, from the shared sides of the clients that answered and their weights (any positive scale).

        A strategy that declares `needs_senders` takes one more argument, `senders: Sequence[Sender] = ()`, which says
        who sent each update, in the order of `updates`; call such a strategy by `next_state`.
        """

    @abstractmethod
    def adapter(self, state: State) -> LoRA:
        """The adapter that the run delivers: all that is added to the pretrained weights, of any rank, and the head."""

    def notes(self, state: State) -> Mapping[str, float]:
        """The strategy's own figures for the round's line in `rounds.jsonl`."""
        return {}


DECLARED = (
    "exact",
    "mixed_ranks",
    "sums_only",
    "needs_senders",
    "needs_losses",
    "own_weights",
    "continues",
    "exchanges",
    "kinds",
    "up",
    "down",
)


def declare(wrapper: Strategy[Any], inner: Strategy[Any], **other: Any) -> None:
    """Make `wrapper` declare what `inner` does, except for what is given; to be called in its `__post_init__`."""
    for name in DECLARED:
        object.__setattr__(wrapper, name, other.get(name, getattr(inner, name)))


def innermost(strategy: Strategy[Any]) -> Strategy[Any]:
    """The strategy without whatever is wrapped round it."""
    while inner := getattr(strategy, "inner", None):
        strategy = inner
    return strategy


def next_state(
    strategy: Strategy[State],
    state: State,
    updates: Sequence[LoRA],
    weights: Sequence[float],
    senders: Sequence[Sender],
) -> State:
    """What `strategy.aggregate` returns; it is given the senders of the updates if it declares `needs_senders`."""
    aggregate: Callable[..., State] = strategy.aggregate
    if strategy.needs_senders:
        return aggregate(state, updates, weights, senders=senders)
    return aggregate(state, updates, weights)


def check_declarations(strategy: Strategy[Any]) -> None:
    """Raise `StrategyError` for a strategy whose declarations contradict each other."""
    if strategy.needs_senders and strategy.sums_only:
        raise StrategyError(
            f"strategy {type(strategy).__name__} declares needs_senders and sums_only: a sum of updates has no sender; "
            "declare one of the two"
        )
    if strategy.exchanges not in (1, 2):
        raise StrategyError(
            f"strategy {type(strategy).__name__} declares exchanges = {strategy.exchanges!r}: a round has one pass "
            "over its clients, or a second one in which they train nothing; declare 1 or 2"
        )
    if strategy.needs_losses and not strategy.needs_senders:
        raise StrategyError(
            f"strategy {type(strategy).__name__} declares needs_losses and not needs_senders: losses come with the "
            "senders of the updates; declare both"
        )


def load(spec: str, **options: Any) -> Strategy[Any]:
    """Build the strategy that `spec` names, with its options.

    `spec` is the name of a built-in or of an entry point (`fedlora strategies` lists them), `package.module:Class`, a
    file, as `mine.py` or `mine.py:Mine`, or `flwr:Class` for a strategy of Flower's own, which aggregates the factors.
    Raises `StrategyError` where there is none of that name, or it has no such option.

    >>> load("fedavg")
    FedAvg()
    """
    return flower_strategy(spec, options) if spec.startswith("flwr:") else build_strategy(find(spec), options)


@dataclass(frozen=True)
class CatalogueEntry:
    """A strategy with the name by which it is found."""

    name: str  # what `--strategy` takes
    cls: type[Strategy[Any]]

    @property
    def doc(self) -> str:
        """The docstring of the file in which the strategy lies, which describes its paper."""
        return sys.modules[self.cls.__module__].__doc__ or getdoc(self.cls) or ""

    @property
    def title(self) -> str:
        """The paper's name for the strategy: its docstring up to the first colon."""
        first_line = self.doc.split("\n", 1)[0]
        return first_line.split(":", 1)[0].strip() if ":" in first_line else self.cls.__name__

    @property
    def paper(self) -> str:
        """The first address in the docstring."""
        return next((word.rstrip(".,)") for word in self.doc.split() if word.startswith("https://")), "")

    @cached_property
    def default(self) -> Strategy[Any]:
        """The strategy with the options it has by default."""
        return build_strategy(self.cls, {})

    @property
    def sides(self) -> tuple[str, str]:
        """What clients train and what they send in the first round, by the letters of the sides."""
        import torch

        from .lora import LoRA

        start = LoRA({"m": torch.eye(2, 3)}, {"m": torch.zeros(4, 2)}, {"head": torch.zeros(1)})
        job = self.default.client_init(self.default.init(start), Client(id=0, examples=1, rank=2))
        return job.trains, sent_sides(job)

    @property
    def options(self) -> str:
        """The strategy's own options, as `name=default`."""
        if not is_dataclass(self.cls):
            return ""
        return ", ".join(f"{f.name}={f.default}" for f in fields(self.cls))


def title(strategy: Strategy[Any]) -> str:
    """The paper's name for a strategy, whatever is wrapped round it."""
    return CatalogueEntry("", type(innermost(strategy))).title


def catalogue() -> Iterator[CatalogueEntry]:
    """Every strategy that has a name: the files of `strategies/`, then the entry points of what is installed."""
    for module in sorted(_built_in()):
        for cls in _strategies_in(f"{BUILT_IN}.{module}"):
            yield CatalogueEntry(module, cls)
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        yield CatalogueEntry(point.name, point.load())


def _is_strategy(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Strategy)


def find(spec: str) -> type[Strategy[Any]]:
    """The class that `spec` names: `fedavg`, `FedIT`, `fedavg:FedAvg`, an entry point, `module:Mine`, or a file."""
    if file := path_and_name(spec):
        return _in_file(*file)
    module, colon, name = spec.partition(":")
    if not colon:
        return _by_name(spec)
    module = f"{BUILT_IN}.{module}" if module in _built_in() else module
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as e:
        raise StrategyError(
            f'strategy "{spec}": no module named "{e.name}"; run from its folder, or add that folder to PYTHONPATH'
        ) from e
    except Exception as e:  # whatever a user's module raises
        raise StrategyError(
            f'strategy "{spec}": {module} could not be imported: {type(e).__name__}: {e}; mend that file'
        ) from e
    found = getattr(loaded, name, None)
    if found is None:
        classes = [n for n, v in vars(loaded).items() if isinstance(v, type)]
        raise StrategyError(f'strategy "{spec}": {module} has no class "{name}"; {nearest(name, classes)}')
    if not _is_strategy(found):
        raise StrategyError(f'strategy "{spec}": {name} is not a subclass of fedlora.strategy.Strategy')
    chosen: type[Strategy[Any]] = found
    return chosen


def _in_file(path: Path, name: str) -> type[Strategy[Any]]:
    """The strategy of this name that a file defines, or its only one."""
    found = defined_in(path)
    if name in found:
        return found[name]
    if name:
        raise StrategyError(f'{path} has no strategy "{name}"; {nearest(name, found)}')
    alone = [cls for cls in found.values() if not is_wrapper(cls)]
    if len(alone) != 1:
        of_them = ", ".join(f"{path}:{cls.__name__}" for cls in alone or found.values())
        raise StrategyError(f"{path} defines {len(alone)} strategies that go round no other; name one of {of_them}")
    return alone[0]


def defined_in(path: Path) -> dict[str, type[Strategy[Any]]]:
    """The strategies that a file defines, by name, but for those that it imports. Raises `StrategyError` for none."""
    module = module_of(path)
    found = {n: v for n, v in vars(module).items() if _is_strategy(v) and v.__module__ == module.__name__}
    if not found:
        raise StrategyError(f"{path} defines no strategy; one is a subclass of fedlora.strategy.Strategy")
    return found


def build_strategy(cls: type[Strategy[Any]], options: Mapping[str, Any]) -> Strategy[Any]:
    """The strategy with its options, refused where it has none of that name or of that type."""
    if isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise StrategyError(f"strategy {cls.__name__} does not define {missing}")
    known = signature(cls).parameters
    hints = get_type_hints(cls)
    values = {}
    for name, value in options.items():
        if name not in known:
            raise StrategyError(f'strategy {cls.__name__} has no option "{name}"; {nearest(name, known)}')
        values[name] = _typed(f"option {name} of strategy {cls.__name__}", value, hints.get(name, Any))
    try:
        made = cls(**values)
    except (TypeError, ValueError) as e:
        raise StrategyError(f"strategy {cls.__name__} cannot be built: {e}") from e
    check_declarations(made)
    return made


def flower_strategy(spec: str, options: Mapping[str, Any]) -> Strategy[Any]:
    """A strategy of Flower's own, made by the server, which alone knows Flower's strategies."""
    flower = import_module(f"{__package__}.server.flower_strategy")
    made: Strategy[Any] = flower.load(spec.removeprefix("flwr:"), options)
    return made


def _typed(where: str, value: Any, kind: Any) -> Any:
    """The value in the annotated type; a word from the command line may become a number."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        raise StrategyError(f"{where} = {value!r}: {e.errors()[0]['msg']}") from e


def _by_name(name: str) -> type[Strategy[Any]]:
    """The strategy of the catalogue with this name, class name or title, whatever its case and punctuation."""
    names = list[str]()
    for entry in catalogue():  # as far as it takes: to look for entry points is slow
        if _letters(name) in map(_letters, (entry.name, entry.cls.__name__, entry.title)):
            return entry.cls
        names.append(entry.name)
    if setting := other_names.STRATEGIES.get(_letters(name)):
        raise StrategyError(f'"{name}" is no strategy here but a setting, round any strategy: {setting}')
    raise StrategyError(
        f'there is no strategy "{name}"; {nearest(name, names)}; your own is package.module:Class or file.py'
    )


def _letters(word: str) -> str:
    return "".join(c for c in word.lower() if c.isalnum())


def _built_in() -> set[str]:
    """The names of the files in `strategies/`. They are found, not imported: strategies import this module."""
    return {m.name for m in iter_modules(import_module(BUILT_IN).__path__)}


def _strategies_in(module: str) -> Iterator[type[Strategy[Any]]]:
    """The strategies that a file defines; a wrapper, which has a field `inner`, is not one by itself."""
    for cls in vars(import_module(module)).values():
        if _is_strategy(cls) and cls.__module__ == module and not is_wrapper(cls):
            yield cls


def is_wrapper(cls: type) -> bool:
    """Does a strategy of this class go round another one, which nobody has named?"""
    return "inner" in getattr(cls, "__dataclass_fields__", {})
