"""`fedlora reproduce`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import takes_settings

if TYPE_CHECKING:
    from fedlora.reproductions.catalogue import Reproduction


@takes_settings("model", "data", "eval_data")
def reproduce(
    given: dict[str, Any],
    name: Annotated[str | None, typer.Argument(help="An experiment; none: a list of them.")] = None,
    out: Annotated[Path | None, typer.Option(help="File of results, gone on with; default NAME.json.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process with a model of its own.")] = 1,
    show: Annotated[bool, typer.Option("--show", help="Show the verdicts on what is done, and run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
) -> None:
    """Run the experiment of a paper by settings that are kept, and say of each published number whether it agrees."""
    from fedlora.reproductions.catalogue import names, reproduction

    if name is None:
        every = [reproduction(one) for one in names()]
        print(json.dumps([_about(one) for one in every]) if as_json else "\n\n".join(_lines(one) for one in every))
        return
    made = reproduction(name)
    verdicts = _verdicts(made, given, out or Path(f"{name}.json"), jobs=jobs, show=show, as_json=as_json)
    if as_json:
        print(json.dumps({**_about(made), "verdicts": verdicts}))


def _verdicts(
    made: "Reproduction", given: dict[str, Any], out: Path, *, jobs: int, show: bool, as_json: bool
) -> list[dict[str, Any]]:
    """Run what is left, print the table and the verdicts unless they are for a program, and return the verdicts."""
    from rich.console import Console

    from fedlora.comparison.carry_out import carry_out
    from fedlora.comparison.console import ComparisonProgress, show_table
    from fedlora.comparison.results import load
    from fedlora.comparison.schedule import Schedule
    from fedlora.comparison.table import rows
    from fedlora.reproductions.verdicts import MEANING, verdicts

    schedule = Schedule(made.comparison(given))
    if show:
        results = load(out)
    else:
        with ComparisonProgress(Console(highlight=False, stderr=as_json)) as progress:
            results = carry_out(schedule, out, jobs, progress)
    found = rows(schedule, results)
    said = list(verdicts(made, found))
    if not as_json:
        print(_lines(made))
        show_table(found)
        print("\n".join([*(one.words() for one in said), *(f"{key}: {text}" for key, text in MEANING.items())]))
    return [one.record() for one in said]


def _about(made: "Reproduction") -> dict[str, Any]:
    """What an experiment is, as JSON holds it."""
    said = {key: getattr(made, key) for key in ("name", "about", "needs", "takes")}
    return {**said, "differs": list(made.differs), "defects": list(made.defects)}


def _lines(made: "Reproduction") -> str:
    """What an experiment is, in lines."""
    first = [f"{made.name}: {made.about}", f"needs: {made.needs}", f"takes: {made.takes}"]
    differs = [f"not as in the paper: {one}" for one in made.differs]
    return "\n".join([*first, *differs, *(f"known of the published code: {one}" for one in made.defects)])
