"""A client's policy: what its own settings allow a server to ask for, whatever the job says."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Any

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.errors import PrivacyError
from fedlora.jobs import Job, PrivacyTerms


@dataclass(frozen=True, kw_only=True)
class ClientPolicy:
    """What a client allows a server to ask of it."""

    ledgers: Path | None = None  # where its ledger lies, if not with what else it keeps: a folder that outlives the run
    budget: float = inf  # most epsilon that its data may be charged with, over all runs of one ledger
    private: bool = False  # the client trains by DP-SGD, or not at all
    seeded: bool = True  # noise may come from the run's seed
    metrics: bool = True  # its training loss may be told
    masked: bool = False  # its update leaves the client under a mask, or not at all
    egress: tuple[str, ...] = ("*",)  # tensors that may leave the client, as `SIDE MODULE`, with *

    def refuse(self, job: Job, records: int) -> None:
        """Raise `PrivacyError` for a job that asks for less privacy than this client wants, or for more tensors."""
        for asked in self._too_little_privacy(job, records):
            raise PrivacyError(f"the server asks for {asked}; have it ask for what was agreed, or leave the run")
        for tensor in _shared_tensors(job):
            if not any(fnmatchcase(tensor, pattern) for pattern in self.egress):
                raise PrivacyError(f'the server asks for "{tensor}", which client.egress does not let out of here')

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
        if terms.delta >= 1 / max(records, 1):
            yield f"delta = {terms.delta:g}, which is not below 1/N of the {records} records here"


def _shared_tensors(job: Job) -> Iterator[str]:
    """The names of all tensors that the job wants back, as `SIDE MODULE`."""
    for side in job.shares:
        for module in job.start.side(side):
            yield f"{side} {module}"


def client_policy(mine: Mapping[str, Any], ledgers: Path) -> ClientPolicy:
    """The policy of a deployed client, by its own settings alone; its ledgers outlive every run."""
    config = configuration.build(mine)
    where = Path(config.dp.ledger).expanduser() if config.dp.ledger else ledgers
    return replace(policy_of(config), ledgers=where, seeded=config.dp.seeded)


def policy_of(config: Config) -> ClientPolicy:
    """The policy of clients with these settings."""
    dp = config.dp
    return ClientPolicy(
        ledgers=Path(dp.ledger) if dp.ledger else None,
        budget=dp.limit,
        private=dp.by_record,
        seeded=not dp.on or dp.seeded,
        metrics=not dp.on or dp.metrics,
        masked=config.secure.aggregation,
        egress=config.client.egress,
    )
