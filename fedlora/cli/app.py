"""The command line: every command, and how a command ends. Light, so that `fedlora --help` does not wait for torch."""

import os
import signal
import stat
import sys
from pathlib import Path

import typer

from fedlora.environment import configure_libraries
from fedlora.errors import FedloraError

from .audit import audit
from .check import check
from .client import client, worker
from .evaluate import evaluate
from .export import export
from .listings import settings, strategies
from .options import DOTTED
from .provision import provision
from .server import server
from .simulate import simulate

configure_libraries()

app = typer.Typer(
    help="Federated LoRA fine-tuning: strategies that are exact where they say so, runs that resume.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command(context_settings=DOTTED)(simulate)
app.command()(strategies)
app.command()(settings)
app.command(context_settings=DOTTED)(evaluate)
app.command()(check)
app.command(context_settings=DOTTED)(audit)
app.command()(export)
app.command()(provision)
app.command(context_settings=DOTTED)(server)
app.command(context_settings=DOTTED)(client)
app.command(context_settings=DOTTED)(worker)


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
