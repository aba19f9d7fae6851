"""What a shell offers on Tab: the names of strategies, the keys of settings, and the values that a setting takes.

Light: a shell waits for it, and must not wait for torch.
"""

from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, Literal, get_args, get_origin

from fedlora.config import Setting, setting_key, settings

STRATEGIES = "fedlora.strategies"  # the package of the built-in ones, and the entry-point group of others
WRAPPERS = {"anchored", "capped", "head", "robust", "server_optimizer"}  # files there that no command is to name
BEGINNINGS = {"data.partition": ("iid", "dirichlet:", "labels:", "natural:", "size:", "files")}


def strategy_names() -> list[str]:
    """The names of all strategies, found without importing one."""
    package = find_spec(STRATEGIES)
    places = package.submodule_search_locations if package else None
    built_in = {module.name for module in iter_modules(places)} - WRAPPERS
    return sorted(built_in | {point.name for point in entry_points(group=STRATEGIES)})


def sections() -> list[str]:
    """The sections that settings stand in, in their order."""
    return list(dict.fromkeys(setting.section for setting in settings()))


def values_of(setting: Setting) -> Iterable[str]:
    """The words that a setting takes, as far as there are few."""
    if setting.key == "strategy":
        return strategy_names()
    if setting.kind is bool:
        return "true", "false"
    return BEGINNINGS.get(setting.key, ()) or choices(setting.kind)


def choices(kind: Any) -> tuple[str, ...]:
    """The values of a `Literal`, and of any other type none."""
    return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def setting_words(given: list[str], incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield what the last word on a command line may become, with its meaning: a setting, or the value of one.

    `given` are the words before it that no option of the command takes.
    """
    known = {f"--{setting.key}": setting for setting in settings() if setting.key != "option"}
    before = known.get(f"--{setting_key(given[-1].removeprefix('--'))}") if given else None
    if incomplete.startswith("-"):
        yield from ((word, setting.help) for word, setting in known.items() if word.startswith(incomplete))
    elif before:
        yield from ((word, "") for word in values_of(before) if word.startswith(incomplete))
