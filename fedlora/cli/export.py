"""`fedlora export`."""

from pathlib import Path
from typing import Annotated

import typer

from fedlora.errors import ConfigError

HUB = "The Hugging Face hub"


def export(
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    form: Annotated[str, typer.Option("--as", help="Adapter, merged, per-client or gguf.")] = "adapter",
    max_rank: Annotated[int, typer.Option(min=0, help="Largest rank of the adapter; 0: what it needs.")] = 0,
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Give the adapters of per-client one rank, the largest.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder; default DIR/export-<form>.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="Folder of llama.cpp, whose converter gguf needs.")] = None,
    base_model: Annotated[
        str, typer.Option(help="Hub id of the base, for a run that had it in a folder.", rich_help_panel=HUB)
    ] = "",
    push: Annotated[
        str, typer.Option(help="Upload the export to this repository, ORG/NAME.", rich_help_panel=HUB)
    ] = "",
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Let everybody see a repository that is made; default private.", rich_help_panel=HUB
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what a push would do, and do not ask the hub.", rich_help_panel=HUB)
    ] = False,
) -> None:
    """Write what a run trained as PEFT adapter, merged model, adapter a client or GGUF; verified by its logits."""
    if (public or dry_run) and not push:
        raise ConfigError(
            f"{'--dry-run' if dry_run else '--public'} says how to push, and nothing is; add --push ORG/NAME"
        )
    from fedlora.run import export as exports
    from fedlora.run import hub
    from fedlora.run.console import show_log

    show_log()
    options = exports.ExportOptions(
        uniform_rank=uniform_rank, base_model=base_model, repository=push, llama_cpp=llama_cpp
    )
    place = exports.export(folder, form, max_rank, out, options)
    if push and dry_run:
        print(
            "\n".join(
                ["a dry run, in which nothing was sent; a push would make", *hub.push_lines(place, push, public=public)]
            )
        )
    elif push:
        print(f"pushed: {hub.push(place, push, public=public)}")
