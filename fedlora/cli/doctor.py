"""`fedlora doctor`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import takes_settings


@takes_settings("data", "model", data="file or folder of this site's own data", model="folder of the base model here")
def doctor(
    given: dict[str, Any],
    credentials: Annotated[Path | None, typer.Option(help="This client's folder of fedlora provision.")] = None,
    server: Annotated[str, typer.Option(help="HOST or HOST:PORT; default: as its keys have it.")] = "",
    state: Annotated[Path | None, typer.Option(help="Folder in which this client keeps what is its own.")] = None,
    id: Annotated[int, typer.Option(min=0, help="This client's number, without keys.")] = 0,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of its own.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="TOML file with the run's settings; default: those that were agreed to last.")
    ] = None,
    fingerprint: Annotated[str, typer.Option(help="Fingerprint of the base model that the parties agreed on.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of lines.")] = False,
) -> None:
    """Check a site before a run, from its Python to one training step: a line each, with the remedy."""
    from fedlora.config import read

    from .client import own_settings

    mine, settings = own_settings(config, given), read(run) if run else None
    from fedlora.doctor.examination import Examination, examine
    from fedlora.run.setup import mute_transformers

    mute_transformers()
    asked = Examination(
        mine=mine, credentials=credentials, server=server, state=state, id=id, run=settings, fingerprint=fingerprint
    )
    findings = []
    for finding in examine(asked):
        findings.append(finding)
        if not as_json:
            print(finding.line(), flush=True)
    if as_json:
        import json

        print(json.dumps([vars(finding) for finding in findings]))
    if any(finding.verdict == "wrong" for finding in findings):
        raise typer.Exit(1)
