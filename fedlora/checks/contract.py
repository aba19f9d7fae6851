"""The checks, and a strategy put through them."""

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import getdoc
from typing import Any, Literal

from fedlora.strategy import Strategy, innermost

from . import declarations, on_random_factors, on_small_models, structure
from .on_random_factors import (
    check_equal_updates_do_what_one_does,
    check_order_of_clients_changes_nothing,
    check_scale_of_weights_changes_nothing,
    check_twice_the_weight_counts_as_two_clients,
)
from .verdict import ContractBroken, Skip

Check = Callable[[Strategy[Any]], Skip | None]
Outcome = Literal["passed", "failed", "skipped"]
CHECKS: tuple[Check, ...] = tuple(
    f
    for module in (structure, declarations, on_random_factors, on_small_models)
    for name, f in vars(module).items()
    if name.startswith("check_")
)
CAUSES_FIRST = (  # of checks that fail together, those of which others are likely to come
    check_scale_of_weights_changes_nothing,
    check_twice_the_weight_counts_as_two_clients,
    check_order_of_clients_changes_nothing,
    check_equal_updates_do_what_one_does,
)


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check of one strategy."""

    check: str  # the function's name
    outcome: Outcome
    detail: str  # why it failed or was skipped
    seconds: float
    remedy: str = ""  # of a failure: what is most likely to be done


def run(strategy: Strategy[Any], before: Callable[[Check], None] = lambda check: None) -> list[CheckResult]:
    """Put a strategy through every check; after one of `structure` that fails none is run, as it would fail for that.

    `before` is called with each check before it is run.
    """
    results: list[CheckResult] = []
    for check in CHECKS:
        before(check)
        results.append(verify(check, strategy))
        if results[-1].outcome == "failed" and check.__module__ == structure.__name__:
            break
    return results


def most_likely(results: Sequence[CheckResult]) -> str:
    """What is most likely to be done about these failures: the remedy of the one of which the others come."""
    order = {check.__name__: place for place, check in enumerate((*CAUSES_FIRST, *CHECKS)[::-1])}
    failed = [result for result in results if result.outcome == "failed" and result.remedy]
    return max(failed, key=lambda result: order[result.check]).remedy if failed else ""


def verify(check: Check, strategy: Strategy[Any]) -> CheckResult:
    """Put a strategy through one check; an error that the strategy raises is a failure, and the error its detail."""
    began = time.monotonic()
    outcome, detail, remedy = _outcome(check, strategy)
    return CheckResult(check.__name__, outcome, detail, time.monotonic() - began, remedy)


def _outcome(check: Check, strategy: Strategy[Any]) -> tuple[Outcome, str, str]:
    try:
        skip = check(strategy)
    except ContractBroken as e:
        return "failed", str(e), e.remedy
    except Exception as e:  # a strategy is anybody's code
        error = f"{type(e).__name__}: {e}"
        where = _line_in(strategy, e)
        return (
            "failed",
            f"{strategy}: {error}{where and f', raised {where}'}",
            where and f"mend {error}, raised {where}",
        )
    return ("skipped", skip.reason, "") if skip else ("passed", "", "")


def _line_in(strategy: Strategy[Any], error: Exception) -> str:
    """The last line of the strategy's own file on the way to an error: `in aggregate, line 7 of mine.py`; or none."""
    file = getattr(sys.modules.get(type(innermost(strategy)).__module__), "__file__", None)
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"in {lines[-1].name}, line {lines[-1].lineno} of {lines[-1].filename}" if lines else ""


def words(check: Check) -> str:
    """The sentence that says what a check verifies: the first line of its docstring."""
    return (getdoc(check) or check.__name__).split("\n", 1)[0]


def label(check: Check) -> str:
    """The few words that say what a check verifies: its name."""
    return check.__name__.removeprefix("check_").replace("_", " ")
