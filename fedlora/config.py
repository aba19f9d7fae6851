"""One validated config: the same dotted keys in a TOML file, on the command line and in Flower's run config.

The sections are frozen dataclasses; a field's annotation holds its limits and, as a plain string, what it means.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Gt, Lt

from .errors import ConfigError, nearest
from .options import AggregateConfig, ClientConfig, MessageConfig, Names, Policy, PrivacyConfig, SecureConfig, Training

FREE = ("rounds", "engine", "threads", "model.device", "data.eval_limit")  # what a run that goes on may change
MINE = ("data.", "dp.", "secure.", "client.")  # sections that a client may have settings of its own in
MY = ("model.path", "model.revision", "model.device", "threads")
SHORT = {  # settings that the commands and `fedlora.simulate` take by a short name too
    **{key: key for key in ("clients", "rounds", "cohort", "strategy", "engine", "seed")},
    "model": "model.path",
    "data": "data.path",
    "eval_data": "data.eval",
    "partition": "data.partition",
    **{f"dp_{key}": f"dp.{key}" for key in ("epsilon", "delta", "clip", "noise", "level")},
}


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    path: Annotated[str, "folder or hub id of the base model; empty: the small one that comes with fedlora"] = ""
    revision: Annotated[str, "branch, tag or commit of a hub id"] = ""
    task: Annotated[
        Literal["auto", "lm", "classify", "image"], "what the model learns; auto: by the columns of the data"
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], "number type of the base model; adapters are float32"
    ] = "float32"
    quantize: Annotated[Literal["none", "8bit", "4bit"], "quantisation of the base model, by bitsandbytes on a GPU"] = (
        "none"
    )
    head: Annotated[Literal["shared", "local", "frozen"], "a classifier's head: who trains it"] = "shared"
    max_length: Annotated[int, Ge(8), "tokens in an example; longer text is cut, or split for language modelling"] = 128
    device: Annotated[str, "device that computes; auto: a GPU where there is one"] = "auto"


@dataclass(frozen=True)
class LoRAConfig:
    """The adapter that every client trains; a contradiction in it is a `ConfigError` where it is built."""

    kind: Annotated[
        Literal["lora", "dora", "vera"], "dora: magnitudes too; vera: two vectors a module, A, B shared"
    ] = "lora"
    rank: Annotated[int, Ge(1), "r"] = 8
    alpha: Annotated[float, Gt(0), "a module computes (W + s B A) x with s = alpha / r"] = 16.0
    ranks: Annotated[
        str, "ranks of the clients, up to lora.rank: 4,8,16 in turn, uniform:4-16, auto:4GB,8GB; empty: alike"
    ] = ""
    rslora: Annotated[bool, "s = alpha / sqrt(r) instead"] = False
    dropout: Annotated[float, Ge(0), Lt(1), "dropout of the adapter's input"] = 0.0
    targets: Annotated[Names, "modules to adapt, by the end of their names; empty: query and value; or all-linear"] = ()
    init: Annotated[
        Literal["kaiming", "gaussian", "orthonormal", "pissa", "olora", "eva"],
        "start of A, with B = 0; of A and B with pissa and olora, whose product is taken off again",
    ] = "kaiming"
    init_data: Annotated[str, "file of public examples, in the columns of the run's, that init = eva looks at"] = ""
    rank_pattern: Annotated[str, "other ranks by the end of a module's name: v_proj=4,layers.0.q_proj=16"] = ""
    alpha_pattern: Annotated[str, "other alphas, written alike; the longest name that fits a module counts"] = ""

    def __post_init__(self) -> None:
        for key, value in self.pattern("rank_pattern").items():
            if value != int(value):
                raise ConfigError(f'lora.rank_pattern = "{self.rank_pattern}": {key}={value:g} is no whole number')
        self.pattern("alpha_pattern")
        for why in self._contradictions():
            raise ConfigError(why)

    def _contradictions(self) -> Iterator[str]:
        """What is wrong with the settings taken together, each with its remedy."""
        if self.init == "eva" and not self.init_data:
            yield "lora.init = eva takes A from the inputs of public examples; set lora.init_data to a file"
        if self.kind == "dora" and self.init in ("pissa", "olora"):
            yield f"lora.init = {self.init} needs an offset, which dora's magnitudes would scale; choose another init"
        shape = (self.init, self.rslora, self.rank_pattern, self.alpha_pattern)
        if self.kind == "vera" and shape != ("kaiming", False, "", ""):
            yield (
                "lora.kind = vera has A and B of its own, one rank and no alpha; leave lora.init, lora.rslora, "
                "lora.rank_pattern and lora.alpha_pattern out"
            )

    def pattern(self, key: Literal["rank_pattern", "alpha_pattern"]) -> dict[str, float]:
        """Numbers by module name, or end of one; raises `ConfigError` for what is not written NAME=NUMBER,..."""
        text: str = getattr(self, key)
        found = {}
        for word in filter(None, map(str.strip, text.split(","))):
            name, _, number = word.partition("=")
            value = self._positive(number)
            if not name.strip() or not value:
                raise ConfigError(f'lora.{key} = "{text}": "{word}" is no NAME=NUMBER, as in v_proj=4')
            found[name.strip()] = value
        return found

    @staticmethod
    def _positive(text: str) -> float:
        """The finite number above 0 that the text is, or 0."""
        try:
            value = float(text)
        except ValueError:
            return 0.0
        return value if 0 < value < float("inf") else 0.0


@dataclass(frozen=True)
class DataConfig:
    """Whose examples are whose."""

    path: Annotated[str, "file, pattern (one file a client), datasets folder or hub id; empty: Python's library"] = ""
    eval: Annotated[str, "data for the global evaluation, written as data.path is"] = ""
    partition: Annotated[
        str, "how rows are shared out: iid, dirichlet:ALPHA, labels:PER_CLIENT, natural:COLUMN, size:SKEW, files"
    ] = "auto"
    holdout: Annotated[float, Ge(0), Lt(1), "share of each client's examples kept for its own evaluation"] = 0.0
    eval_share: Annotated[float, Ge(0), Lt(1), "share of all examples kept for the global one, without data.eval"] = 0.1
    eval_limit: Annotated[int, Ge(0), "evaluate on so many examples of these, evenly spread; 0: on all"] = 0
    limit: Annotated[int, Ge(0), "use only the first so many examples of data.path and of data.eval; 0: all"] = 0
    text: Annotated[Names, "text column, or two for a pair; empty: found by name"] = ()
    label: Annotated[str, "label column"] = ""
    prompt: Annotated[str, "prompt column; the loss is on the response"] = ""
    response: Annotated[str, "response column"] = ""
    messages: Annotated[str, "chat column; the loss is on the assistant's turns"] = ""
    image: Annotated[str, "image column: files or image data"] = ""
    labels: Annotated[Names, "names of the classes in order; empty: as found in the data"] = ()


@dataclass(frozen=True)
class Config:
    """A run, complete: what `config.toml` in a run directory holds."""

    strategy: Annotated[str, "name from `fedlora strategies`, or package.module:Class"] = "fedavg"
    option: Annotated[dict[str, bool | int | float | str], "the strategy's own options"] = field(default_factory=dict)
    clients: Annotated[int, Ge(0), "clients there are; 0: one a file or natural id, else 50"] = 0
    rounds: Annotated[int, Ge(1), "federated rounds"] = 10
    cohort: Annotated[int, Ge(0), "clients asked in a round; 0: a fifth of them, at least 2 (3 under masks)"] = 0
    seed: Annotated[int, Ge(0), "seed of every random draw"] = 0
    engine: Annotated[Literal["auto", "serial", "stacked", "flower"], "where clients run"] = "auto"
    exactness: Annotated[bool, "measure how far each round's model is from the mean of the clients' models"] = False
    threads: Annotated[int, Ge(0), "CPU threads of a process; 0: as many as torch takes"] = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: Training = field(default_factory=Training)
    server: Policy = field(default_factory=Policy)
    dp: PrivacyConfig = field(default_factory=PrivacyConfig)
    secure: SecureConfig = field(default_factory=SecureConfig)
    messages: MessageConfig = field(default_factory=MessageConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    aggregate: AggregateConfig = field(default_factory=AggregateConfig)


@dataclass(frozen=True)
class Setting:
    """A dotted key, for the table of all settings."""

    key: str
    default: Any
    kind: Any
    help: str


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
    known = {setting.key: setting for setting in settings()}
    flat = {}
    for layer in layers:
        for key, value in _unfold(layer):
            flat[key] = value if key.startswith("option.") else _listed(known, key, value)
    return _validate(flat)


def _listed(known: Mapping[str, Setting], key: str, value: Any) -> Any:
    """The value of a known key, with a comma-separated text taken apart where the setting is a list of names."""
    if key not in known:
        raise ConfigError(f'unknown key "{key}"; {nearest(key, known)}')
    if known[key].kind == Names and isinstance(value, str):
        return _words(value)
    return value


def _words(text: str) -> list[str]:
    """What stands between commas."""
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
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Config).validate_python(_nested(flat))
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2] if "." not in str(part))
        raise ConfigError(f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from e


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
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; give --config a TOML file") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not TOML: {e}") from e
    return dotted_keys(tree)


def dotted_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
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

    return replace(
        config,
        data=replace(config.data, path=on_disk(config.data.path), eval=on_disk(config.data.eval)),
        model=replace(config.model, path=on_disk(config.model.path)),
        lora=replace(config.lora, init_data=on_disk(config.lora.init_data)),
        dp=replace(config.dp, ledger=full(config.dp.ledger)),
    )


def _on_disk(path: str) -> bool:
    """Whether a path names files here, or is a pattern of such; an empty one does not."""
    return any(c in path for c in "*?[") or (bool(path) and Path(path).expanduser().exists())


def check_mine(mine: Mapping[str, Any]) -> Config:
    """A client's own settings, built. Raises `ConfigError` for one that only the server may set."""
    wrong = sorted(key for key in mine if not key.startswith(MINE) and key not in MY)
    if wrong:
        raise ConfigError(
            f"{wrong[0]} is the server's to set; a client's own are data.*, dp.*, secure.*, {', '.join(MY)}"
        )
    return absolute(build(mine))
