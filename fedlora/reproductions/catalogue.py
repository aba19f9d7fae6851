"""The experiments that there are: a TOML file each in this folder, which is a comparison with what was published.

Beside the keys of a comparison (`fedlora/comparison/settings.py`) a file has

    about = "..."            # what it is, and of which paper, with its address
    needs = "..."            # model, data and machine
    takes = "..."            # how long
    differs = ["..."]        # what is not as in the paper; if there is anything, no cell is held to its number
    defects = ["..."]        # known faults of the published code that may explain a difference, with their places
    [[published]]            # a number of the paper
    line = "fedavg"
    case = "no privacy"
    value = 0.8589
    tolerance = 0.01         # within which another run of the same experiment is taken to agree
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.comparison import settings
from fedlora.comparison.settings import Comparison
from fedlora.errors import ConfigError, nearest

FOLDER = Path(__file__).parent
OWN = ("about", "needs", "takes", "differs", "defects", "published")


@dataclass(frozen=True)
class PublishedCell:
    """A number in a table of a paper."""

    line: str
    case: str
    value: float
    tolerance: float
    figure: str = "test accuracy"  # as a row of a comparison names it


@dataclass(frozen=True)
class Reproduction:
    """An experiment of a paper, with settings of ours and numbers of theirs."""

    name: str
    about: str
    needs: str
    takes: str
    differs: tuple[str, ...]
    defects: tuple[str, ...]
    published: tuple[PublishedCell, ...]
    tree: Mapping[str, Any]  # the comparison, as its file says it

    def comparison(self, given: Mapping[str, Any]) -> Comparison:
        """The comparison to be run, with the settings that say where model and data are."""
        return settings.comparison(self.tree, given, FOLDER)


def names() -> list[str]:
    """The names of all experiments."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def reproduction(name: str) -> Reproduction:
    """The experiment of this name. Raises `ConfigError` where there is none."""
    if name not in names():
        raise ConfigError(f'there is no experiment "{name}"; {nearest(name, names())}')
    tree = settings.read(FOLDER / f"{name}.toml")
    return Reproduction(
        name=name,
        about=tree["about"],
        needs=tree["needs"],
        takes=tree["takes"],
        differs=tuple(tree.get("differs", ())),
        defects=tuple(tree.get("defects", ())),
        published=tuple(PublishedCell(**cell) for cell in tree["published"]),
        tree={key: value for key, value in tree.items() if key not in OWN},
    )
