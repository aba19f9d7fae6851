"""The checks, and a strategy put through them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import getdoc
from typing import Any, Literal

from fedlora.strategy import Strategy

from . import declarations, on_random_factors, on_small_models
from .verdict import Skip

Check = Callable[[Strategy[Any]], Skip | None]
CHECKS: tuple[Check, ...] = tuple(
    f
    for module in (declarations, on_random_factors, on_small_models)
    for name, f in vars(module).items()
    if name.startswith("check_")
)


@dataclass(frozen=True)
class Result:
    """What one check said of one strategy."""

    check: str  # the function's name
    outcome: Literal["passed", "failed", "skipped"]
    detail: str  # why it failed or was skipped
    seconds: float


def run(strategy: Strategy[Any]) -> list[Result]:
    """Put a strategy through every check."""
    return [verify(check, strategy) for check in CHECKS]


def verify(check: Check, strategy: Strategy[Any]) -> Result:
    """Put a strategy through one check; whatever it raises is a failure of the strategy, and told."""
    began, detail = time.monotonic(), ""
    outcome: Literal["passed", "failed", "skipped"] = "passed"
    try:
        skip = check(strategy)
    except AssertionError as e:
        outcome, detail = "failed", str(e)
    except Exception as e:  # a strategy is anybody's code
        outcome, detail = "failed", f"{strategy}: {type(e).__name__}: {e}"
    else:
        if skip is not None:
            outcome, detail = "skipped", skip.reason
    return Result(check.__name__, outcome, detail, time.monotonic() - began)


def words(check: Check) -> str:
    """What a check verifies, in a sentence."""
    return (getdoc(check) or check.__name__).split("\n", 1)[0]


def label(check: Check) -> str:
    """What a check verifies, in a few words."""
    return check.__name__.removeprefix("check_").replace("_", " ")
