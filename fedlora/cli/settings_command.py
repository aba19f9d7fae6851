"""A command to which every setting is an option too: what its help says of them, and what a shell offers on Tab."""

from collections.abc import Iterator
from itertools import groupby

from click import Context, HelpFormatter
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from fedlora.config import Setting, settings

from .completion import choices, setting_words

SHOWN = {"simulate", "server"}  # commands whose help shows the settings that runs are most often given
OFTEN = (
    "exactness",
    "precision",
    "threads",
    "model.task",
    "model.dtype",
    "model.quantize",
    "model.head",
    "model.max_length",
    "lora.kind",
    "lora.rank",
    "lora.alpha",
    "lora.ranks",
    "lora.targets",
    "lora.init",
    "data.holdout",
    "data.limit",
    "data.cache",
    "train.optimizer",
    "train.lr",
    "train.head_lr",
    "train.epochs",
    "train.steps",
    "train.batch_size",
    "train.schedule",
    "train.prox",
    "train.loss",
    "server.mode",
    "server.patience",
    "simulation.speed",
    "eval.generate",
    "eval.metric",
    "aggregate.optimizer",
    "aggregate.robust",
    "personal.steps",
    "personal.alone",
    "secure.aggregation",
    "messages.up",
)


class SettingsCommand(TyperCommand):
    """A command with an option for every setting, by its dotted key.

    click has no other place for its help and its completion than these two methods.
    """

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Print the help, and where it is a run's command, the settings that are most often given."""
        super().format_help(ctx, formatter)
        if self.name in SHOWN:
            console = Console(highlight=False)
            for panel in setting_panels():
                console.print(panel)
            console.print(
                " All settings, with their values and defaults: fedlora settings, or fedlora settings train\n"
            )

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        """What the last word may become: an option of the command, a setting, or the value of the setting before it."""
        found = setting_words(ctx.args, incomplete)
        return [*super().shell_complete(ctx, incomplete), *(CompletionItem(word, help=about) for word, about in found)]


def setting_panels() -> Iterator[Panel]:
    """Yield a panel for each section with its settings that are most often given."""
    known = {setting.key: setting for setting in settings()}
    for section, found in groupby((known[key] for key in OFTEN), key=lambda setting: setting.section):
        table = Table.grid("key", "meaning", padding=(0, 2))
        table.columns[0].no_wrap = True
        for setting in found:
            table.add_row(f"--{setting.key}", Text(_meaning(setting)))
        yield Panel(table, title=f"Often given of {section}", title_align="left", border_style="dim")


def _meaning(setting: Setting) -> str:
    """What a setting means, with its values where these do not stand there."""
    untold = [value for value in choices(setting.kind) if value not in setting.help]
    return f"{setting.help} ({', '.join(choices(setting.kind))})" if untold else setting.help
