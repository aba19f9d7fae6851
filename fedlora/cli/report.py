"""`fedlora report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[list[Path], typer.Argument(help="Run directories; of several, a comparison comes first.")],
    out: Annotated[Path | None, typer.Option(help="File; default DIR/report.html, of several ./report.html.")] = None,
) -> None:
    """Write what runs came to as one HTML page that opens without a network: who gained, the course, cost, privacy."""
    from fedlora.report.page import write_report
    from fedlora.run.console import show_log

    show_log()
    print(f"report: {write_report(folders, out)}")
