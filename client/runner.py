"""A client's jobs, done with its own data, its own policy and what it keeps on its own disk.

What a client does around its training is a generator (`JobRunner.steps`), which stops where there is something to be
trained and goes on with what came of it. So one client can be trained by itself, or many of them in one pass.
"""

import logging
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora.client import training
from fedlora.client.egress import check_start
from fedlora.client.ledger import Ledger
from fedlora.client.ledger_records import ledger_folder
from fedlora.client.policy import ClientPolicy
from fedlora.client.scored_rounds import ScoredRounds
from fedlora.client.secure_aggregation import SecAggClient
from fedlora.client.training import Outcome, TrainingTask, trained
from fedlora.encoding.client_data import ClientData
from fedlora.encoding.encoder import Records
from fedlora.errors import FedloraError, PrivateJobFailed
from fedlora.jobs import Job, PrivacyTerms, SecAggStep, Update
from fedlora.lora import LoRA
from fedlora.messages.compression import compress_with_error_feedback
from fedlora.messages.parts import hash_parts_and_job
from fedlora.messages.sketch import scatter_rows, select_rows
from fedlora.metrics import Metrics
from fedlora.models.model import Model
from fedlora.privacy import preflight
from fedlora.privacy.dpsgd import STANDARD, Mechanism
from fedlora.storage.client_state import CachedReply, ClientState, earlier_job_hash

log = logging.getLogger("fedlora")
Steps = Generator[TrainingTask, Outcome, Update]  # stops at most once


@dataclass(frozen=True, eq=False)
class JobRunner:
    """Does the jobs of one client, by whatever model it is given."""

    id: int
    client_data: ClientData
    folder: Path  # where the client keeps its state
    policy: ClientPolicy = field(default_factory=ClientPolicy)
    mechanism: Mechanism = STANDARD  # of private jobs; another only for an audit
    once: bool = False  # keep the last answer, so that a job which comes again is not done twice; private ones always

    def run(self, model: Model, job: Job, digest: str = "") -> Update:
        """Do a round's work. A private job is charged first; one that was done already has the same answer again.

        `digest` is the job's name; without one, as of a job that no message brought, the parts are hashed here.
        Raises `ClientFailed`; `PrivacyError` or, for a private job, `LedgerError`, and then nothing was trained and
        nothing charged; `SecureError` for a job that is to be masked and may not be.
        """
        with closing(self.steps(model, job, digest)) as steps:
            task = training.begin(steps)
            return task if isinstance(task, Update) else training.end(steps, training.outcome_of(model, task))

    def steps(self, model: Model, job: Job, digest: str = "") -> Steps:
        """Do a round's work as `run` does, but for the training: what is to be trained is yielded.

        The generator is sent what came of it, or the error, and returns the update. While it waits, it holds the lock
        of a private client's ledger; one that is closed there leaves a charged job without an answer, as a crash.
        """
        self.policy.refuse(job, self.client_data.client(self.id, 0).records)
        check_start(model, job)
        digest = digest or hash_parts_and_job(job)
        if job.masking:
            return (yield from self._masked(model, job, digest))
        update = yield from self._trained(model, job, digest)
        return self._compressed(job, update)

    def _masked(self, model: Model, job: Job, digest: str) -> Steps:
        """The update under its mask; a sketch is narrowed and widened here, as the server sees no single update.

        Nothing is trained or charged where the update is not to be masked.
        """
        self.secagg.refuse(job)
        update = yield from self._trained(model, select_rows(job), digest)
        return self.secagg.mask(job, replace(update, lora=scatter_rows(job, update.lora)))

    def _trained(self, model: Model, job: Job, digest: str) -> Steps:
        return self._private(model, job, job.privacy, digest) if job.privacy else self._plain(job, digest)

    def _compressed(self, job: Job, update: Update) -> Update:
        """The update encoded as the job asks, and with the numbers that the server will decode from it."""
        if job.upload == "float32":
            return update
        store = ClientState(self.folder, "left")
        residual = store.before(job.round) if job.feedback else LoRA()
        packed, received, left = compress_with_error_feedback(job.start, update.lora, residual, job.upload)
        if job.feedback:
            store.keep(job.round, left)
        return replace(update, lora=received, packed=packed)

    def _plain(self, job: Job, digest: str) -> Steps:
        """The update of a job without DP-SGD; with `once`, the kept one if this job was done already."""
        store, last = ClientState(self.folder), CachedReply(self.folder)
        if self.once and (done := last.to(digest)):
            return done
        before = store.before(job.round)
        task = TrainingTask(client=self.id, job=job, kept=before, examples=self.client_data.train)
        update, kept = trained((yield task))
        log.debug("trained round %d", job.round + 1)
        store.keep(job.round, kept)
        if self.once:
            last.keep(digest, update)
        return update

    def _private(self, model: Model, job: Job, privacy: PrivacyTerms, digest: str) -> Steps:
        """The update of a job with DP-SGD, charged once however often the job comes.

        Raises `PrivateJobFailed` for whatever goes wrong after the charge, and for that job ever after.
        """
        preflight.check_once(model, job)
        records, ledger = self.client_data.records, self.ledger  # encoded now: what cannot be read costs nothing
        delta = self.policy.delta if self.policy.delta < 1 else privacy.delta
        with ledger.locked():
            digest = _name_in(ledger, job, digest)
            ledger.charge(digest, privacy, round=job.round, budget=self.policy.budget, delta=delta)
            answer = ledger.answer(digest) or (yield from self._charged(job, records, ledger, digest))
            return replace(answer, spent=ledger.spent(privacy.delta))

    def _charged(self, job: Job, records: Records, ledger: Ledger, digest: str) -> Steps:
        """The update of a job that the ledger has just been charged for; it lies on the disk when this returns."""
        store = ClientState(self.folder)
        try:
            before = store.before(job.round)
            task = TrainingTask(client=self.id, job=job, kept=before, records=records, mechanism=self.mechanism)
            answer, kept = trained((yield task))
            store.keep(job.round, kept)
            ledger.keep(digest, answer)
        except Exception:  # whatever it is: its kind may depend on the records
            log.warning("a private job failed after it was charged", exc_info=True)
            _write_failure(ledger, digest)
            raise PrivateJobFailed from None
        return answer

    def evaluate(self, model: Model, job: Job, digest: str = "") -> Metrics:
        """The metrics on the held-out examples of the model that this client would use.

        Raises `PrivacyError` where no scores may be told, or where another job of the round was answered.
        """
        heldout = self.client_data.heldout
        self.policy.refuse_evaluation(len(heldout))
        if self.once:
            ScoredRounds(self.folder).note(job.round, digest or hash_parts_and_job(job))
        return training.evaluate(model, job, heldout, ClientState(self.folder).before(job.round + 1))

    def reply(self, ask: SecAggStep) -> dict[str, str]:
        """Answer a step of secure aggregation; a client that joins tells its counts. Raises `SecureError`."""
        said = self.secagg.reply(ask)
        if ask.step == "join":
            said |= {"examples": str(len(self.client_data.train)), "records": str(len(self.client_data.records))}
        return said

    @property
    def secagg(self) -> SecAggClient:
        """The client's part in secure aggregation."""
        return SecAggClient(self.folder, self.id, self.policy.colluders)

    @property
    def ledger(self) -> Ledger:
        """The ledger of what the client's data have been charged with."""
        if self.policy.ledgers is None:
            return Ledger(self.folder, self.client_data)
        folder = ledger_folder(self.policy.ledgers, self.id, self.client_data)
        return Ledger(folder, self.client_data, self.policy.mark_of(folder.name))


def _name_in(ledger: Ledger, job: Job, digest: str) -> str:
    """The digest under which the ledger has the job: an older version may have charged this very job by another."""
    charged = ledger.charged(job.round)
    earlier = earlier_job_hash(job) if charged and digest not in charged else ""
    return earlier if earlier in charged else digest


def _write_failure(ledger: Ledger, digest: str) -> None:
    """Write that the job failed. Where there is no room even for that, the same is said without it: as of an answer
    that finds no room."""
    try:
        ledger.fail(digest)
    except FedloraError:
        log.warning("the ledger could not be written", exc_info=True)
