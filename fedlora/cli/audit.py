"""`fedlora audit`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.errors import ConfigError

from .options import takes_settings


@takes_settings(
    "strategy",
    "option",
    "model",
    "dp_epsilon",
    "dp_delta",
    "dp_clip",
    "dp_noise",
    "dp_level",
    "seed",
    dp_epsilon="the budget that is promised",
    seed="seed of the made-up records and canaries; never of the noise",
)
def audit(
    given: dict[str, Any],
    run: Annotated[
        str | None, typer.Argument(help="A run directory, whose settings are audited; none: small ones.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="So many audits, to count false alarms.")] = 1,
    controls: Annotated[bool, typer.Option("--controls", help="Plant known bugs and see each caught.")] = False,
    membership: Annotated[
        bool, typer.Option("--membership", help="Attack RUN's adapter; what is told has no noise.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Put a promise of privacy to the test: sensitivity, noise, draws, ledger, canaries."""
    from fedlora.run.console import show_log

    show_log()
    folder = Path(run) if run else None
    if membership:
        if folder is None:
            raise ConfigError("--membership attacks what a run delivered; name its directory: fedlora audit RUN")
        from fedlora.audit.membership_inference import attack

        attack(folder, given, as_json=json)
        return
    from fedlora.audit.report import audit

    if not audit(folder, given, repeat=repeat, controls=controls, as_json=json):
        raise typer.Exit(1)
