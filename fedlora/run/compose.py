"""The strategy that a config names, with all that goes round it, refused where the combination has no meaning."""

from collections.abc import Sequence
from typing import Any

from fedlora.config import Config
from fedlora.errors import PrivacyError, StrategyError
from fedlora.lora import LoRA
from fedlora.strategies.anchored import Anchored
from fedlora.strategies.capped import Capped
from fedlora.strategies.head import Head
from fedlora.strategies.robust import Robust
from fedlora.strategies.server_optimizer import ServerOptimizer
from fedlora.strategy import Strategy, catalogue, load, title

QUANTIZED_CAP = 256  # rank of the offset's side adapter on a quantised base, where nothing can be folded away
KINDS = {
    "dora": "DoRA normalises the columns of W + s B A, so the mean of products and what is added to the base are not "
    "the mean of the models",
    "vera": "VeRA trains two vectors a module beside fixed factors, so there are no products to stack or decompose",
}


def compose(config: Config, start: LoRA, ranks: Sequence[int] = ()) -> Strategy[Any]:
    """The strategy in its wrappers, from the inside out; `start` is the adapter as the model has it.

    Raises `StrategyError` for an adapter kind, mixed ranks or a wrapper that the strategy has no meaning for.
    """
    strategy = load(config.strategy, **config.option)
    accepts(strategy, config.lora.kind, ranks)
    if config.dp.by_client or config.secure.aggregation:
        needs_sums_alone(strategy, config)
    if any(bool(b.any()) for b in start.B.values()) and config.lora.kind != "vera":
        if len(set(ranks)) > 1:
            raise StrategyError(
                f"lora.init = {config.lora.init} starts from a product that is not zero, of which clients of low rank "
                "would lose a piece: with lora.ranks take kaiming, gaussian, orthonormal or eva"
            )
        strategy = Anchored(strategy)
    cap = config.aggregate.offset_rank or (QUANTIZED_CAP if config.model.quantize != "none" else 0)
    if cap and config.lora.kind == "lora":
        strategy = Capped(strategy, cap)
    if start.H and config.model.head != "shared":
        strategy = Head(strategy, config.model.head)
    chosen = config.aggregate
    if chosen.optimizer != "none":
        strategy = ServerOptimizer(strategy, chosen.optimizer, chosen.lr, chosen.beta1, chosen.beta2, chosen.tau)
    if chosen.robust != "none":
        strategy = Robust(strategy, chosen.robust, chosen.trim, chosen.byzantine, chosen.bound)
    return strategy


def needs_sums_alone(strategy: Strategy[Any], config: Config) -> None:
    """Raise `PrivacyError` for a strategy that needs single updates, where the run lets the server have sums alone."""
    others = ", ".join(sorted(e.name for e in catalogue() if e.cls.sums_only))
    asked = "dp.level = client hides each in a noised sum" if config.dp.by_client else "secure.aggregation hides each"
    remedy = "dp.level = record, sound for every strategy" if config.dp.by_client else "secure.aggregation = false"
    if not strategy.sums_only:
        needs = "every client's own update or product"
        needs = "to know which client sent which update" if strategy.needs_senders else needs
        raise PrivacyError(f"{title(strategy)} needs {needs}, and {asked}; take {remedy}, or one of {others}")
    if config.aggregate.robust != "none":
        raise PrivacyError(
            f"aggregate.robust = {config.aggregate.robust} compares the clients' updates, and {asked}; leave it out"
        )


def accepts(strategy: Strategy[Any], kind: str, ranks: Sequence[int] = ()) -> None:
    """Raise `StrategyError` where the strategy has no meaning for this kind of adapter, or for ranks that differ."""
    if kind not in strategy.kinds:
        others = ", ".join(sorted(e.name for e in catalogue() if kind in e.cls.kinds))
        raise StrategyError(f"{title(strategy)} cannot train lora.kind = {kind}: {KINDS[kind]}; it works with {others}")
    if len(set(ranks)) > 1 and not strategy.mixed_ranks:
        others = ", ".join(sorted(e.name for e in catalogue() if e.cls.mixed_ranks is True))
        raise StrategyError(
            f"{title(strategy)} needs clients of one rank, and lora.ranks gives {min(ranks)} to {max(ranks)}; "
            f"mixed ranks work with {others}"
        )
