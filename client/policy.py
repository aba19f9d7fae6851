"""A client's policy: what its own settings allow a server to ask for, whatever the job says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Any

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.errors import PrivacyError
from fedlora.jobs import Job


@dataclass(frozen=True)
class Own:
    """What a client insists on, whatever a server asks of it."""

    ledgers: Path | None = None  # where its ledger lies, if not with what else it keeps: a folder that outlives the run
    budget: float = inf  # epsilon that it lets its data be charged with, over all runs of one ledger
    private: bool = False  # it trains by DP-SGD, or not at all
    seeded: bool = True  # noise may come from the run's seed
    metrics: bool = True  # its training loss may be told
    masked: bool = False  # its update leaves it under a mask, or not at all
    egress: tuple[str, ...] = ("*",)  # tensors that may leave it, as `SIDE MODULE`, with *

    def refuse(self, job: Job, records: int) -> None:
        """Raise `PrivacyError` for a job that asks for less privacy than this client wants, or for more tensors."""
        p = job.privacy
        wrong = {
            "no DP-SGD, and dp.epsilon or dp.noise is set here": self.private and p is None,
            "noise from a seed, and dp.seeded is not set here": p is not None and p.seeded and not self.seeded,
            "its training loss, and dp.metrics is not set here": job.metrics and not self.metrics,
            "an update without a mask, and secure.aggregation is set here": self.masked and job.masking is None,
            f"delta = {p.delta if p else 0:g}, which is not below 1/N of the {records} records here": (
                p is not None and p.delta >= 1 / max(records, 1)
            ),
        }
        for what in (what for what, asked in wrong.items() if asked):
            raise PrivacyError(f"the server asks for {what}; have it ask for what was agreed, or leave the run")
        for tensor in (f"{s} {m}" for s in job.shares for m in job.start.side(s)):
            if not any(fnmatchcase(tensor, pattern) for pattern in self.egress):
                raise PrivacyError(f'the server asks for "{tensor}", which client.egress does not let out of here')


def insists(mine: Mapping[str, Any], ledgers: Path) -> Own:
    """What a client insists on, by its own settings alone; its ledgers outlive every run."""
    config = configuration.build(mine)
    where = Path(config.dp.ledger).expanduser() if config.dp.ledger else ledgers
    return replace(own(config), ledgers=where, seeded=config.dp.seeded)


def own(config: Config) -> Own:
    """What clients with these settings insist on."""
    dp, metrics = config.dp, not config.dp.on or config.dp.metrics
    folder = Path(dp.ledger) if dp.ledger else None
    seeded, masked = not dp.on or dp.seeded, config.secure.aggregation
    return Own(folder, dp.limit, dp.by_record, seeded, metrics, masked, config.client.egress)
