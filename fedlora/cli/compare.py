"""`fedlora compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.errors import ConfigError

from .options import takes_settings

FORMS = "Print the table as {}, and all else to the error output."


@takes_settings("clients", "rounds", "cohort", "model", "data", "eval_data", "partition", "dp_epsilon", "dp_delta")
def compare(
    given: dict[str, Any],
    file: Annotated[str | None, typer.Argument(help="TOML file of a comparison.")] = None,
    out: Annotated[Path, typer.Option(help="File of results, which is gone on with.")] = Path("comparison.json"),
    strategies: Annotated[str, typer.Option(help="Strategies, with commas between; all: the catalogue.")] = "",
    seeds: Annotated[str, typer.Option(help="How many seeds, or which: 3, or 0,5,7.")] = "",
    grid: Annotated[list[str] | None, typer.Option(help="Values of a setting: lora.rank=4,8; repeatable.")] = None,
    tune: Annotated[list[str] | None, typer.Option(help="Values to choose the best of: train.lr=1e-3,3e-3.")] = None,
    against: Annotated[str, typer.Option(help="The line that others are compared with; default: the first.")] = "",
    lines: Annotated[str, typer.Option(help="Only these lines of the file, with commas between.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process with a model of its own.")] = 1,
    show: Annotated[bool, typer.Option("--show", help="Show the table of what is done, and run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=FORMS.format("JSON"))] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help=FORMS.format("Markdown"))] = False,
    csv: Annotated[bool, typer.Option("--csv", help=FORMS.format("CSV"))] = False,
    latex: Annotated[bool, typer.Option("--latex", help=FORMS.format("LaTeX, with booktabs"))] = False,
) -> None:
    """Compare strategies, seeds and settings on one job: a table with confidence intervals, costs and baselines."""
    form = _form({"json": as_json, "markdown": markdown, "csv": csv, "latex": latex})
    from rich.console import Console

    from fedlora.comparison import settings
    from fedlora.comparison.carry_out import carry_out
    from fedlora.comparison.console import ComparisonProgress, show_table
    from fedlora.comparison.formats import PRINTED
    from fedlora.comparison.results import load
    from fedlora.comparison.schedule import Schedule
    from fedlora.comparison.table import rows

    tree = settings.read(Path(file)) if file else {}
    tree |= settings.from_words(strategies=strategies, seeds=seeds, grid=grid or (), tune=tune or (), against=against)
    made = settings.comparison(tree, given, Path(file or "").parent)
    schedule = Schedule(settings.only(made, lines))
    if show:
        results = load(out)
    else:
        with ComparisonProgress(Console(highlight=False, stderr=bool(form))) as progress:
            results = carry_out(schedule, out, jobs, progress)
    found = rows(schedule, results)
    if form:
        print(PRINTED[form](found))
    else:
        show_table(found)


def _form(asked: dict[str, bool]) -> str:
    """The form in which the table is printed for programs; empty where it is for people."""
    forms = [name for name, is_asked in asked.items() if is_asked]
    if len(forms) > 1:
        raise ConfigError(f"--{forms[0]} and --{forms[1]}: the table is printed in one form; give one of them")
    return "".join(forms)
