"""The commands. Light at the top: `fedlora --help` must not wait for torch."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedlora.environment import quiet_libraries
from fedlora.errors import ConfigError, FedloraError

from . import operate
from .options import dotted, pair

quiet_libraries()


app = typer.Typer(
    help="Federated LoRA fine-tuning: strategies that are exact where they say so, runs that resume.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
DOTTED = {"allow_extra_args": True, "ignore_unknown_options": True}
Text = str | None
Number = int | None
Real = float | None


@app.command(context_settings=DOTTED)
def simulate(
    context: typer.Context,
    clients: Annotated[Number, typer.Option(min=1, help="Clients there are.")] = None,
    rounds: Annotated[Number, typer.Option(min=1, help="Federated rounds.")] = None,
    cohort: Annotated[Number, typer.Option(min=1, help="Clients asked in a round.")] = None,
    strategy: Annotated[Text, typer.Option(help="Name (see fedlora strategies) or package.module:Class.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An option of the strategy, key=value; repeatable.")] = None,
    model: Annotated[Text, typer.Option(help="Folder or hub id of the base model.")] = None,
    data: Annotated[Text, typer.Option(help="File, 'pattern*.jsonl' (a file a client), folder or hub id.")] = None,
    eval_data: Annotated[Text, typer.Option(help="The same, for the global evaluation.")] = None,
    partition: Annotated[Text, typer.Option(help="iid, dirichlet:0.5, labels:2, natural:COLUMN, size:SKEW.")] = None,
    engine: Annotated[Text, typer.Option(help="auto, serial or flower.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    seed: Annotated[Number, typer.Option(help="Of every random draw.")] = None,
    dp_epsilon: Annotated[Real, typer.Option(help="Differential privacy: the budget of a client's records.")] = None,
    dp_delta: Annotated[Real, typer.Option(help="Default 1e-5, or less for many records.")] = None,
    dp_clip: Annotated[Real, typer.Option(help="Largest norm of a record's gradient.")] = None,
    dp_noise: Annotated[Real, typer.Option(help="Noise over clip, instead of an epsilon.")] = None,
    dp_level: Annotated[Text, typer.Option(help="What is hidden: record, or client.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<time>-<strategy>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
) -> None:
    """Run a federation on this machine. Every setting of `fedlora settings` is an option too: --train.lr 2e-3."""
    flags = {
        "clients": clients,
        "rounds": rounds,
        "cohort": cohort,
        "strategy": strategy,
        "model.path": model,
        "data.path": data,
        "data.eval": eval_data,
        "data.partition": partition,
        "engine": engine,
        "seed": seed,
        "dp.epsilon": dp_epsilon,
        "dp.delta": dp_delta,
        "dp.clip": dp_clip,
        "dp.noise": dp_noise,
        "dp.level": dp_level,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    given |= {f"option.{key}": value for key, value in map(pair, option or ())} | dotted(context.args)
    if dp_noise == 0:
        raise ConfigError("dp.noise = 0 adds no noise; leave it out, or give noise over clip, as 1.0")
    if resume and (config or out):
        raise ConfigError("--resume takes its settings and folder from the run; leave --config and --out away")
    from .simulate import simulate

    simulate(config, given, out, resume)


@app.command()
def strategies() -> None:
    """The catalogue: every strategy with its declared properties and its paper."""
    from .listings import strategies

    strategies()


@app.command()
def settings() -> None:
    """Every setting there is, with its default and meaning."""
    from .listings import settings

    settings()


@app.command(context_settings=DOTTED)
def evaluate(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    eval_data: Annotated[Text, typer.Option(help="Other data than the run's own evaluation.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Evaluate the adapter that a run delivered, beside its base model."""
    given = dotted(context.args) | ({"data.eval": eval_data} if eval_data else {})
    from .evaluate import evaluate

    evaluate(folder, given, json)


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Names, package.module:Class, file.py; none: all.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An option of the strategy, key=value; repeatable.")] = None,
) -> None:
    """Verify what strategies declare: the contract, on random factors and on real small models."""
    from fedlora.checks.report import check

    if not check(names or (), dict(map(pair, option or ()))):
        raise typer.Exit(1)


@app.command(context_settings=DOTTED)
def audit(
    context: typer.Context,
    run: Annotated[Text, typer.Argument(help="A run directory, whose settings are audited; none: small ones.")] = None,
    strategy: Annotated[Text, typer.Option(help="Name (see fedlora strategies) or package.module:Class.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An option of the strategy, key=value; repeatable.")] = None,
    model: Annotated[Text, typer.Option(help="Folder or hub id of the base model.")] = None,
    dp_epsilon: Annotated[Real, typer.Option(help="The budget that is promised.")] = None,
    dp_delta: Annotated[Real, typer.Option(help="At which epsilon is reckoned.")] = None,
    dp_clip: Annotated[Real, typer.Option(help="Largest norm of a record's gradient.")] = None,
    dp_noise: Annotated[Real, typer.Option(help="Noise over clip, instead of an epsilon.")] = None,
    dp_level: Annotated[Text, typer.Option(help="What is hidden: record, or client.")] = None,
    seed: Annotated[Number, typer.Option(help="Of the made-up records and canaries; never of the noise.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="So many audits, to count false alarms.")] = 1,
    controls: Annotated[bool, typer.Option("--controls", help="Plant known bugs and see each caught.")] = False,
    membership: Annotated[bool, typer.Option("--membership", help="Attack the adapter that RUN delivered.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Put a promise of privacy to the test: sensitivity, noise, draws, ledger, canaries. Settings are options too."""
    words = [*([run] if run and run.startswith("--") else []), *context.args]  # a setting where no run is named
    folder = Path(run) if run and not run.startswith("--") else None
    flags = {
        "strategy": strategy,
        "model.path": model,
        "dp.epsilon": dp_epsilon,
        "dp.delta": dp_delta,
        "dp.clip": dp_clip,
        "dp.noise": dp_noise,
        "dp.level": dp_level,
        "seed": seed,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    given |= {f"option.{key}": value for key, value in map(pair, option or ())} | dotted(words)
    if membership:
        from fedlora.audit.membership_inference import attack

        if folder is None:
            raise ConfigError("--membership attacks what a run delivered; name its directory: fedlora audit RUN")
        attack(folder, given, json)
        return
    from fedlora.audit.report import audit

    if not audit(folder, given, repeat, controls, json):
        raise typer.Exit(1)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    form: Annotated[str, typer.Option("--as", help="adapter, merged or per-client.")] = "adapter",
    max_rank: Annotated[int, typer.Option(min=0, help="Largest rank of the adapter; 0: what it needs.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; default DIR/export-<form>.")] = None,
) -> None:
    """Write what a run trained as a PEFT adapter, a merged model or an adapter a client; verified by its logits."""
    from fedlora.run.export import export

    export(folder, form, max_rank, out)


app.registered_commands += operate.app.registered_commands


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 1, never a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
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


if __name__ == "__main__":
    main()
