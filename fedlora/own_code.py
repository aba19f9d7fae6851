"""Code of a user's own that a setting names by a dotted path: `train.loss = my_package.module:function`.

Only the text travels and is kept; whoever runs the code imports it, a deployed client only where its own policy names
it.
"""

import re
import sys
from importlib import import_module
from pathlib import PurePath
from typing import Any

from .errors import ConfigError

LONGEST = 200  # characters of a path
FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def is_path(text: str) -> bool:
    """Is this text the path of code, package.module:name?"""
    return len(text) <= LONGEST and FORM.fullmatch(text) is not None


def check_path(setting: str, text: str, *, or_one_of: tuple[str, ...] = ("",)) -> None:
    """Raise `ConfigError` where the value of a setting is neither the path of code nor one of these words."""
    if text not in or_one_of and not is_path(text):
        words = ", ".join(filter(None, or_one_of))
        others = f"{words}, or " if words else ""
        raise ConfigError(
            f'{setting} = "{text[:60]}": it is {others}code of your own, as package.module:name{_of_a_file(text)}'
        )


def _of_a_file(text: str) -> str:
    """The remedy for who names a file, as `--strategy` takes one; empty for other texts."""
    file, _, name = text.partition(":")
    if not file.endswith(".py"):
        return ""
    return f"; write {PurePath(file).stem}:{name or 'name'}, and run from the folder that {PurePath(file).name} lies in"


def find_own(setting: str, path: str) -> Any:
    """What a setting names by its path. Raises `ConfigError` where it cannot be imported, or is not called."""
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as e:  # whatever a user's module raises
        raise ConfigError(
            f'{setting} = "{path}" could not be imported: {e}; write it package.module:function, and run from the '
            "folder it lies in, or add that to PYTHONPATH"
        ) from e
    if not callable(found):
        raise ConfigError(f'{setting} = "{path}" is {type(found).__name__}, and no function')
    return found


def path_of(setting: str, code: Any) -> str:
    """The path by which code is found again: that of a function or class, or the name to which an object is bound.

    Raises `ConfigError` for what does not stand at the top of a module or notebook.
    """
    is_defined = hasattr(code, "__qualname__")
    home = code.__module__ if is_defined else type(code).__module__
    top = vars(sys.modules[home]) if home in sys.modules else {}
    names = [code.__qualname__] if is_defined else [name for name, value in top.items() if value is code]
    found = next((name for name in names if top.get(name) is code), None)
    if found is None:
        shown = getattr(code, "__qualname__", type(code).__name__)
        raise ConfigError(
            f"{setting}: {shown} is not to be found at the top of {home}, where a run that is resumed looks for it; "
            "define it there, and an object beside its class"
        )
    return f"{home}:{found}"
