"""What an asynchronous run (server.mode = async) needs of its strategy and settings; refused with the reason otherwise.

Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation (FedBuff, AISTATS 2022),
https://arxiv.org/abs/2106.06639, moves the model by the mean of changes that were made from different versions of it.
So the mean has to be a sum of what clients send, and that has to mean the same in a later version.
"""

from collections.abc import Iterator
from typing import Any

import torch

from fedlora.config import Config
from fedlora.errors import ConfigError, FedloraError, PrivacyError, StrategyError
from fedlora.jobs import Client, shared_start
from fedlora.lora import LoRA
from fedlora.strategy import Strategy, innermost, next_state, title

ROUNDS_LOOKED_AT = 4  # whose jobs have to ask for the same sides
REMEDY = "leave server.mode out"


def check_asynchronous(strategy: Strategy[Any], config: Config) -> None:
    """Raise `ConfigError`, `PrivacyError` or `StrategyError` for a run that cannot be asynchronous, and asks for it."""
    if config.server.mode != "async":
        return
    for error in (*_wrong_settings(config), *_wrong_strategy(innermost(strategy))):
        raise error


def buffer_of(config: Config) -> int:
    """How many updates make a new model: as many as the settings say, or half of the clients that are at work."""
    return config.server.buffer or max(1, config.cohort // 2)


def check_buffer(config: Config) -> None:
    """Raise `ConfigError` where a buffer of these settings, with counts as they are, could never be full."""
    if config.server.mode == "async" and buffer_of(config) > config.clients:
        raise ConfigError(
            f"server.buffer = {config.server.buffer} is more than the {config.clients} clients there are, and each has "
            f"one update in a buffer; choose {config.clients} or fewer"
        )


def refuse_simulated(config: Config) -> None:
    """Raise `ConfigError` for settings by which a deployment cannot run: real clients are as quick as they are."""
    if config.simulation.on:
        raise ConfigError(
            "simulation.* says how quick simulated clients are, and those of a deployment are real; leave it out"
        )
    if config.server.mode == "async" and config.data.holdout:
        raise ConfigError(
            f"server.mode = async and data.holdout = {config.data.holdout:g}: the server would wait for the scores of "
            "clients that are at work; leave data.holdout out, and give --eval-data"
        )


def _wrong_settings(config: Config) -> Iterator[FedloraError]:
    if config.secure.aggregation:
        yield PrivacyError(
            "server.mode = async and secure.aggregation: a masked sum needs to know beforehand whose updates are in "
            "it; leave one of them out"
        )
    if config.dp.by_client:
        yield PrivacyError(
            "server.mode = async and dp.level = client: its noise counts on clients that are drawn anew in every round "
            "and have one update each; leave server.mode out, or take dp.level = record"
        )
    if config.exactness:
        yield ConfigError(
            "server.mode = async and exactness: updates of different versions have no mean of the clients' models; "
            "leave one of them out"
        )
    if config.aggregate.robust != "none":
        yield ConfigError(
            f"server.mode = async and aggregate.robust = {config.aggregate.robust}: it compares the clients of one "
            "round, and those of a buffer began at different versions; leave one of them out"
        )


def _wrong_strategy(strategy: Strategy[Any]) -> Iterator[StrategyError]:
    name = f"server.mode = async and {title(strategy)}"
    if not strategy.sums_only:
        yield StrategyError(f"{name}: its mean is no sum of what the clients send; {REMEDY}, or take fedavg")
    if strategy.exchanges > 1:
        yield StrategyError(f"{name}: it asks the same clients twice in a round; {REMEDY}")
    if not strategy.continues:
        yield StrategyError(
            f"{name}: its factors have another basis in every round, in which an older change means something else; "
            f"{REMEDY}, or take fedavg"
        )
    if len(shared := _sides_by_round(strategy)) > 1:
        yield StrategyError(
            f"{name}: it has {' and '.join(sorted(shared))} sent back in turn, and an older update would come in "
            f"another's turn; {REMEDY}"
        )


def _sides_by_round(strategy: Strategy[Any]) -> set[str]:
    """The sides that jobs of the first rounds ask for; none for a strategy that fails on made-up factors."""
    shared = set[str]()
    try:
        state = strategy.init(LoRA({"m": torch.ones(2, 6)}, {"m": torch.zeros(5, 2)}, {"head": torch.ones(2)}))
        for _ in range(ROUNDS_LOOKED_AT):
            job = strategy.client_init(state, Client(id=0, examples=1, rank=2))
            shared.add(job.shares)
            state = next_state(strategy, state, [shared_start(job)], [1.0], [])
    except Exception:  # whatever a user's strategy raises on factors that are not its run's
        return shared
    return shared
