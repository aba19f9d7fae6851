"""A file of Python that is named by its path, as a module: how a strategy is used that lies in no package."""

import re
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from .errors import StrategyError

PREFIX = "fedlora_file_"  # of the names of such modules: no other module has them


def path_and_name(spec: str) -> tuple[Path, str] | None:
    """The file and the class that `my_lab/mine.py` or `my_lab/mine.py:Mine` names, the class "" where none is named.

    None for what names no file of Python.

    >>> path_and_name("mine.py:Mine")[1], path_and_name("fedavg")
    ('Mine', None)
    """
    file = re.fullmatch(r"(.+\.py)(?::(\w+))?", spec)
    return (Path(file[1]).expanduser(), file[2] or "") if file else None


def absolute(spec: str) -> str:
    """The same where the file lies, seen from any folder; what names no file as it is."""
    named = path_and_name(spec)
    if not named:
        return spec
    path, name = named
    return ":".join([str(path.absolute()), *filter(None, [name])])


def module_of(path: Path) -> ModuleType:
    """The file as a module, run anew where it has changed; `sys.modules` has it, as dataclasses and checkpoints want.

    Raises `StrategyError` where there is no such file, or where it raises something.
    """
    try:
        module = _module(path.absolute(), path.stat().st_mtime_ns)
    except OSError as e:
        raise StrategyError(
            f"{path}: there is no such file; give a name, package.module:Class or a file of Python"
        ) from e
    sys.modules[module.__name__] = module  # which a file of the same name in another folder may have been since
    return module


@cache
def _module(path: Path, _changed: int) -> ModuleType:
    spec = spec_from_file_location(f"{PREFIX}{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # anybody's code
        raise StrategyError(f"{path} cannot be imported: {type(e).__name__}: {e}; mend that file") from e
    return module


def spec_of(cls: type) -> str:
    """What names a class in another process too: `package.module:Class`, or `file.py:Class` of one from a file."""
    module = cls.__module__
    file = sys.modules[module].__file__ if module.startswith(PREFIX) and module in sys.modules else None
    return f"{file or module}:{cls.__qualname__}"
