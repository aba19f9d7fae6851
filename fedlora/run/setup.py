"""The pieces of a run, made from its config: in a simulation, on a deployed server, and at one of its clients.

The three differ in the rows that they read (`federated.load`, `server_data`, `client_data`); what is made of the rows
is the same (`assemble`).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from fedlora import config as configuration
from fedlora.config import Config, absolute
from fedlora.data import federated
from fedlora.data.rows import Rows, stride, take
from fedlora.data.schema import Schema
from fedlora.data.summary import summarise
from fedlora.encoding.client_data import ClientData
from fedlora.encoding.examples import Example
from fedlora.encoding.row_cache import RowCache, user_folder
from fedlora.errors import ClientFailed, ConfigError, PrivacyError
from fedlora.kernels.evaluation import measure
from fedlora.kernels.precision import set_precision
from fedlora.lora import LoRA
from fedlora.messages.agreement import DATA, may_name
from fedlora.metrics import Metrics
from fedlora.models.model import Model
from fedlora.privacy.secure_aggregation import fewest_members

from .answers import AnswerEvaluation, answer_evaluation
from .asynchronous import check_buffer, refuse_simulated
from .client_ranks import ranks
from .directory import RunDirectory
from .own_code_checks import check_metric, check_training
from .preview import Preview, client_names, preview
from .run_files import file_hashes

ITS_OWN = (*DATA, "model.path", "model.revision")  # a client's to choose, whatever the run says
ELSEWHERE = "local:"  # before the name of a base model that lies in a folder of the server's


@dataclass(eq=False)
class RunSetup:
    """The pieces of a run that one process has: of all sides in a simulation, of one side in a deployment."""

    config: Config  # resolved: counts and labels as they are, paths absolute
    model: Model
    start: LoRA  # the adapter as PEFT made it
    clients_data: tuple[ClientData, ...]
    ranks: tuple[int, ...]  # of each client
    data: federated.Federated

    @property
    def evaluation_rows(self) -> Rows:
        """The global held-out rows."""
        return self.data.evaluation

    @cached_property
    def preview(self) -> Preview:
        """What this side is about to do; see `preview.preview`."""
        clients, names = self.clients_data, client_names(self.config.data, len(self.clients_data))
        if not clients and len(self.evaluation_rows):  # on a deployed server
            clients, names = (ClientData(self.model.encoder, self.evaluation_rows),), ["the evaluation"]
        return preview(summarise(self.data), self.model, clients, names)

    @cached_property
    def evaluation(self) -> Sequence[Example]:
        """The global held-out set, encoded; where data.eval_limit is set, so many of it, evenly spread."""
        rows, limit = self.evaluation_rows, self.config.data.eval_limit
        if self.data.schema.has_head:  # a row is an example there, so that the others need not be encoded
            rows = take(rows, range(0, len(rows), stride(len(rows), limit)))
        examples = self.model.encoder.examples(rows, named="held-out examples")
        return examples[:: stride(len(examples), limit)]

    @cached_property
    def answers(self) -> AnswerEvaluation | None:
        """How the global model's generated answers to held-out prompts are scored; none in a run without."""
        return answer_evaluation(self.model, self.config.eval, self.evaluation_rows)

    @cached_property
    def files(self) -> dict[str, str]:
        """The hash of every file that the run rests on, by its name; hashed once, when first asked for."""
        data = self.config.data
        reads_library = not data.path and (
            len(self.clients_data) > 0 or (not data.eval and len(self.evaluation_rows) > 0)
        )
        return file_hashes(self.config, base=self.model.fingerprint, reads_library=reads_library)

    def evaluate(self, lora: LoRA) -> Metrics:
        """The metrics of the global model, with this adapter, on the global held-out set."""
        self.model.set_adapter(lora)
        with self.model.measuring(self.config.eval.target_metric):
            return measure(self.model, self.evaluation)


def prepare(config: Config) -> RunSetup:
    """The pieces of a simulated run: the server's and every client's. The config comes back with nothing left open."""
    config = localise(config)
    rows = federated.load(config.data, config.model.task, clients=config.clients, seed=_deal_seed(config))
    config = resolve(config, rows.schema, len(rows.clients))
    setup = assemble(config, rows, ids=config.clients, cache=user_folder())
    check_training(setup.model, setup.start, config)
    return setup


def _deal_seed(config: Config) -> int:
    """The seed by which rows are dealt and held out.

    Where ledgers outlive the run it is the same in every run: each record stays with the client whose ledger it is in.
    """
    is_kept = config.dp.by_record and config.dp.ledger and config.data.split == "content"
    return 0 if is_kept else config.seed


def localise(config: Config) -> Config:
    """The config with absolute paths, in a process that computes on as many threads as it says."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return absolute(config)


def assemble(config: Config, rows: federated.Federated, ids: int, cache: Path | None = None) -> RunSetup:
    """The pieces that one side of a run makes of its rows: the model, each client's examples, every client's rank.

    `ids` is one more than the highest number of a client; each number below it has a rank. `cache` is where encoded
    rows are kept, if the settings do not say; nowhere in a deployment.
    """
    check_metric(config.eval.target_metric)
    public = federated.public_rows(config.lora.init_data, rows.schema)
    model = Model(config.model, config.lora, rows.schema, config.seed, public)
    folders = {"auto": cache, "off": None}
    kept = RowCache(folders.get(config.data.cache, Path(config.data.cache)))
    model.encoder = replace(model.encoder, cache=kept)
    set_precision(model, config.precision)
    heldout = rows.heldout or ((),) * len(rows.clients)
    unit = config.dp.unit if config.dp.by_record else "row"  # to count examples is to encode them
    shares = zip(rows.clients, heldout, strict=True)
    own = partial(ClientData, model.encoder, unit=unit, dealt=rows.dealt, heldout_limit=config.data.holdout_limit)
    clients_data = tuple(own(train, held) for train, held in shares)
    memory = partial(model.memory, batch_size=config.train.batch_size)
    dealt = ranks(config.lora.ranks, largest=config.lora.rank, clients=ids, seed=config.seed, memory=memory)
    return RunSetup(config, model, model.get_adapter(), clients_data, tuple(dealt), rows)


def resolve(config: Config, schema: Schema, clients: int) -> Config:
    """The settings with counts and labels as they are. Raises `ConfigError` or `PrivacyError` where they contradict."""
    cohort = _cohort(config, clients)
    if config.dp.on:
        _refuse_what_is_not_private(config)
    if config.secure.aggregation:
        _refuse_what_cannot_be_hidden(config, cohort=cohort, clients=clients)
    check_buffer(replace(config, clients=clients, cohort=cohort))
    return replace(
        config,
        clients=clients,
        cohort=cohort,
        engine=configuration.engine_of(config),
        data=replace(config.data, labels=schema.labels),
        model=replace(config.model, task=_task(config.model.task, schema), dtype=_dtype(config)),
    )


def _dtype(config: Config) -> Any:
    """The number type of the base, which the precision may say."""
    return "bfloat16" if config.precision == "bf16" else config.model.dtype


def _task(task: str, schema: Schema) -> Any:
    """What the model learns, which is found in the data where the settings leave it open.

    It is written down only where a client could not find it in its own: none of its numbers may have a fraction.
    """
    found = {"number": "regression", "labels": "multilabel", "class": task}
    return found[schema.target] if task == "auto" else task


def _cohort(config: Config, clients: int) -> int:
    """How many clients are asked in a round: as many as the settings say, or a fifth of all."""
    if config.cohort > clients:
        raise ConfigError(
            f"cohort = {config.cohort} is more than the {clients} clients there are; choose {clients} or fewer"
        )
    fewest = fewest_members(config.secure.colluders) if config.secure.aggregation else 2
    return config.cohort or min(max(fewest, clients // 5), clients)


def _refuse_what_cannot_be_hidden(config: Config, cohort: int, clients: int) -> None:
    """Raise `PrivacyError` for what secure aggregation leaves no room for."""
    fewest = fewest_members(config.secure.colluders)
    if cohort < fewest:
        raise PrivacyError(
            f"secure.aggregation hides a client among {fewest} or more where {config.secure.colluders} may be in "
            f"league with the server (secure.colluders), and {cohort} of {clients} would be in a round; raise cohort, "
            "or have more clients"
        )
    if config.exactness:
        raise PrivacyError("exactness needs every client's update, which secure.aggregation hides; leave it out")


def _refuse_what_is_not_private(config: Config) -> None:
    """Raise `PrivacyError` for what would leave a client with no noise on it."""
    if config.data.holdout and not config.dp.metrics:
        raise PrivacyError(
            f"data.holdout = {config.data.holdout:g} lets clients tell scores on their own data, with no noise on "
            "them; leave it out, or say dp.metrics = true"
        )
    if config.exactness and config.dp.by_client:
        raise PrivacyError("exactness needs every client's update, which dp.level = client hides; leave it out")


@dataclass(frozen=True, eq=False)
class ClientSetup:
    """One client's pieces of a run: the model, its own examples and its rank."""

    model: Model
    client_data: ClientData
    rank: int
    preview: Preview


def for_server(config: Config, ids: int) -> RunSetup:
    """The server's pieces of a deployed run; `ids` is one more than the highest number of a client."""
    refuse_simulated(config)
    config = localise(replace(config, engine="flower"))
    embedded = not (config.model.path or config.data.path)  # the small model and text that come with fedlora
    rows = federated.server_data(config.data, config.model.task, embedded)
    return assemble(resolve(config, rows.schema, config.clients), rows, ids)


def reopen(folder: RunDirectory, config: Config) -> RunSetup:
    """The pieces of the run in a folder; of a deployed run those of its server, which has no clients' data.

    Raises `ConfigError` where the base model is not the one that the run began with.
    """
    deployed = (folder.path / "flower").is_dir()
    setup = for_server(config, config.clients) if deployed else prepare(config)
    folder.check_files(setup.files, of="model.path")
    return setup


def for_client(settings: Mapping[str, Any], mine: Mapping[str, Any], id: int, key: bytes | None = None) -> ClientSetup:
    """One client's pieces of a deployed run, by the run's settings under those that are the client's own to choose.

    Which of its rows are held out depends on its secret key; without one, on the run's seed.
    Raises `ConfigError`, `DataError` or `ModelError` for what the client itself has to mend.
    """
    config = localise(_merged(settings, mine))
    if id >= config.clients and not config.data.path:
        raise ClientFailed(f"client {id} has no share of the embedded data of {config.clients} clients; give it --data")
    rows = federated.client_data(
        config.data, config.model.task, id=id, clients=config.clients, seed=config.seed, key=key
    )
    setup = assemble(config, rows, ids=max(id + 1, config.clients))
    return ClientSetup(setup.model, setup.clients_data[0], setup.ranks[id], setup.preview)


def _merged(settings: Mapping[str, Any], mine: Mapping[str, Any]) -> Config:
    """The run's settings under the client's own. What its data are, and mean, it takes from itself alone."""
    fixed = {*ITS_OWN, "dp.unit"} if mine.get("data.path") else {*ITS_OWN}
    run = {key: value for key, value in settings.items() if may_name(key) and key not in fixed}
    if run.get("lora.init") in ("eva", "pissa", "olora"):  # the factors come with the job, whatever they are
        run["lora.init"] = "kaiming"
    own = {key: value for key, value in mine.items() if _shapes_data(key)}
    return configuration.build(run, own, _base(settings, mine))


def _shapes_data(key: str) -> bool:
    """Whether a client's own setting changes its model or data; the others say what it insists on (`client_policy`)."""
    return key == "dp.unit" or not key.startswith(("secure.", "client.", "dp."))


def _base(run: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, str]:
    """Where the base model is for this client, and its revision: as it says itself, or else as was agreed."""
    if path := mine.get("model.path"):
        return {"model.path": str(path), "model.revision": str(mine.get("model.revision", ""))}
    path = str(run.get("model.path", ""))
    if path.startswith(ELSEWHERE):
        raise ConfigError(
            f"the server has the base model in a folder of its own, {path.removeprefix(ELSEWHERE)}; give --model the "
            "folder of the same files here"
        )
    return {"model.path": path, "model.revision": str(run.get("model.revision", ""))}


def mute_transformers() -> None:
    """Have transformers log errors alone and show no bars of its own, and Python no warnings of what is to change."""
    from transformers.utils import logging as noise

    said: Any = noise  # untyped
    warnings.filterwarnings("ignore", category=FutureWarning)
    said.set_verbosity_error()
    said.disable_progress_bar()
