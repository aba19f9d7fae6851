"""A client's policy: what a server may ask of this client. It is complete before the client connects.

Every field comes from the client's own settings, and nothing that a server says can widen one. It is applied
four times:

    refuse_agreement    when the client joins a run, to all that the run will ask for
    refuse              to every job, before anything is trained or charged
    refuse_evaluation   to every evaluation, before the model sees a held-out example
    refuse_update       to what is about to leave, tensor by tensor

What is refused reaches the server as a code; the sentence stays on this machine.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Any

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.errors import PolicyRefusal
from fedlora.jobs import Job, PrivacyTerms, sent_sides, shared_start
from fedlora.messages.agreement import COLUMNS, RunAgreement
from fedlora.sections import DataConfig, PrivacyConfig, Training

DELTA = 1e-5  # of a client that names none
FEWEST_SCORED = 10  # held-out examples, or records of a private job, of which a deployed client tells figures


@dataclass(frozen=True, kw_only=True)
class ClientPolicy:
    """What a client allows a server to ask of it."""

    # What leaves
    egress: tuple[str, ...] = ("*",)  # tensors that may leave the client, as `SIDE MODULE`, with *
    masked: bool = False  # its update leaves the client under a mask, or not at all
    colluders: int = 1  # other clients that may be in league with the server: no roster that fewer undo is joined
    metrics: bool = True  # its training loss, and scores on held-out examples, may be told
    fewest_scored: int = 1  # held-out examples, or records of a private job, without which nothing of them is told

    # Differential privacy of its records
    private: bool = False  # the client trains by DP-SGD, or not at all
    budget: float = inf  # most epsilon that its data may be charged with, over all runs of one ledger
    delta: float = 1.0  # at which epsilon is reckoned here; a job with a larger one is refused
    noise: float = 0.0  # least noise over clip
    unit: str = "row"  # what a record is
    seeded: bool = True  # noise may come from the run's seed
    ledgers: Path | None = None  # where its ledger lies, if not with what else it keeps: a folder that outlives the run
    marks: Path | None = None  # a folder elsewhere in which each ledger has its mark

    # Its data and model
    data: DataConfig | None = None  # where its data are and what their columns mean; none: nothing is held against it
    model: str = ""  # folder or hub id of its base model
    models: tuple[str, ...] = field(default=("*",))  # base models that a server may name, as ID or ID@REVISION
    code: tuple[str, ...] = field(default=("*",))  # code that a server may have it run in its training, by path

    def refuse_agreement(self, agreement: RunAgreement) -> None:
        """Raise `PolicyRefusal` for a run that will ask for what this client does not allow."""
        wrong = [*self._too_open(agreement), *self._not_its_data(agreement), *self._not_its_model(agreement)]
        wrong += self._not_its_code(agreement.config.train)
        if wrong:
            raise PolicyRefusal(f"this run asks for {'; and for '.join(wrong)}")

    def refuse(self, job: Job, records: int) -> None:
        """Raise `PolicyRefusal` for a job that asks for less privacy than this client wants, or for more tensors."""
        terms = self._too_little_privacy(job, records) if job.stage == "round" else _word_of_own_use(job)
        for asked in (*terms, *self._not_its_code(job.training)):
            raise PolicyRefusal(f"the server asks for {asked}; have it ask for what was agreed, or leave the run")
        self.refuse_update(_asked_tensors(job))

    def refuse_evaluation(self, heldout: int) -> None:
        """Raise `PolicyRefusal` for an evaluation on so many held-out examples, where no scores may be told."""
        if self.masked:
            raise PolicyRefusal("the server asks for scores, and secure.aggregation is set here: they have no mask")
        if not self.metrics:
            raise PolicyRefusal("the server asks for scores, and dp.metrics is not set here: they have no noise")
        if heldout < self.fewest_scored:
            raise PolicyRefusal(
                f"the server asks for scores on {heldout} held-out examples, and fewer than {self.fewest_scored} tell "
                "too much of each; raise data.holdout here, or leave it at 0 and have none told"
            )

    def refuse_update(self, names: Iterable[str]) -> None:
        """Raise `PolicyRefusal` for a tensor that may not leave, as `SIDE MODULE`."""
        for name in names:
            if not any(fnmatchcase(name, pattern) for pattern in self.egress):
                raise PolicyRefusal(f'the server asks for "{name}", which client.egress does not let out of here')

    def _too_open(self, agreement: RunAgreement) -> Iterator[str]:
        """What a run asks for in spite of this client's privacy."""
        if agreement.config.dp.by_record:
            yield from self._weak_guarantee(agreement.config.dp)
        elif self.private:
            yield "no DP-SGD, and dp.epsilon or dp.noise is set here"
        if agreement.asks_loss and not self.metrics:
            yield "the training loss, and dp.metrics is not set here"
        if self.masked and not agreement.config.secure.aggregation:
            yield "updates without a mask, and secure.aggregation is set here"

    def _weak_guarantee(self, dp: PrivacyConfig) -> Iterator[str]:
        """What a run's DP-SGD protects less than this client wants."""
        if self._has_data and dp.unit != self.unit:
            yield f"privacy of each {dp.unit}, and dp.unit = {self.unit} here: say --dp.unit {dp.unit} to agree to it"
        if dp.seeded and not self.seeded:
            yield "noise from a seed, and dp.seeded is not set here"

    def _not_its_data(self, agreement: RunAgreement) -> Iterator[str]:
        """Columns and classes that a run names, and the client has not named itself."""
        if not self._has_data:
            return
        theirs, mine = configuration.flatten(agreement.config), configuration.flatten(self.data, "data.")
        for key in COLUMNS:
            if theirs[key] and not mine[key]:
                yield f"{key} = {_plain(theirs[key])}, which is not set here: say --{key} to agree to a column"
        if theirs["data.labels"] and theirs["data.labels"] != mine["data.labels"]:
            yield (
                f"the classes {_plain(theirs['data.labels'])}, in this order, and here are "
                f"{_plain(mine['data.labels']) or 'none'}: say --data.labels to agree to them"
            )

    def _not_its_model(self, agreement: RunAgreement) -> Iterator[str]:
        """The base model that a run names, where this client has not allowed it."""
        model = agreement.config.model
        if self.model or not model.path:
            return
        name = f"{model.path}@{model.revision}" if model.revision else model.path
        if not any(fnmatchcase(name, pattern) for pattern in self.models):
            yield f"the base model {name}: say --model with a folder or an id here, or name it in client.models"

    def _not_its_code(self, training: Training) -> Iterator[str]:
        """The code that a run names for a client's training, where this client has not named it."""
        for key, path in training.own_code.items():
            if not any(fnmatchcase(path, pattern) for pattern in self.code):
                yield f"{key} = {path}, which is not named in client.code here: code runs as you, so read it first"

    @property
    def _has_data(self) -> bool:
        """Has the client data of its own, and not a share of the public ones that come with fedlora?"""
        return self.data is not None and bool(self.data.path)

    def mark_of(self, ledger: str) -> Path | None:
        """The file that knows how far the ledger in a folder of this name has come; it lies elsewhere."""
        return self.marks / f"{ledger}.head" if self.marks else None

    def _too_little_privacy(self, job: Job, records: int) -> Iterator[str]:
        """Every reason to refuse the job, as a phrase that completes "the server asks for"."""
        if self.private and job.privacy is None:
            yield "no DP-SGD, and dp.epsilon or dp.noise is set here"
        if job.privacy:
            yield from self._weak_terms(job.privacy, records)
        if job.metrics and not self.metrics:
            yield "its training loss, and dp.metrics is not set here"
        if self.masked and job.masking is None:
            yield "an update without a mask, and secure.aggregation is set here"

    def _weak_terms(self, terms: PrivacyTerms, records: int) -> Iterator[str]:
        """What these terms of DP-SGD lack."""
        if terms.seeded and not self.seeded:
            yield "noise from a seed, and dp.seeded is not set here"
        if terms.noise < self.noise:
            yield f"noise = {terms.noise:g}, and dp.noise = {self.noise:g} here"
        if terms.delta > self.delta:
            yield f"delta = {terms.delta:g}, and dp.delta = {self.delta:g} here"
        if terms.delta >= 1 / max(records, 1):
            yield f"delta = {terms.delta:g}, which is not below 1/N of the {records} records here"


def _word_of_own_use(job: Job) -> Iterator[str]:
    """What a stage for the client's own use may not ask; it needs neither noise nor mask, as nothing of it leaves."""
    if job.metrics or job.privacy or job.masking:
        yield "word of what this client does for its own use"


def _asked_tensors(job: Job) -> Iterator[str]:
    """The names of all tensors of which the job wants something back, as `SIDE MODULE`.

    A projection of a product tells of both factors, whichever of the two it travels as.
    """
    for side, module, _ in shared_start(job).over(job.start.only(sent_sides(job))).matrices():
        yield f"{side} {module}"


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def client_policy(mine: Mapping[str, Any], ledgers: Path) -> ClientPolicy:
    """The policy of a deployed client, by its own settings alone; its ledgers outlive every run."""
    config = configuration.build(mine)
    where = Path(config.dp.ledger).expanduser() if config.dp.ledger else ledgers
    return replace(
        policy_of(config),
        ledgers=where,
        marks=ledgers.with_name("ledger-marks"),
        seeded=config.dp.seeded,
        delta=config.dp.delta or DELTA,
        noise=config.dp.noise,
        unit=config.dp.unit,
        fewest_scored=FEWEST_SCORED,
        data=config.data,
        model=config.model.path,
        models=config.client.models,
        code=config.client.code,
    )


def policy_of(config: Config) -> ClientPolicy:
    """The policy of clients that are simulated with these settings, which are their own and the server's in one."""
    dp = config.dp
    ledgers = Path(dp.ledger) if dp.ledger else None
    return ClientPolicy(
        egress=config.client.egress,
        masked=config.secure.aggregation,
        colluders=config.secure.colluders,
        metrics=not dp.on or dp.metrics,
        private=dp.by_record,
        budget=dp.limit,
        delta=dp.delta or 1.0,
        unit=dp.unit,
        seeded=not dp.on or dp.seeded,
        ledgers=ledgers,
        marks=ledgers.with_name(f"{ledgers.name}-marks") if ledgers else None,
    )
