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
Outcome = Literal["passed", "failed", "skipped"]
CHECKS: tuple[Check, ...] = tuple(
    f
    for module in (declarations, on_random_factors, on_small_models)
    for name, f in vars(module).items()
    if name.startswith("check_")
)


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check of one strategy."""

    check: str  # the function's name
    outcome: Outcome
    detail: str  # why it failed or was skipped
    seconds: float


def run(strategy: Strategy[Any]) -> list[CheckResult]:
    """Put a strategy through every check."""
    return [verify(check, strategy) for check in CHECKS]


def verify(check: Check, strategy: Strategy[Any]) -> CheckResult:
    """Put a strategy through one check; an error that the strategy raises is a failure, and the error its detail."""
    began = time.monotonic()
    outcome, detail = _outcome(check, strategy)
    return CheckResult(check.__name__, outcome, detail, time.monotonic() - began)


def _outcome(check: Check, strategy: Strategy[Any]) -> tuple[Outcome, str]:
    try:
        skip = check(strategy)
    except AssertionError as e:
        return "failed", str(e)
    except Exception as e:  # a strategy is anybody's code
        return "failed", f"{strategy}: {type(e).__name__}: {e}"
    return ("skipped", skip.reason) if skip else ("passed", "")


def words(check: Check) -> str:
    """The sentence that says what a check verifies: the first line of its docstring."""
    return (getdoc(check) or check.__name__).split("\n", 1)[0]


def label(check: Check) -> str:
    """The few words that say what a check verifies: its name."""
    return check.__name__.removeprefix("check_").replace("_", " ")
