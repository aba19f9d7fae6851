"""The clients of a run on this machine: what each has, and what each does by itself, whatever engine trains them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedlora.client.policy import ClientPolicy, policy_of
from fedlora.client.runner import JobRunner
from fedlora.client.training import EvaluationTask
from fedlora.config import Config
from fedlora.encoding.client_data import ClientData
from fedlora.errors import ClientFailed, DataError, Failure, LedgerError, PrivacyError, SecureError
from fedlora.jobs import Charge, Client, Job, SecAggStep
from fedlora.messages.parts import Parts, PartTracker, job_hash, part_names
from fedlora.storage.own_model import own_model

REFUSALS = ClientFailed, DataError, LedgerError, PrivacyError, SecureError  # one client's; the round goes on without it

MakeRunner = Callable[[int, ClientData, Path, ClientPolicy], JobRunner]


@dataclass(frozen=True, eq=False)
class LocalClients:
    """All clients of a run; nothing is made for one before it is asked."""

    clients_data: Sequence[ClientData]
    ranks: Sequence[int]
    folder: Path  # with a folder for each
    policy: ClientPolicy
    make: MakeRunner = JobRunner  # makes the runner of each job; an audit has others

    @cached_property
    def known(self) -> tuple[Client, ...]:
        """All clients, with their counts and ranks."""
        shares = zip(self.clients_data, self.ranks, strict=True)
        return tuple(client_data.client(i, rank) for i, (client_data, rank) in enumerate(shares))

    def runner(self, i: int) -> JobRunner:
        """What does the jobs of client i."""
        return self.make(i, self.clients_data[i], self.folder / str(i), self.policy)

    def ask(self, asks: Mapping[int, SecAggStep]) -> dict[int, Mapping[str, str] | Failure]:
        """Have each client do its step of secure aggregation; the result is what each says."""
        return {i: self._reply(i, ask) for i, ask in asks.items()}

    def _reply(self, i: int, ask: SecAggStep) -> Mapping[str, str] | Failure:
        try:
            return self.runner(i).reply(ask)
        except SecureError as e:
            return Failure.because_of(e)

    def own_models(self, jobs: Mapping[int, Job], traffic: PartTracker) -> Iterator[EvaluationTask]:
        """Yield each job's model, with what its client keeps, and that client's held-out examples."""
        parts = Parts()
        for i, job in jobs.items():
            send(traffic, parts, i, job)
            own, kept = own_model(job, self.folder / str(i))
            yield EvaluationTask(own, self.clients_data[i].heldout, kept)


def send(traffic: PartTracker, parts: Parts, client: int, job: Job) -> str:
    """Count a job as sent to its client; return the job's name."""
    own_parts = parts.of(job)
    traffic.send(client, own_parts)
    return job_hash(job, **part_names(own_parts))


def charges_in_ledgers(config: Config, clients_data: Sequence[ClientData], folder: Path) -> dict[int, list[Charge]]:
    """What every client's ledger holds, of this run and of others; one that is not whole is its client's to refuse.

    `folder` is where clients keep what is theirs, ledgers too where dp.ledger names no other folder.
    """
    charged: dict[int, list[Charge]] = {}
    policy = policy_of(config)
    for i, data in enumerate(clients_data if config.dp.by_record else ()):
        with suppress(LedgerError):
            charged[i] = JobRunner(i, data, folder / str(i), policy).ledger.charges()
    return {i: charges for i, charges in charged.items() if charges}
