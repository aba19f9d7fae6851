"""The strategy that a config names in its wrappers, refused where the combination has no meaning."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedlora.config import Config
from fedlora.errors import PrivacyError, StrategyError
from fedlora.lora import LoRA
from fedlora.sections import AggregateConfig
from fedlora.strategies.anchored import Anchored
from fedlora.strategies.capped import Capped
from fedlora.strategies.head import Head
from fedlora.strategies.robust import Robust
from fedlora.strategies.server_optimizer import ServerOptimizer
from fedlora.strategy import CatalogueEntry, Strategy, build_strategy, catalogue, load, title

from .asynchronous import check_asynchronous

QUANTIZED_CAP = 256  # rank of the offset's side adapter on a quantised base, where nothing can be folded away
KINDS = {
    "dora": "DoRA normalises the columns of W + s B A, so the mean of products and what is added to the base are not "
    "the mean of the models",
    "vera": "VeRA trains two vectors a module beside fixed factors, so there are no products to stack or decompose",
}


def compose(config: Config, start: LoRA, ranks: Sequence[int] = ()) -> Strategy[Any]:
    """The strategy in its wrappers; `start` is the adapter as PEFT made it, `ranks` has the rank of every client.

    Raises `StrategyError` for an adapter kind, mixed ranks or a wrapper that the strategy has no meaning for, and
    `PrivacyError` for a strategy that needs single updates in a run that hides them.
    """
    strategy = load(config.strategy, **config.option)
    check_strategy(strategy, config, ranks)
    strategy = _around_the_offset(strategy, config, start, ranks)
    if start.H and config.model.head != "shared":
        strategy = Head(strategy, config.model.head)
    return _around_the_updates(strategy, config.aggregate)


def check_strategy(strategy: Strategy[Any], config: Config, ranks: Collection[int] = ()) -> None:
    """Raise `StrategyError` or `PrivacyError` where the strategy has no meaning under these settings.

    `ranks` are those of the clients, as far as they are known.
    """
    check_kind_and_ranks(strategy, config.lora.kind, ranks)
    check_asynchronous(strategy, config)
    if config.dp.by_client or config.secure.aggregation:
        needs_sums_alone(strategy, config)


def _around_the_offset(strategy: Strategy[Any], config: Config, start: LoRA, ranks: Sequence[int]) -> Strategy[Any]:
    """The strategy with the wrappers that change what is added to the pretrained weights."""
    if config.lora.kind != "vera" and _has_product(start):
        _check_ranks_are_alike(config, ranks)
        strategy = Anchored(strategy)
    cap = _offset_cap(config)
    if cap and config.lora.kind == "lora":
        strategy = Capped(strategy, cap)
    return strategy


def _around_the_updates(strategy: Strategy[Any], chosen: AggregateConfig) -> Strategy[Any]:
    """The strategy with the wrappers that change the updates before it sees them."""
    if chosen.optimizer != "none":
        strategy = ServerOptimizer(
            strategy, chosen.optimizer, lr=chosen.lr, beta1=chosen.beta1, beta2=chosen.beta2, tau=chosen.tau
        )
    if chosen.robust != "none":
        strategy = Robust(strategy, chosen.robust, trim=chosen.trim, byzantine=chosen.byzantine, bound=chosen.bound)
    return strategy


def _has_product(start: LoRA) -> bool:
    """Is any B A of this start unlike zero, as with PiSSA's or OLoRA's?"""
    return any(bool(b.any()) for b in start.B.values())


def _check_ranks_are_alike(config: Config, ranks: Sequence[int]) -> None:
    if len(set(ranks)) > 1:
        raise StrategyError(
            f"lora.init = {config.lora.init} starts from a product that is not zero, of which clients of low rank "
            "would lose a piece: with lora.ranks take kaiming, gaussian, orthonormal or eva"
        )


def _offset_cap(config: Config) -> int:
    """The rank above which the offset is truncated; 0: it is not."""
    if config.model.quantize == "none":
        return config.aggregate.offset_rank
    return config.aggregate.offset_rank or QUANTIZED_CAP


def needs_sums_alone(strategy: Strategy[Any], config: Config) -> None:
    """Raise `PrivacyError` for a strategy that needs single updates, where the run lets the server have sums alone."""
    asked = "dp.level = client hides each in a noised sum" if config.dp.by_client else "secure.aggregation hides each"
    if not strategy.sums_only:
        others = _names(lambda cls: cls.sums_only)
        remedy = "dp.level = record, sound for every strategy" if config.dp.by_client else "secure.aggregation = false"
        needs = "every client's own update or product"
        if strategy.needs_senders:
            needs = "to know which client sent which update"
        raise PrivacyError(f"{title(strategy)} needs {needs}, and {asked}; take {remedy}, or one of {others}")
    if config.dp.by_client and strategy.exchanges > 1:
        raise PrivacyError(
            f"{title(strategy)} has two sums a round of projections of a product, and dp.level = client makes one "
            "release a round, of what is a sum of changes; take dp.level = record, or secure.aggregation alone"
        )
    if config.aggregate.robust != "none":
        raise PrivacyError(
            f"aggregate.robust = {config.aggregate.robust} compares the clients' updates, and {asked}; leave it out"
        )


def check_kind_and_ranks(strategy: Strategy[Any], kind: str, ranks: Collection[int] = ()) -> None:
    """Raise `StrategyError` where the strategy has no meaning for this kind of adapter, or for ranks that differ."""
    if kind not in strategy.kinds:
        others = _names(lambda cls: kind in cls.kinds)
        raise StrategyError(f"{title(strategy)} cannot train lora.kind = {kind}: {KINDS[kind]}; it works with {others}")
    if len(set(ranks)) > 1 and not strategy.mixed_ranks:
        others = _names(lambda cls: cls.mixed_ranks is True)
        raise StrategyError(
            f"{title(strategy)} needs clients of one rank, and lora.ranks gives {min(ranks)} to {max(ranks)}; "
            f"mixed ranks work with {others}"
        )


def _names(fits: Callable[[type[Strategy[Any]] | Strategy[Any]], bool]) -> str:
    """The strategies of the catalogue that fit as they are, by name, and those that do with another option."""
    found = []
    for entry in catalogue():
        found += [entry.name] if fits(entry.cls) else _with_a_choice(entry, fits)
    return ", ".join(sorted(found))


def _with_a_choice(entry: CatalogueEntry, fits: Callable[[type[Strategy[Any]] | Strategy[Any]], bool]) -> list[str]:
    """The strategy with each option of few values under some of which it fits, and these: `x with form = a or b`."""
    few = {name: get_args(kind) for name, kind in get_type_hints(entry.cls).items() if get_origin(kind) is Literal}
    good = {name: [v for v in values if fits(build_strategy(entry.cls, {name: v}))] for name, values in few.items()}
    return [f"{entry.name} with {name} = {' or '.join(map(str, values))}" for name, values in good.items() if values]
