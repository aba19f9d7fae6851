"""`fedlora export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    form: Annotated[str, typer.Option("--as", help="Adapter, merged or per-client.")] = "adapter",
    max_rank: Annotated[int, typer.Option(min=0, help="Largest rank of the adapter; 0: what it needs.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; default DIR/export-<form>.")] = None,
) -> None:
    """Write what a run trained as a PEFT adapter, a merged model or an adapter a client; verified by its logits."""
    from fedlora.run.console import show_log
    from fedlora.run.export import export

    show_log()
    export(folder, form, max_rank, out)
