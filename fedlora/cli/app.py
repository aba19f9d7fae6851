"""The command line: every command, and how a command ends. Light, so that `fedlora --help` does not wait for torch."""

import os
import signal
import stat
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedlora import __version__
from fedlora.environment import configure_libraries
from fedlora.errors import FedloraError

from .audit import audit
from .check import check
from .client import client, worker
from .compare import compare
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .listings import settings, strategies
from .options import DOTTED
from .plan import plan
from .provision import provision
from .report import report
from .reproduce import reproduce
from .server import server
from .settings_command import SettingsCommand
from .simulate import simulate

configure_libraries()


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"fedlora {__version__}")
        raise typer.Exit


app = typer.Typer(
    help="Federated LoRA fine-tuning: strategies that are exact where they say so, runs that resume.",
    epilog=(
        "Ends with 0; with 1 after a mistake, which is said in one sentence, or where a check or an audit found "
        "something; with 2 for words that a command does not know; with 130 where it was interrupted."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: word.replace("_", "-"),
    },
)
takes_every_setting = partial(app.command, cls=SettingsCommand, context_settings=DOTTED)
takes_every_setting()(simulate)
takes_every_setting()(compare)
takes_every_setting()(plan)
takes_every_setting()(doctor)
app.command()(strategies)
app.command()(settings)
takes_every_setting()(evaluate)
app.command()(check)
takes_every_setting()(audit)
app.command()(export)
takes_every_setting()(reproduce)
app.command()(report)
app.command()(provision)
takes_every_setting()(server)
takes_every_setting()(client)
takes_every_setting()(worker)


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Say the version, and end.")
    ] = False,
) -> None:
    """Federated LoRA fine-tuning: strategies that are exact where they say so, runs that resume."""


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 1, never a traceback.

    Whatever a command and its processes write, their user alone can read.
    """
    os.umask(0o077)
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup, which has it ignored
        signal.signal(signal.SIGHUP, _hang_up)
    sys.path.append(str(Path.cwd()))  # where a user's own strategy lies; last, so that it hides no library
    try:
        app()
    except FedloraError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def _hang_up(*_: object) -> None:
    """End as after SIGTERM; what is said to a terminal that is gone must not fail on the way out."""
    for descriptor in (1, 2):
        was_terminal = stat.S_ISCHR(os.fstat(descriptor).st_mode)
        if was_terminal and not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    raise KeyboardInterrupt
