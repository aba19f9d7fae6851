"""Options that several commands share: a setting's short name, type and meaning stand once, where the setting does.

Light at the top, as every module of this package: `fedlora --help` must not wait for torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import ArgumentInfo

from fedlora.config import SHORT, Setting, setting_key, settings
from fedlora.errors import ConfigError

from .completion import values_of

DOTTED = {"allow_extra_args": True, "ignore_unknown_options": True}  # for words that no option of a command takes
COUNTS = ("clients", "rounds", "cohort")  # at least 1 where they are given: their 0 is to leave the option away
OF_A_SIMULATION = (  # short options of a run on one machine, whether it is done or planned
    *("clients", "rounds", "cohort", "strategy", "option", "model", "data", "eval_data", "partition", "engine", "seed"),
    *("dp_epsilon", "dp_delta", "dp_clip", "dp_noise", "dp_level"),
)
PANEL = "Settings (each of `fedlora settings` is an option too: --train.lr 2e-3)"
Options = Annotated[
    list[str] | None,
    typer.Option(help="An option of the strategy, key=value; repeatable.", rich_help_panel=PANEL),
]
Command = Callable[..., None]


def takes_settings(*names: str, **meanings: str) -> Callable[[Command], Command]:
    """Make a command of a function whose first parameter is a dict: the settings that were given, by their dotted keys.

    `names` are the keys of `SHORT` that are options of the command, and "option" for `--option key=value`; every other
    setting is one by its dotted key. `meanings` are help texts where a setting's own says too much or too little.
    """

    def decorate(function: Command) -> Command:
        own = list(signature(function, eval_str=True).parameters.values())[1:]
        optional = [p.name for p in own if _is_optional_argument(p)]

        def command(context: typer.Context, **values: Any) -> None:
            short = {name: values.pop(name) for name in names}
            words = list(context.args)
            for name in optional:
                if (values[name] or "").startswith("--"):  # the first setting, where the argument was left out
                    words.insert(0, values[name])
                    values[name] = None
            function(_by_key(short) | dotted(words), **values)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        shared = [_parameter(name, meanings.get(name, "")) for name in names]
        setattr(command, "__signature__", _signature(own, shared))  # noqa: B010 - where typer looks for the options
        return command

    return decorate


def _is_optional_argument(parameter: Parameter) -> bool:
    """Whether a parameter is an argument by its place, which may be left out."""
    return parameter.default is None and isinstance(get_args(parameter.annotation)[1], ArgumentInfo)


def _signature(own: Iterable[Parameter], shared: Iterable[Parameter]) -> Signature:
    """What typer is shown: the options that must be given, then the shared ones, then the rest."""
    context = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    ordered = sorted([*shared, *own], key=lambda p: p.default is not Parameter.empty)
    return Signature([context, *(p.replace(kind=Parameter.KEYWORD_ONLY) for p in ordered)])


def _parameter(name: str, meaning: str) -> Parameter:
    """A setting as a parameter that typer makes an option of; its value is None where the option is not given."""
    if name == "option":
        return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Options)
    setting = _settings()[SHORT[name]]
    kind = setting.kind if setting.kind in (int, float) else str
    info = typer.Option(
        min=1 if name in COUNTS else None,
        help=_sentence(meaning or setting.help),
        rich_help_panel=PANEL,
        autocompletion=lambda: list(values_of(setting)),
    )
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


@cache
def _settings() -> dict[str, Setting]:
    """Every setting by its key."""
    return {setting.key: setting for setting in settings()}


def _sentence(text: str) -> str:
    """A setting's meaning as the help of an option: with a capital, and a full stop."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _by_key(short: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of options that were given, by their dotted keys."""
    given = {SHORT[name]: value for name, value in short.items() if value is not None and name != "option"}
    return given | {f"option.{key}": value for key, value in map(pair, short.get("option") or ())}


def pair(text: str) -> tuple[str, str]:
    """`key=value` as a pair."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--option {text}: write it as key=value")
    return key.strip().replace("-", "_"), value.strip()


def dotted(words: Sequence[str]) -> dict[str, Any]:
    """Settings by their dotted keys: `--lora.rank 16`, `--lora.rank=16`, or `--lora.rslora` alone for true.

    >>> dotted(["--train.batch-size", "4", "--exactness"])
    {'train.batch_size': '4', 'exactness': 'true'}
    """
    given: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f'"{word}" belongs to no option; settings are written --train.lr 2e-3')
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = left.pop(0) if left and not left[0].startswith("--") else "true"
        given[setting_key(key)] = value
    return given


def check_credentials(credentials: Path | None, insecure: bool, who: str) -> None:
    """Raise `ConfigError` unless a server or client has either its keys or the word that it goes without them."""
    if credentials is None and not insecure:
        raise ConfigError(
            f"a {who} needs --credentials, its folder of fedlora provision; for a trial without TLS and keys, say "
            "--insecure"
        )
    if credentials is not None and insecure:
        raise ConfigError("--insecure uses no keys: leave --credentials away, or --insecure")
