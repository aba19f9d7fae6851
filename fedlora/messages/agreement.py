"""The agreement of a run: what its server says, once, that it will ask of a client.

A client holds it against its own policy, shows it to its operator in words and keeps it. Its hash is in every later
message of the run, and a job that differs from it in an agreed point is refused, whatever else would allow it.

Training settings are agreed as the run has them; a strategy may still give a client another learning rate or number of
steps, within the bounds of the messages. What privacy rests on may not differ.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.errors import ConfigError, WireError
from fedlora.jobs import Job, PrivacyTerms, sent_sides

from .envelope import to_json

SECTIONS = ("model.", "lora.", "train.", "dp.", "secure.", "messages.", "personal.")  # whose settings a server may name
SINGLE = ("strategy", "rounds", "clients", "seed", "precision")  # and settings beside the sections
COLUMNS = ("data.text", "data.label", "data.prompt", "data.response", "data.messages", "data.image")
LABELS = ("data.labels", "data.label_separator")
DATA = (*COLUMNS, "data.template", *LABELS, "data.holdout")  # named to a client, and never taken from a server
OWN = ("lora.init_data", "dp.ledger", "dp.budget", "model.device")  # of the machine that has them
LATER = ("train.loss", "train.regulariser")  # settings of later versions, left out where they are empty
STAGES = tuple(s.key for s in configuration.settings() if s.key.startswith("personal."))
MAY_CHANGE = ("rounds", *STAGES)  # when a run is resumed; the client is shown the new agreement
MOST = {"lora.rank": 4096, "model.max_length": 131_072, "clients": 1_000_000, "rounds": 1_000_000}
DELTA = 1e-5  # largest delta of a run that names none

Plain = bool | int | Annotated[float, Field(allow_inf_nan=True)] | Annotated[str, Field(max_length=2000)]
Sides = Annotated[str, Field(pattern="^[ABRDH]{0,5}$")]


def may_name(key: str) -> bool:
    """Whether an agreement may have this setting."""
    return key in (*SINGLE, *DATA) or (key.startswith(SECTIONS) and key not in OWN)


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", ser_json_inf_nan="constants"))
class RunAgreement:
    """The settings of a run by which its clients go, and the sides of the adapter that it may ever ask for."""

    settings: Annotated[dict[str, Plain], Field(max_length=200)] = Field(default_factory=dict)  # by dotted key
    trains: Sides = ""  # the sides that a job may train, in any round
    shares: Sides = ""  # the sides that a job may have sent back
    keeps_rank: Annotated[int, Field(ge=0, le=4096)] = 0  # rows of the rank that every job leaves with its client
    base: Annotated[str, Field(pattern="^[0-9a-f]{0,64}$")] = ""  # fingerprint of the base model; none: any

    @cached_property
    def hash(self) -> str:
        """The name of this agreement, which every message of the run carries."""
        return sha256(to_json(self)).hexdigest()

    @cached_property
    def config(self) -> Config:
        """The settings, built. Raises `WireError` for a setting that no agreement may have, or out of its bounds."""
        for key in self.settings:
            if not may_name(key):
                raise WireError("the server names a setting that is no part of an agreement")
        try:
            built = configuration.build(self.settings)
        except ConfigError as e:
            raise WireError(f"the settings of the agreement do not go together: {e}") from e
        for key, most in MOST.items():
            if float(self.settings.get(key, 0)) > most:
                raise WireError(f"the agreement has {key} = {self.settings[key]}; the most is {most}")
        return built

    @property
    def asks_loss(self) -> bool:
        """May clients be asked for their training loss?"""
        return not self.config.dp.on or self.config.dp.metrics

    @property
    def asks_scores(self) -> bool:
        """Will clients be asked for scores on their held-out examples?"""
        return self.config.data.holdout > 0

    def differences(self, other: "RunAgreement") -> list[str]:
        """What differs in another agreement, by name, leaving out what may change when a run is resumed."""
        mine, theirs = (self.settings, other.settings)
        keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        rest = [
            name for name in ("trains", "shares", "keeps_rank", "base") if getattr(self, name) != getattr(other, name)
        ]
        return [key for key in keys if key not in MAY_CHANGE] + rest

    def broken_by(self, job: Job) -> list[str]:
        """The agreed points in which a job differs, each as a phrase; none for a job as it was agreed."""
        rest = [*self._told(job), *self._privacy(job.privacy)] if job.stage == "round" else self._stage(job)
        return [*self._sides(job), *self._course(job), *self._code(job), *rest]

    def _sides(self, job: Job) -> Iterator[str]:
        if not set(job.trains) <= set(self.trains):
            yield f"trains {job.trains}, agreed were {self.trains}"
        if not set(sent_sides(job)) <= set(self.shares):
            yield f"has {sent_sides(job)} sent back, agreed were {self.shares}"
        if job.keeps_rank < self.keeps_rank:
            yield f"leaves {job.keeps_rank} rows of the rank here, agreed were {self.keeps_rank}"

    def _stage(self, job: Job) -> Iterator[str]:
        """What was not agreed of work that is for the client's own use, of which nothing is told or sent."""
        personal = self.config.personal
        if job.stage == "personal" and not 0 < job.training.steps <= personal.steps:
            yield f"has {job.training.steps} steps done after the rounds, agreed were {personal.steps}"
        if job.stage == "alone" and not personal.alone:
            yield "has a model trained alone, which was not agreed"
        if job.metrics or job.privacy or job.masking:
            yield "asks for word of what a client does for its own use"

    def _course(self, job: Job) -> Iterator[str]:
        if job.rounds != self.config.rounds or not 0 <= job.round < job.rounds:
            yield f"is of round {job.round + 1} of {job.rounds}, agreed were {self.config.rounds}"
        if job.upload not in ("float32", self.config.messages.up):
            yield f"has the update sent as {job.upload}, agreed was {self.config.messages.up}"

    def _told(self, job: Job) -> Iterator[str]:
        if job.metrics and not self.asks_loss:
            yield "asks for the training loss, which was not agreed"
        if (job.masking is None) == self.config.secure.aggregation:
            yield "masks the update where that was not agreed, or does not where it was"

    def _code(self, job: Job) -> Iterator[str]:
        agreed = self.config.train.own_code
        for key, path in job.training.own_code.items():
            if agreed.get(key) != path:
                yield f"runs {key} = {path}, which was not agreed"

    def _privacy(self, terms: PrivacyTerms | None) -> Iterator[str]:
        dp = self.config.dp
        if (terms is None) == dp.by_record:
            yield "has DP-SGD where that was not agreed, or none where it was"
        if terms is None:
            return
        if (terms.clip, terms.head_share, terms.engine, terms.seeded) != (dp.clip, dp.head_share, dp.engine, dp.seeded):
            yield "clips, or draws its noise, other than was agreed"
        if terms.delta > (dp.delta or DELTA):
            yield f"has delta = {terms.delta:g}, agreed was {dp.delta or DELTA:g}"
        if terms.noise < dp.noise:
            yield f"has noise = {terms.noise:g}, agreed was {dp.noise:g}"

    def words(self) -> list[str]:
        """The agreement as lines for whoever answers for the client's data."""
        config = self.config
        rank = f"{config.lora.kind} of rank {config.lora.rank}"
        model = config.model.path or "the small model that comes with fedlora"
        lines = [
            f"{config.strategy}, {config.rounds} rounds, {rank} on {model}",
            f"trained here: {_sides(self.trains)}; sent back: {_sides(self.shares)}"
            + (f", without the last {self.keeps_rank} of the rank's rows" if self.keeps_rank else ""),
            f"privacy of records: {self._privacy_in_words()}",
            f"training loss: {'told' if self.asks_loss else 'not told'}; "
            f"scores on held-out examples: {'asked for' if self.asks_scores else 'none'}",
            f"secure aggregation: {'yes' if config.secure.aggregation else 'no'}; agreement {self.hash[:12]}",
            *(f"code run here: {key} = {path}" for key, path in config.train.own_code.items()),
        ]
        return lines + [self._stages_in_words()] * config.personal.on

    def _stages_in_words(self) -> str:
        personal = self.config.personal
        steps = f"{personal.steps} steps from the model that it has" if personal.steps else ""
        alone = "a model trained alone, as long as the run" if personal.alone else ""
        work = "; ".join(filter(None, (steps, alone)))
        return f"after the rounds, for this client's own use: {work}; nothing of it is sent"

    def _privacy_in_words(self) -> str:
        dp = self.config.dp
        if not dp.by_record:
            return "none by DP-SGD" + (", the server adds noise to sums of clients" if dp.by_client else "")
        noise = f"epsilon {dp.epsilon:g}" if not dp.noise else f"noise {dp.noise:g}"
        seeded = "; noise from a seed: NOT PRIVATE" if dp.seeded else ""
        return f"DP-SGD by {dp.unit}, {noise}, delta {dp.delta or DELTA:g} at most, clip {dp.clip:g}{seeded}"


def _sides(sides: str) -> str:
    return ", ".join(sides) or "nothing"


def agreed_settings(settings: Mapping[str, Plain]) -> dict[str, Plain]:
    """Those of a run's settings that its agreement has.

    A precision is named only where `model.dtype` does not say it, stages after the rounds and code of one's own only
    where there are any, as there are clients that do not know these settings.
    """
    said = {key: value for key, value in settings.items() if may_name(key)}
    return {key: value for key, value in said.items() if key not in _unsaid(said)}


def _unsaid(said: Mapping[str, Plain]) -> set[str]:
    """The settings that are left out, as they say no more than their being left out does."""
    stages = () if any(said.get(key) for key in ("personal.steps", "personal.alone")) else STAGES
    precision = () if said.get("precision") == "mixed" else ("precision",)
    return {*stages, *precision, *(key for key in LATER if not said.get(key))}
