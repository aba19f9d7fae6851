"""The page: the report of one or several runs, rendered as one file that needs no other."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fedlora.run.directory import RunDirectory
from fedlora.storage.files import write_durably

from .course import learning_charts
from .figures import NOTHING
from .run_record import RunRecord, read
from .run_section import overview, section

NAME = "report.html"  # of several runs, in the folder where the command is given
log = logging.getLogger("fedlora")


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of the runs in these folders, and return where it lies: of one run by default in its folder.

    Raises `ConfigError` where a folder holds no run, and `CheckpointError` where the file cannot be written.
    """
    page = render([read(folder) for folder in folders])
    path = out or (RunDirectory(folders[0]).report if len(folders) == 1 else Path(NAME))
    write_durably(path, page.encode(errors="replace"))
    return path


def keep_report(folder: Path) -> None:
    """Write the report of a run into its folder; no run fails by it, whatever is wrong."""
    try:
        write_report([folder])
    except Exception as e:  # all work is done and kept by then
        log.warning("no report was made: %s: %s; try again with: fedlora report %s", type(e).__name__, e, folder)


def render(runs: Sequence[RunRecord]) -> str:
    """The page of these runs."""
    names = _names(runs)
    return _template().render(
        sections=[section(run) for run in runs],
        names=names,
        rows=_told(list(map(overview, runs))) if len(runs) > 1 else [],
        overlaid=learning_charts(dict(zip(names, runs, strict=True))) if len(runs) > 1 else [],
        version=version("fedlora"),
    )


@cache
def _template() -> Template:
    """The page's template; to compile it takes longer than to fill it."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template("report.html.jinja")


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its folder's, with a number where several are alike."""
    folders = [run.folder for run in runs]
    return [f"{name} ({n})" if folders.count(name) > 1 else name for n, name in enumerate(folders, start=1)]


def _told(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The rows without the columns that are empty in all of them."""
    return [{k: v for k, v in row.items() if any(other[k] != NOTHING for other in rows)} for row in rows]
