"""What a person sees of a run: its heading, a line for each round, then how good it is and where everything lies."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status

from fedlora.config import Config
from fedlora.errors import Failure
from fedlora.jobs import Client
from fedlora.log_lines import counted
from fedlora.metrics import headline
from fedlora.storage.event_log import utc_timestamp
from fedlora.strategy import Strategy, title

from .directory import RunDirectory, newest
from .sides import kept_by_clients

if TYPE_CHECKING:  # which load transformers and PEFT: a run's first line does not wait for them
    from .preview import Preview
    from .setup import RunSetup

WIDTHS = {  # of a column, at least, without the two spaces before it
    "round": 5,
    "clients": 7,
    "train loss": 10,
    "evaluation": 16,
    "clients' mean": 16,
    "exact match": 11,
    "worst client": 12,
    "off the mean": 12,
    "epsilon": 12,
    "up": 7,
    "down": 7,
    "clock": 8,
    "seconds": 7,
    "left": 6,
}
WITHOUT_ANSWERS = ("loss", "perplexity", "token_accuracy")  # figures of a language model that need no generation
FIRST = 30.0  # seconds after which a line without a terminal says which clients the round waits for
EXACT = 1e-4  # relative: well above what float32 leaves after many rounds, well below what a strategy drops


class ConsoleProgress:
    """A `RunObserver` that prints a line for each round, and on a terminal a moving one for the round under way."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._rounds = 0  # in the whole run
        self._cohort = 0  # clients asked in a round
        self._number = 0  # of the last finished round
        self._answers = set[int]()  # clients that have answered in the round under way
        self._before: Mapping[str, float] = {}
        self._seconds: list[float] = []
        self._status: Status | None = None
        self._columns: list[str] = []
        self._measures = False  # is exactness measured?
        self._private = False
        self._patience = 0  # evaluations without a lower loss that end the run
        self._kept = list[str]()  # what clients train and keep, so that the server's model is nobody's
        self._told = FIRST  # seconds after which the next line says which clients are waited for
        self.names: Mapping[int, str] = {}  # of clients elsewhere

    def previewed(self, preview: "Preview") -> None:
        """Print what the run is about to do, and what looks wrong in it."""
        for line in preview.lines():
            self.say(line)

    def started(
        self,
        setup: "RunSetup",
        strategy: Strategy[Any],
        before: Mapping[str, float],
        done: int,
        statement: Sequence[str],
    ) -> None:
        """Print the heading, what the run promises, the evaluation before it, and the names of the columns."""
        config = setup.config
        self._rounds = config.rounds
        self._cohort = config.cohort
        self._number = done
        self._before = before
        self._measures = config.exactness
        self._private = config.dp.on
        self._patience = config.server.patience
        for line in (_heading(setup, title(strategy)), *statement):
            self.say(line)
        self._kept = kept_by_clients(strategy, setup.start, config.rounds)
        if self._kept:
            self.say(_no_common_model(self._kept, config.data.holdout > 0))
        if before:
            self.say(f"before training: {figures(before)}")
        if done:
            self.say(_resumed(done, config.rounds))
        left_out = _columns_left_out(config, bool(self._kept))
        self._columns = [name for name in WIDTHS if name not in left_out]
        self._say_row({name: name for name in self._columns})
        if _can_move(self._console):
            self._status = Status("", console=self._console)
            self._status.start()
            self._wait()

    def answered(self, client: int) -> None:
        """Count the answer in the moving line."""
        self._answers.add(client)
        self._wait()

    def waiting(self, clients: Mapping[int, float]) -> None:
        """Show which clients the round waits for, and how long; without a terminal after `FIRST` s, then ever rarer."""
        longest = max(clients.values(), default=0.0)
        if not clients or longest < FIRST:
            self._told = FIRST
        if self._status:
            self._wait(clients, longest)
        elif clients and longest >= self._told:
            self._told = 2 * longest
            self.say(f"waiting for {self._who(clients)}, for {longest:.0f} s now")

    def joined(self, client: Client) -> None:
        """Say that a client is there."""
        self.say(f"{self._who([client.id])} is here, with {client.examples:,} examples")

    def begins_without(self, missing: Sequence[int]) -> None:
        """Say who is not there as the run begins; they may join later."""
        if missing:
            self.say(f"going on without {self._who(missing)}, who may join later")

    def round(self, record: Mapping[str, Any], failed: Mapping[int, Failure]) -> None:
        """Print the round's line."""
        self._number = record["round"]
        self._answers.clear()
        self._seconds.append(record["seconds"])
        left = median(self._seconds[-5:]) * (self._rounds - self._number)
        cells = _cells(record) | {"round": f"{self._number}/{self._rounds}", "left": f"{left:.0f} s"}
        self._say_row(cells)
        self._wait()

    def finished(self, folder: RunDirectory, stopped: bool) -> None:
        """Print how good the run's model is, what was promised, and where everything lies."""
        self.close()
        records = folder.records()
        if stopped and records:
            why = f": no lower loss in {counted(self._patience, 'evaluation')}" if self._patience else ""
            self.say(f"stopped early after round {records[-1]['round']} of {self._rounds}{why}")
        self._say_how_good(records)
        for line in stage_lines(folder.stages()):
            self.say(line)
        self._say_what_was_promised(records)
        if (folder.path / "privacy.md").exists():
            self.say(f"privacy report: {folder.path}/privacy.md")
        verdict = folder.adapter_verdict()
        self.say(f"adapter: {folder.adapter}" + (f"; {verdict}" if verdict else ""))
        self.say(f'load it: peft.PeftModel.from_pretrained(base_model, "{folder.adapter}")')
        self.say(f"curves: tensorboard --logdir {folder.path}")
        if folder.report.exists():
            self.say(f"report: {folder.report}")

    def _say_row(self, cells: Mapping[str, str]) -> None:
        """Print a row of the table: two spaces between columns, also where a cell is wider than its column."""
        self.say("  ".join(cells[name].rjust(WIDTHS[name]) for name in self._columns))

    def _say_what_was_promised(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Show whether the strategy was exact, where that was measured, and what a private run has spent."""
        if self._measures:
            self.say(closeness([record["exactness"] for record in records if "exactness" in record]))
        if self._private:
            self.say(spending(records))

    def _say_how_good(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Show the last evaluation of the global model, and the last one of the clients on their own examples."""
        after, clients = newest(records, "eval").get("eval"), newest(records, "eval_clients").get("eval_clients")
        if self._kept:
            self.say(f"{counted(len(records), 'round')} in {seconds_of(records):.0f} s")
        elif after:
            name, _ = headline(after)
            was = f"{self._before[name]:.4g} before, " if name in self._before else ""
            self.say(f"{name}: {was}{after[name]:.4g} after, in {seconds_of(records):.0f} s")
        if line := answers_line(records, self._before):
            self.say(line)
        if clients:
            self.say(
                f"per client on its own held-out examples: {clients['metric']} mean {clients['mean']:.4g}, "
                f"worst {clients['worst']:.4g} (client {clients['worst_client']}), std {clients['std']:.3g}"
            )

    def close(self) -> None:
        """Remove the moving line."""
        if self._status:
            self._status.stop()
            self._status = None

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self._console.print(line, markup=False)

    def handler(self) -> logging.Handler:
        """A logging handler that prints warnings among the lines."""
        shown = ConsoleHandler(self)
        shown.setLevel(logging.WARNING)
        return shown

    def named(self, text: str) -> str:
        """The text with each client's name in place of its number, where it has a name."""
        return re.sub(r"\bclient (\d+)\b", lambda found: self.names.get(int(found[1]), found[0]), text)

    def _who(self, clients: Iterable[int]) -> str:
        names = [self.names.get(i, f"client {i}") for i in clients]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    def _wait(self, clients: Iterable[int] = (), seconds: float = 0.0) -> None:
        """Bring the moving line up to date."""
        if self._status is None:
            return
        if self._number == self._rounds:
            self._status.update("writing the adapter")
            return
        who = f"; waiting for {self._who(clients)}, {seconds:.0f} s" if clients else ""
        answered = f"{len(self._answers)} of {self._cohort} clients answered"
        self._status.update(f"round {self._number + 1}: {answered}{who}")


class ConsoleHandler(logging.Handler):
    """A logging handler that prints records as lines on a screen."""

    def __init__(self, screen: ConsoleProgress) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.say(self._screen.named(record.getMessage()))


class _UTC(logging.Formatter):
    """Formats a record with its time as the event log writes times."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        return utc_timestamp(record.created)


def _can_move(console: Console) -> bool:
    """Whether a line can change in place: on a terminal, and in a notebook that has widgets.

    rich takes FORCE_COLOR for a terminal too; a container's log would then fill with movements of the cursor.
    """
    on_terminal = console.is_terminal and console.file.isatty()
    return on_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def _resumed(done: int, rounds: int) -> str:
    """Where a resumed run goes on."""
    if done < rounds:
        return f"resumed after round {done} of {rounds}"
    return f"round {done} is done, and {rounds} are asked for: none is left"


def _heading(setup: "RunSetup", name: str) -> str:
    """The first line of a run: its strategy, its size and how it is computed."""
    config, start = setup.config, setup.start
    trained = sum(t.numel() for side in (start.A, start.B, start.H) for t in side.values())
    return (
        f"{name}, {counted(config.clients, 'client')}, {config.cohort} a round, {counted(config.rounds, 'round')}; "
        f"adapter of {trained:,} numbers on a model of {setup.model.size:,}; "
        f"engine {config.engine}, seed {config.seed}"
    )


def _no_common_model(kept: Sequence[str], holdout: bool) -> str:
    """The sentence about a strategy whose clients keep what they train."""
    shown = "scores are each client's own" if holdout else "set data.holdout to see how good each client's own is"
    return f"clients keep {' and '.join(kept)} to themselves, so there is no common model; {shown}"


def _columns_left_out(config: Config, no_common_model: bool) -> set[str]:
    """The columns that a run with these settings has nothing to show in."""
    shown = {
        "evaluation": not no_common_model,
        "clients' mean": no_common_model and config.data.holdout > 0,
        "exact match": config.eval.generate,
        "worst client": config.data.holdout > 0,
        "off the mean": config.exactness,
        "epsilon": config.dp.on,
        "train loss": not config.dp.on or config.dp.metrics,
        "clock": config.simulation.on or config.server.mode == "async",
    }
    return {name for name, is_shown in shown.items() if not is_shown}


def _without_loss(record: Mapping[str, Any]) -> str:
    """What stands for a loss that is not there; in a private round clients may have drawn too few records for one."""
    return "-" if "epsilon" in record else "skipped"


def _cells(record: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the columns of a round's line, by its record alone."""
    loss, clients = record["train_loss"], record["eval_clients"]
    return {
        "clients": f"{record['answered']}/{record['clients']}",
        "train loss": _without_loss(record) if loss is None else f"{loss:.4f}",
        "evaluation": metric(record["eval"]),
        "exact match": _share(record["eval"] or {}, "exact_match"),
        "clients' mean": f"{clients['metric']} {clients['mean']:.4g}" if clients else "",
        "worst client": f"{clients['worst']:.4g}" if clients else "",
        "off the mean": f"{record['exactness']:.1e}" if "exactness" in record else "-",
        "epsilon": f"{record['epsilon']:.3g} ({record['epsilon_median']:.3g})" if "epsilon" in record else "-",
        "up": size(record["bytes_up"]),
        "down": size(record["bytes_down"]),
        "clock": f"{record['clock']:.0f} s" if "clock" in record else "-",
        "seconds": f"{record['seconds']:.1f}",
    }


def _share(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.4g}" if name in values else ""


def answers_line(records: Sequence[Mapping[str, Any]], before: Mapping[str, float]) -> str:
    """The scores of the last generated answers beside those before the run, in words; empty where there were none."""
    after: Mapping[str, float] = next((r["eval"] for r in reversed(records) if "exact_match" in (r["eval"] or {})), {})
    scores = [name for name in after if name not in WITHOUT_ANSWERS]
    told = (f"{name} {_share(before, name) or '-'} before, {_share(after, name)} after" for name in scores)
    return f"generated answers: {'; '.join(told)}" if scores else ""


def stage_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is told of what clients did for their own use after the last round, a line for each kind of model."""
    called = {"before": "after the rounds", "personal": f"after {found.get('steps')} steps by itself", "alone": "alone"}
    for row, values in found.get("rows", {}).items():
        lost = found["lost"].get(row, [])
        worse = f"; worse than after the rounds for {counted(len(lost), 'client')}" if lost else ""
        yield (
            f"each client's own model, {called[row]}: {values['metric']} mean {values['mean']:.4g}, "
            f"worst {values['worst']:.4g} (client {values['worst_client']}), std {values['std']:.3g}{worse}"
        )
    for stage, failed in found.get("failed", {}).items():
        done = found["clients"] - len(failed)
        if failed or not found.get("rows"):
            yield f"{done} of {counted(found['clients'], 'client')} have a model of their own, {called[stage]}"


def figures(values: Mapping[str, Any]) -> str:
    """Numbers by name, for people: `loss 1.386, accuracy 0.25`."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def show_log(with_times: bool = False) -> None:
    """Print what fedlora logs, and the warnings of libraries, as plain lines: for commands, whose process is theirs.

    `with_times` puts the time, in UTC, before each line. Libraries that set a format of their own are overruled.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_UTC("%(asctime)s %(message)s" if with_times else "%(message)s"))
    root = logging.getLogger()
    for other in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("fedlora").setLevel(logging.INFO)


def spending(records: Sequence[Mapping[str, Any]]) -> str:
    """What a private run has spent, in words."""
    last = newest(records, "epsilon")
    if not last:
        return "privacy: no client has been charged"
    return f"privacy: epsilon spent {last['epsilon']:.3g} at most, {last['epsilon_median']:.3g} the median client"


def so_far(records: Sequence[Mapping[str, Any]]) -> str:
    """What the rounds of a run that goes on have taken until now, in words; empty before the first."""
    if not records:
        return ""
    up, down = (sum(record[key] for record in records) for key in ("bytes_up", "bytes_down"))
    taken = f"so far: {counted(len(records), 'round')} in {seconds_of(records):.0f} s, {size(up)} up, {size(down)} down"
    return f"{taken}; {spending(records)}" if newest(records, "epsilon") else taken


def seconds_of(records: Sequence[Mapping[str, Any]]) -> float:
    """The seconds that all rounds of a run took, whichever process did them."""
    return float(sum(record["seconds"] for record in records))


def closeness(distances: list[float]) -> str:
    """What the exactness meter read over a run, in words."""
    if not distances:
        return "exactness: not defined, as clients keep a factor for themselves, or send projections of products"
    most, last = max(distances), distances[-1]
    if most < EXACT:
        return f"exactness: every round's model was the weighted mean of the clients' models (within {most:.0e} of it)"
    return (
        "exactness: the model was not the weighted mean of the clients' models: "
        f"{last:.2%} off it in the last round, {most:.2%} at most"
    )


def metric(values: Mapping[str, float] | None) -> str:
    """The headline of an evaluation: `perplexity 17.32`."""
    if not values:
        return ""
    name, _ = headline(values)
    return f"{name} {values[name]:.4g}"


def size(n: int) -> str:
    """A number of bytes in the unit that people read: `1.2 MB`."""
    for unit, over in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= over:
            return f"{n / over:.1f} {unit}"
    return f"{n} B"
