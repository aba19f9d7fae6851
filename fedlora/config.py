"""One validated config: the same dotted keys in a TOML file, on the command line and in Flower's run config.

The sections are frozen dataclasses; a field's annotation holds its limits and, as a plain string, what it means.
"""

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Lt

from . import other_names, strategy_files
from .errors import ConfigError, nearest
from .sections import (
    AggregateConfig,
    ClientConfig,
    DataConfig,
    EvalConfig,
    LoRAConfig,
    MessageConfig,
    ModelConfig,
    Names,
    PersonalConfig,
    Policy,
    PrivacyConfig,
    SecureConfig,
    SimulationConfig,
    Training,
)

if TYPE_CHECKING:  # which takes a while to load
    from pydantic import TypeAdapter

CHANGEABLE_ON_RESUME = (
    "rounds",
    "engine",
    "threads",
    "workers",
    "ray",
    "model.device",
    "data.eval_limit",
    "data.cache",
    "report_to",
)  # and server.*, eval.*, personal.*
MOVABLE = (
    "model.path",
    "data.path",
    "data.eval",
    "lora.init_data",
    "simulation.trace",
)  # paths whose content a run knows by its hash
CLIENT_SECTIONS = ("data.", "dp.", "secure.", "client.")  # sections in which a client may have settings of its own
CLIENT_KEYS = ("model.path", "model.revision", "model.device", "threads")  # and single ones of other sections
SHORT = {  # settings that the commands and `fedlora.simulate` take by a short name too
    **{key: key for key in ("clients", "rounds", "cohort", "strategy", "engine", "seed")},
    "model": "model.path",
    "data": "data.path",
    "eval_data": "data.eval",
    "partition": "data.partition",
    **{f"dp_{key}": f"dp.{key}" for key in ("epsilon", "delta", "clip", "noise", "level")},
}


def setting_key(name: str) -> str:
    """The dotted key that a name means: hyphens are as good as underscores, and a short name as the key.

    >>> setting_key("train.batch-size"), setting_key("dp-epsilon"), setting_key("rounds")
    ('train.batch_size', 'dp.epsilon', 'rounds')
    """
    plain = name.replace("-", "_")
    return SHORT.get(plain, plain)


@dataclass(frozen=True)
class Config:
    """All settings of a run, as `config.toml` in a run directory holds them."""

    strategy: Annotated[str, "name from `fedlora strategies`, package.module:Class, or file.py"] = "fedavg"
    option: Annotated[dict[str, bool | int | float | str], "the strategy's own options"] = field(default_factory=dict)
    clients: Annotated[int, Ge(0), "clients there are; 0: one a file or natural id, else 50"] = 0
    rounds: Annotated[int, Ge(1), "federated rounds"] = 10
    cohort: Annotated[int, Ge(0), "clients asked in a round; 0: a fifth of them, at least 2 (3 under masks)"] = 0
    seed: Annotated[int, Ge(0), Lt(2**64), "seed of every random draw"] = 0
    engine: Annotated[
        Literal["auto", "serial", "stacked", "flower"],
        (
            "how clients run: stacked (many in a pass), serial (one by one), flower (many processes); auto: stacked, "
            "but serial with dp.level = client"
        ),
    ] = "auto"
    exactness: Annotated[bool, "measure how far each round's model is from the mean of the clients' models"] = False
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "mixed"],
        (
            "number type of the base's products: fp32, bf16 (model.dtype = bfloat16), or mixed (float32, but bfloat16 "
            "in products of frozen layers); auto: as model.dtype says"
        ),
    ] = "auto"
    threads: Annotated[int, Ge(0), "CPU threads of a process; 0: as many as torch takes, 1 in a worker of flower"] = 0
    workers: Annotated[
        int, Ge(0), "processes of the flower engine; 0: one a GPU, else one for each `threads` cores"
    ] = 0
    ray: Annotated[
        str, "address of a running Ray cluster for the flower engine, which needs workers; empty: Ray here"
    ] = ""
    report_to: Annotated[
        Names, "trackers that are told the figures: tensorboard, trackio, wandb, mlflow; empty: none"
    ] = ("tensorboard",)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: Training = field(default_factory=Training)
    server: Policy = field(default_factory=Policy)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    dp: PrivacyConfig = field(default_factory=PrivacyConfig)
    secure: SecureConfig = field(default_factory=SecureConfig)
    messages: MessageConfig = field(default_factory=MessageConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    aggregate: AggregateConfig = field(default_factory=AggregateConfig)
    personal: PersonalConfig = field(default_factory=PersonalConfig)

    def __post_init__(self) -> None:
        if self.precision != "auto":
            self._check_precision()

    def _check_precision(self) -> None:
        """Raise `ConfigError` where another setting contradicts the precision."""
        dtypes = {"fp32": ("float32",), "bf16": ("float32", "bfloat16"), "mixed": ("float32",)}[self.precision]
        if self.model.dtype not in dtypes:
            raise ConfigError(
                f"precision = {self.precision} and model.dtype = {self.model.dtype}: leave one of them out"
            )
        if self.precision == "mixed" and self.model.quantize != "none":
            raise ConfigError(
                f"precision = mixed and model.quantize = {self.model.quantize}: a quantised base has products of its "
                "own; choose precision = auto"
            )
        if self.precision != "fp32" and self.dp.by_record:
            raise ConfigError(
                f"precision = {self.precision} and dp.level = record: one record would change the gradients of others "
                "by rounding, which the noise does not cover; choose precision = fp32"
            )


@dataclass(frozen=True)
class Setting:
    """One setting, as the table of all settings and the options of the commands show it."""

    key: str  # dotted: section and name
    default: Any
    kind: Any  # its type, or the `Literal` of its values
    help: str

    @property
    def section(self) -> str:
        """The section that it stands in; `run` for the keys that have none."""
        return self.key.partition(".")[0] if "." in self.key else "run"


def section_meanings() -> dict[str, str]:
    """What the settings of each section are about, in words."""
    meanings = {"run": "The run as a whole."}
    for name, section in get_type_hints(Config).items():
        if is_dataclass(section):
            meanings[name] = (section.__doc__ or "").split("\n", 1)[0]
    return meanings


def settings(section: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Every dotted key there is, with its default and meaning."""
    hints = get_type_hints(section, include_extras=True)
    for f in fields(section):
        if is_dataclass(hints[f.name]):
            yield from settings(hints[f.name], f"{prefix}{f.name}.")
        else:
            kind, *notes = get_args(hints[f.name])
            default = {} if f.default is MISSING else f.default
            meaning = next(note for note in notes if isinstance(note, str))
            yield Setting(prefix + f.name, default, kind, meaning)


def build(*layers: Mapping[str, Any]) -> Config:
    """The config from flat layers of dotted keys, later ones over earlier ones.

    Raises `ConfigError` naming the key, with its nearest neighbour where it is unknown.
    """
    known, flat = _known(), {}
    for layer in layers:
        for key, value in _unfold(layer):
            flat[key] = value if key.startswith("option.") else _listed(known, key, value)
    return _validate(flat)


@cache
def _known() -> Mapping[str, Setting]:
    """Every setting by its key."""
    return {setting.key: setting for setting in settings()}


def _listed(known: Mapping[str, Setting], key: str, value: Any) -> Any:
    """The value of a known key, with a comma-separated text taken apart where the setting is a list of names."""
    if key not in known:
        raise ConfigError(f'unknown key "{key}"; {_meant(key, known)}')
    if known[key].kind == Names and isinstance(value, str):
        return _words(value)
    return value


def _meant(key: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown key: what another program's name is here, or the nearest known ones."""
    if ours := other_names.ours(key):
        return f"here it is {ours}"
    last = key.rpartition(".")[2]
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        quoted = (f'"{name}"' for name in same)
        return f"did you mean {' or '.join(quoted)}?"
    return nearest(key, {*known, *SHORT}, otherwise="fedlora settings lists those that are known")


def _words(text: str) -> list[str]:
    """What stands between commas, or in a JSON list of texts."""
    with suppress(ValueError):
        listed = json.loads(text)
        if isinstance(listed, list) and all(isinstance(word, str) for word in listed):
            return listed
    return [word for word in map(str.strip, text.split(",")) if word]


def _unfold(layer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flower's run config has no room for unknown keys: there, options come as one line, `option = "lam=0.5, k=2"`."""
    for key, value in layer.items():
        if key == "option" and isinstance(value, str):
            for word in _words(value):
                name, _, text = word.partition("=")
                yield f"option.{name.strip()}", text.strip()
        else:
            yield key, value


def _validate(flat: Mapping[str, Any]) -> Config:
    """The config with every value of its setting's type and within its limits."""
    from pydantic import ValidationError

    try:
        return _adapter().validate_python(_nested(flat))
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2] if "." not in str(part))
        raise ConfigError(f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from e


@cache
def _adapter() -> "TypeAdapter[Config]":
    """What holds values to the annotations; it takes a while to make."""
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections; an option's name may have dots of its own."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            tree.setdefault(section, {})[name] = value
        else:
            tree[key] = value
    return tree


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The config as dotted keys; the inverse of `build`."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        elif isinstance(value, dict):
            flat |= {f"{prefix}{f.name}.{k}": v for k, v in value.items()}
        else:
            flat[prefix + f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def read(path: Path) -> dict[str, Any]:
    """The dotted keys of a TOML file, sections and dots alike."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Notepad begins a file with a mark
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; give --config a TOML file") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not TOML: {e}") from e
    return dotted_keys(tree)


def dotted_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; see `setting_key` for how these may be written."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        within = isinstance(value, dict)
        flat |= dotted_keys(value, f"{prefix}{key}.") if within else {setting_key(prefix + key): value}
    return flat


def dumps(config: Config) -> str:
    """The config as a TOML file that makes the same run again."""
    import tomli_w

    return tomli_w.dumps(_nested(flatten(config)))


def absolute(config: Config) -> Config:
    """The config with paths that still point there when the run is resumed from another folder; hub ids as they are."""

    def full(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if path else ""

    def on_disk(path: str) -> str:
        return full(path) if _on_disk(path) else path

    cache = config.data.cache if config.data.cache in ("auto", "off") else full(config.data.cache)
    return replace(
        config,
        strategy=strategy_files.absolute(config.strategy),
        data=replace(config.data, path=on_disk(config.data.path), eval=on_disk(config.data.eval), cache=cache or "off"),
        model=replace(config.model, path=on_disk(config.model.path)),
        lora=replace(config.lora, init_data=on_disk(config.lora.init_data)),
        dp=replace(config.dp, ledger=full(config.dp.ledger)),
        simulation=replace(config.simulation, trace=full(config.simulation.trace)),
    )


def engine_of(config: Config) -> Any:
    """The engine that runs these settings: where they leave it open, the fastest on one machine that can."""
    if config.engine in ("auto", "stacked"):
        return "serial" if why_apart(config) else "stacked"
    return config.engine


def why_apart(config: Config) -> str:
    """Why no two clients of these settings may be trained in one pass; empty where they may."""
    if config.dp.by_client:
        return (
            "dp.level = client: in one pass an update would depend by rounding on who else takes part, which the noise "
            "does not cover"
        )
    return ""


def _on_disk(path: str) -> bool:
    """Whether a path names files here, or is a pattern of such; an empty one does not."""
    return any(c in path for c in "*?[") or (bool(path) and Path(path).expanduser().exists())


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of this setting, because its finished rounds do not rest on it."""
    return key in CHANGEABLE_ON_RESUME or key.startswith(("server.", "eval.", "personal."))


def bound_keys(flat: Mapping[str, Any]) -> list[str]:
    """The settings among these that stay as they were in a run that is resumed; none that this version does not know.

    Of a setting that names files these are bound, and not where they lie.
    """
    known = {setting.key for setting in settings()}.difference(MOVABLE)
    return [key for key in flat if (key in known or key.startswith("option.")) and not may_change(key)]


def check_client_settings(mine: Mapping[str, Any]) -> Config:
    """A client's own settings, built. Raises `ConfigError` for one that is unknown, or that only the server may set."""
    built = build(mine)
    wrong = sorted(key for key in mine if not key.startswith(CLIENT_SECTIONS) and key not in CLIENT_KEYS)
    if wrong:
        raise ConfigError(
            f"{wrong[0]} is the server's to set; a client's own are data.*, dp.*, secure.*, {', '.join(CLIENT_KEYS)}"
        )
    return absolute(built)


EMBEDDED = (
    Path(__file__).parent / "tiny" / "run.toml"
)  # the settings of the small model and text that come with fedlora


def over_defaults(file: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """The file's settings under those of the command line; with no model and no data, both over the embedded run's."""
    embedded = not any(layer.get(key) for layer in (file, given) for key in ("model.path", "data.path"))
    under = read(EMBEDDED) if embedded else {}
    return build(under, file, given)
