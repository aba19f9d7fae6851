"""The sections of a config: the model, its adapter, the data, how clients train, how the server runs rounds, privacy.

Frozen dataclasses whose annotations hold each field's limits and, as a plain string, what it means. Light: no torch, so
that commands which only start others stay small.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen

from .errors import ConfigError
from .own_code import LONGEST, check_path
from .text_scores import extractor

Names = tuple[str, ...]
Encoding = Literal["float32", "bfloat16", "int8"]
GradientEngine = Literal["auto", "lora", "hooks", "one"]
OPTIMIZERS = ("adamw", "sgd")  # that a client has, beside those of a user's own


@dataclass(frozen=True)
class Training:
    """How a client trains; one definition for the settings file, the command line and the Job."""

    optimizer: Annotated[
        str,
        MaxLen(LONGEST),
        "optimizer of a client, made anew every round: adamw, sgd, or your own, package.module:name",
    ] = "adamw"
    lr: Annotated[float, Gt(0), Le(1e3), "learning rate"] = 1e-3
    head_lr: Annotated[float, Ge(0), Le(1e3), "learning rate of a classifier's head; 0: that of the adapter"] = 0.0
    lora_plus: Annotated[float, Gt(0), Le(1e6), "learning rate of B over that of A (LoRA+, arXiv 2402.12354)"] = 1.0
    momentum: Annotated[float, Ge(0), Lt(1), "momentum of sgd"] = 0.0
    weight_decay: Annotated[float, Ge(0), Le(1e6), "weight decay: decoupled with adamw, L2 with sgd"] = 0.0
    epochs: Annotated[float, Ge(0), Le(1e5), "passes over the client's data a round"] = 1.0
    steps: Annotated[int, Ge(0), Le(10**7), "optimizer steps a round; 0: as many as the epochs take"] = 0
    batch_size: Annotated[int, Ge(1), Le(2**20), "examples in a forward pass"] = 16
    accumulate: Annotated[int, Ge(1), Le(2**20), "forward passes in an optimizer step"] = 1
    clip: Annotated[float, Ge(0), Le(1e20), "largest norm of a step's gradient; 0: not clipped"] = 1.0
    schedule: Annotated[Literal["constant", "linear", "cosine"], "course of the learning rate over all rounds"] = (
        "constant"
    )
    warmup: Annotated[float, Ge(0), Le(1), "share of the whole run in which the learning rate rises"] = 0.0
    prox: Annotated[
        float, Ge(0), Le(1e9), "mu of FedProx: mu/2 times the squared distance to where the round started"
    ] = 0.0
    loss: Annotated[
        str, MaxLen(LONGEST), "a loss of your own, package.module:function of scores and targets; empty: the task's"
    ] = ""
    regulariser: Annotated[
        str, MaxLen(LONGEST), "added to the loss, package.module:function of the adapter and its start; empty: none"
    ] = ""

    def __post_init__(self) -> None:
        check_path("train.optimizer", self.optimizer, or_one_of=OPTIMIZERS)
        check_path("train.loss", self.loss)
        check_path("train.regulariser", self.regulariser)

    @property
    def own_code(self) -> dict[str, str]:
        """The paths of code of the user's own that a client runs, by the settings that name them."""
        named = {"train.optimizer": self.optimizer, "train.loss": self.loss, "train.regulariser": self.regulariser}
        return {key: path for key, path in named.items() if path and path not in OPTIMIZERS}


@dataclass(frozen=True)
class Policy:
    """How the server runs its rounds."""

    mode: Annotated[
        Literal["rounds", "async"],
        "rounds: all of a cohort, then the next model; async: a new model for each buffer of updates, as they come",
    ] = "rounds"
    buffer: Annotated[int, Ge(0), "updates that make a new model (async); 0: half of the cohort"] = 0
    max_staleness: Annotated[
        int, Ge(0), "versions of the model that an update may be old; one that is older is refused (async)"
    ] = 10
    staleness: Annotated[
        float, Ge(0), Le(10), "a: an update that is t versions old moves the model by (1 + t)^-a of its change (async)"
    ] = 0.5
    fair: Annotated[
        bool, "divide a client's change by how often it arrives, so that quick clients count no more (async)"
    ] = False
    weights: Annotated[Literal["examples", "uniform"], "a client's weight in the mean"] = "examples"
    quorum: Annotated[float, Gt(0), Le(1), "share of a round's clients that must answer"] = 0.5
    below_quorum: Annotated[Literal["stop", "skip"], "end the run, or go on with the model as it was"] = "stop"
    deadline: Annotated[
        float,
        Ge(0),
        (
            "seconds after which a client has failed its round (flower, or simulation.*); inf: never; 0: once a "
            "quorum has answered, ten times as long as the median answer took, at least ten minutes"
        ),
    ] = 0.0
    grace: Annotated[
        float,
        Ge(0),
        "seconds that the others have once a quorum has answered (flower, or simulation.*); inf: up to the deadline",
    ] = inf
    wait: Annotated[float, Ge(0), "seconds a run waits at its start for clients beyond the quorum (flower)"] = 120.0
    largest_step: Annotated[float, Gt(0), "norm of a client's change in a round above which it is refused"] = 1000.0
    step_ratio: Annotated[
        float, Ge(1), "norm of a client's change over the median of its round above which it is refused; inf: any"
    ] = 30.0
    max_share: Annotated[
        float, Ge(0.5), Le(1), "largest share of one client in a mean of three or more, whatever examples it has"
    ] = 0.5
    eval_every: Annotated[int, Ge(0), "rounds between evaluations; the last is always evaluated; 0: only that"] = 1
    eval_clients: Annotated[
        int, Ge(0), "clients that are asked at most, in an evaluation, how well their own models do; 0: all"
    ] = 200
    patience: Annotated[int, Ge(0), "evaluations without a lower loss before the run stops early; 0: never"] = 0


@dataclass(frozen=True)
class SimulationConfig:
    """How quick simulated clients are, and when they are there, on a clock of the simulation's own."""

    speed: Annotated[
        str,
        (
            "examples a second of each client: numbers in turn (8,4,1), uniform:1-10, loguniform:1-10, lognormal:0.8 "
            "(sigma of its logarithm); empty: 1"
        ),
    ] = ""
    dropout: Annotated[float, Ge(0), Lt(1), "probability that a client is lost with its job"] = 0.0
    available: Annotated[
        float, Gt(0), Le(1), "share of the time that a client is there; drawn anew for every simulation.period"
    ] = 1.0
    period: Annotated[float, Gt(0), "seconds for which a client is there or away"] = 600.0
    trace: Annotated[
        str, "CSV file of client, speed, dropout, from, until instead: a line for each time that a client is there"
    ] = ""

    def __post_init__(self) -> None:
        drawn = (self.speed, self.dropout, self.available)
        if self.trace and drawn != ("", 0.0, 1.0):
            raise ConfigError(
                "simulation.trace says how quick clients are and when they are there; leave simulation.speed, "
                "simulation.dropout and simulation.available out"
            )

    @property
    def on(self) -> bool:
        """Do clients differ, so that a clock of the simulation's own tells who answers in time?"""
        return bool(self.speed or self.trace or self.dropout) or self.available < 1


@dataclass(frozen=True)
class PersonalConfig:
    """What each client does by itself after the last round, for its own use: nothing of it is sent."""

    steps: Annotated[
        int, Ge(0), Le(10**7), "optimizer steps of each client by itself, on from the model that it has; 0: none"
    ] = 0
    prox: Annotated[
        float, Ge(0), Le(1e9), "lambda of Ditto: lambda/2 times the squared distance to the model it went on from"
    ] = 0.0
    lr: Annotated[float, Ge(0), Le(1e3), "learning rate of these steps; 0: train.lr"] = 0.0
    alone: Annotated[bool, "have each client train a model alone too, as long as the run, to compare with"] = False

    @property
    def on(self) -> bool:
        return self.steps > 0 or self.alone


@dataclass(frozen=True)
class EvalConfig:
    """How generated answers of the held-out set are scored, beside the loss; greedy, so the same each time."""

    generate: Annotated[bool, "have a language model answer held-out prompts, and score the answers"] = False
    limit: Annotated[int, Ge(0), "answer so many of the held-out prompts, evenly spread; 0: all"] = 100
    every: Annotated[int, Ge(0), "evaluations between generations; 0: before the first and after the last alone"] = 1
    max_new_tokens: Annotated[int, Ge(1), Le(2**20), "tokens of an answer at most"] = 128
    batch_size: Annotated[int, Ge(1), Le(2**20), "prompts answered in one batch"] = 16
    extract: Annotated[
        str, "what an exact match compares: text (all), number (the last one, as in GSM8K), or regex:PATTERN"
    ] = "text"
    metric: Annotated[
        str, "a score of your own, package.module:function of the generated and the expected text; empty: none"
    ] = ""
    target_metric: Annotated[
        str,
        "a figure of your own, the mean over targets of package.module:function of scores and targets; empty: none",
    ] = ""

    def __post_init__(self) -> None:
        check_path("eval.target_metric", self.target_metric)
        extractor(self.extract)  # refused here, before a model is loaded, where it is none


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy; on where epsilon or noise is given."""

    epsilon: Annotated[
        float, Gt(0), "privacy budget: most that the run may spend of a client's data; inf: no privacy"
    ] = inf
    noise: Annotated[float, Ge(0), Le(1e6), "sigma: noise over clip, instead of what epsilon asks for"] = 0.0
    delta: Annotated[
        float,
        Ge(0),
        Lt(1),
        "delta of the guarantee; 0: 1e-5, or a tenth of 1/N if less; N: records of the largest client",
    ] = 0.0
    clip: Annotated[
        float, Gt(1e-20), Lt(1e20), "C: largest norm of a record's gradient, or of a client's whole update"
    ] = 1.0
    level: Annotated[
        Literal["record", "client"], "what is hidden: record (one record of a client), or client (all of one)"
    ] = "record"
    unit: Annotated[Literal["row", "example"], "a record: a row, or each block of tokens made of it"] = "row"
    head_share: Annotated[
        float,
        Gt(0),
        Lt(1),
        "share of the squared clipping norm that is spent on a classifier head when LoRA factors are trained too",
    ] = 0.5
    rate: Annotated[float, Ge(0), Le(1), "probability q of a record in a step; 0: by batch size"] = 0.0
    joins: Annotated[int, Ge(0), "rounds that a client may take part in at most; 0: all"] = 0
    budget: Annotated[float, Gt(0), "epsilon a client's ledger allows over all runs; inf: that of this run"] = inf
    ledger: Annotated[str, "folder of the clients' ledgers, kept over runs; empty: in the run directory"] = ""
    metrics: Annotated[bool, "let clients tell losses and scores as they are: they are not private"] = False
    seeded: Annotated[bool, "noise and samples from the seed: an experiment that is NOT PRIVATE"] = False
    engine: Annotated[GradientEngine, "how single records' gradients are found; hooks: Opacus's"] = "auto"
    quantile: Annotated[
        float, Ge(0), Lt(1), "quantile of clients' norms that the clip follows (level client); 0: fixed"
    ] = 0.0
    quantile_lr: Annotated[float, Gt(0), "how fast the clip follows that quantile"] = 0.2
    quantile_share: Annotated[
        float, Gt(0), Lt(1), "share of the privacy budget that is spent on following the quantile"
    ] = 0.05

    @property
    def on(self) -> bool:
        return self.epsilon < inf or self.noise > 0

    @property
    def by_record(self) -> bool:
        return self.on and self.level == "record"

    @property
    def by_client(self) -> bool:
        return self.on and self.level == "client"

    @property
    def limit(self) -> float:
        """Epsilon up to which a client lets itself be charged."""
        return self.budget if self.budget < inf else self.epsilon


@dataclass(frozen=True)
class SecureConfig:
    """Secure aggregation."""

    aggregation: Annotated[bool, "let the server see sums of updates, and no client's own"] = False
    threshold: Annotated[float, Gt(0), Le(1), "share of a round's clients that must stay to its end"] = 0.6
    colluders: Annotated[
        int, Ge(0), "clients that may be in league with the server: of n, more than (n + colluders) / 2 must stay"
    ] = 1
    reach: Annotated[float, Gt(0), "largest change of a number in a round; the resolution is 2^-30 of it"] = 1.0

    @property
    def needed(self) -> float:
        """Share of a round's clients without which there is no sum."""
        return self.threshold if self.aggregation else 0.0


@dataclass(frozen=True)
class AggregateConfig:
    """What goes round the strategy on the server."""

    optimizer: Annotated[
        Literal["none", "momentum", "adam", "yogi", "adagrad"], "server optimizer of the aggregated step"
    ] = "none"
    lr: Annotated[float, Gt(0), "learning rate of the server optimizer"] = 1.0
    beta1: Annotated[float, Ge(0), Lt(1), "decay of the server optimizer's first moment"] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1), "decay of the server optimizer's second moment"] = 0.99
    tau: Annotated[float, Gt(0), "added to the root of the server optimizer's second moment"] = 1e-3
    robust: Annotated[
        Literal["none", "median", "trimmed_mean", "krum", "multi_krum", "norm_bound"],
        "robust aggregation, against clients that lie",
    ] = "none"
    trim: Annotated[float, Ge(0), Lt(0.5), "share of values trimmed_mean drops at either end"] = 0.1
    byzantine: Annotated[int, Ge(0), "clients that krum and multi_krum expect to lie"] = 1
    bound: Annotated[float, Ge(0), "largest norm of a client's step with norm_bound"] = 1.0
    offset_rank: Annotated[int, Ge(0), "cap on the offset's rank; 0: none, but 256 on a quantised base"] = 0


@dataclass(frozen=True)
class ClientConfig:
    """What a client goes by, whatever the server asks."""

    egress: Annotated[Names, "tensors that may leave it, as SIDE MODULE, with *"] = ("A *", "B *", "R *", "H *")
    models: Annotated[Names, "base models that a server may name, as hub ID or ID@REVISION, with *"] = ()
    code: Annotated[
        Names, "code that a server may name in train.loss, train.regulariser, train.optimizer: package.module:name, *"
    ] = ()
    stall: Annotated[
        float,
        Ge(0),
        "seconds without a forward pass after which a job is given up, and its worker started again; 0: never",
    ] = 3600.0


@dataclass(frozen=True)
class MessageConfig:
    """How the numbers travel."""

    up: Annotated[Encoding, "number type of a client's update; int8 has a scale for each row or column"] = "float32"
    feedback: Annotated[
        bool,
        (
            "error feedback: add the last round's rounding error to the next update (only for strategies that keep the "
            "factors)"
        ),
    ] = True
    down: Annotated[
        Literal["float32", "bfloat16"], "number type of what a client starts from; offsets stay float32"
    ] = "float32"


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    path: Annotated[str, "folder or hub id of the base model; empty: the small one that comes with fedlora"] = ""
    revision: Annotated[str, "branch, tag or commit of a hub id"] = ""
    task: Annotated[
        Literal["auto", "lm", "seq2seq", "classify", "regression", "multilabel", "image", "preference"],
        "what the model learns; auto: by the columns of the data",
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], "number type of the base model; adapters and heads are float32"
    ] = "float32"
    quantize: Annotated[Literal["none", "8bit", "4bit"], "quantisation of the base model, by bitsandbytes"] = "none"
    head: Annotated[Literal["shared", "local", "frozen"], "a classifier's head: who trains it"] = "shared"
    head_scale: Annotated[
        float, Gt(0), Le(1e4), "times the random output layer that a new head has; a frozen one needs 10 or so"
    ] = 1.0
    class_order: Annotated[
        Literal["checkpoint", "data"], "order of a classifier's outputs: its checkpoint's, if that has the same classes"
    ] = "checkpoint"
    dpo_beta: Annotated[float, Gt(0), Le(1e3), "beta of DPO: a higher one keeps the model nearer to the base"] = 0.1
    max_length: Annotated[int, Ge(8), "tokens in an example; longer text is cut, or split for language modelling"] = 128
    device: Annotated[str, "device that computes; auto: a GPU where there is one"] = "auto"


@dataclass(frozen=True)
class LoRAConfig:
    """The adapter that every client trains; a contradiction in it is a `ConfigError` where it is built."""

    kind: Annotated[
        Literal["lora", "dora", "vera"], "dora: magnitudes too; vera: two vectors a module, A, B shared"
    ] = "lora"
    rank: Annotated[int, Ge(1), "r"] = 8
    alpha: Annotated[float, Gt(0), Le(1e6), "a module computes (W + s B A) x with s = alpha / r"] = 16.0
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
    split: Annotated[
        Literal["content", "sample"],
        "who is held out: content (by a keyed hash of each example: one more moves no other), or a seeded sample",
    ] = "content"
    eval_limit: Annotated[int, Ge(0), "evaluate on so many examples of these, evenly spread; 0: on all"] = 0
    limit: Annotated[
        int, Ge(0), "use so many examples of data.path in all, over its files in proportion, and of data.eval; 0: all"
    ] = 0
    limit_takes: Annotated[
        Literal["sample", "first"],
        "which ones data.limit leaves: a sample by the seed, or the first so many of each file",
    ] = "sample"
    holdout_limit: Annotated[
        int, Ge(0), "held-out examples of a client that its model is measured on at most, evenly spread; 0: all"
    ] = 0
    cache: Annotated[
        str, "where encoded texts are kept between runs: auto (simulate: the user's cache; else nowhere), off, a folder"
    ] = "auto"
    text: Annotated[Names, "text column, or two for a pair; empty: found by name"] = ()
    label: Annotated[str, "label column"] = ""
    prompt: Annotated[str, "prompt column, or several with commas, in their order; the loss is on the response"] = ""
    response: Annotated[str, "response column"] = ""
    messages: Annotated[str, "chat column, in role/content or from/value; the loss is on the assistant's turns"] = ""
    template: Annotated[
        Literal["auto", "chat", "plain"],
        "prompt and response go through the model's chat template: auto (if it has one), chat, or plain (never)",
    ] = "auto"
    image: Annotated[str, "image column: files or image data"] = ""
    labels: Annotated[
        Names, "names of the classes in order, or of columns of 0 and 1 (multilabel); empty: as found in the data"
    ] = ()
    label_separator: Annotated[str, "what stands between several labels in a text (multilabel), as ; or |"] = ""

    @property
    def prompts(self) -> Names:
        """The columns of the prompt, in their order."""
        return tuple(filter(None, map(str.strip, self.prompt.split(","))))
