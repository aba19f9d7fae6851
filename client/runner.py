"""A client's jobs, done with its own data, its own policy and what it keeps on its own disk."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora.client import training
from fedlora.client.egress import check_start
from fedlora.client.ledger import Ledger
from fedlora.client.policy import ClientPolicy
from fedlora.client.scored_rounds import ScoredRounds
from fedlora.client.secure_aggregation import SecAggClient
from fedlora.data.client_data import ClientData
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
        Raises `ClientFailed`; `PrivacyError` or, for a private job, `LedgerError`, and then nothing was trained;
        `SecureError` for a job that is to be masked and may not be.
        """
        self.policy.refuse(job, self.client_data.client(self.id, 0).records)
        check_start(model, job)
        digest = digest or hash_parts_and_job(job)
        if job.masking:
            return self._masked(model, job, digest)
        return self._compressed(job, self._trained(model, job, digest))

    def _masked(self, model: Model, job: Job, digest: str) -> Update:
        """The update under its mask; a sketch is narrowed and widened here, as the server sees no single update.

        Raises `MaskedBefore`, and then nothing is trained or charged, for a round that was masked before.
        """
        self.secagg.refuse_masked(job.round)
        update = self._trained(model, select_rows(job), digest)
        return self.secagg.mask(job, replace(update, lora=scatter_rows(job, update.lora)))

    def _trained(self, model: Model, job: Job, digest: str) -> Update:
        return self._private(model, job, job.privacy, digest) if job.privacy else self._plain(model, job, digest)

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

    def _plain(self, model: Model, job: Job, digest: str) -> Update:
        """The update of a job without DP-SGD; with `once`, the kept one if this job was done already."""
        store, last = ClientState(self.folder), CachedReply(self.folder)
        if self.once and (done := last.to(digest)):
            return done
        update, kept = training.train(model, job, self.id, self.client_data.train, store.before(job.round))
        log.debug("trained round %d", job.round + 1)
        store.keep(job.round, kept)
        if self.once:
            last.keep(digest, update)
        return update

    def _private(self, model: Model, job: Job, privacy: PrivacyTerms, digest: str) -> Update:
        """The update of a job with DP-SGD, charged once however often the job comes."""
        preflight.check_once(model, job)
        store, ledger = ClientState(self.folder), self.ledger
        charged = ledger.charged(job.round)
        if charged and digest not in charged and (earlier := earlier_job_hash(job)) in charged:
            digest = earlier  # an older version charged this very job
        ledger.charge(digest, privacy, round=job.round, budget=self.policy.budget)
        answer = ledger.answer(digest)
        if answer is None:
            records, before = self.client_data.records, store.before(job.round)
            answer, kept = training.train_privately(model, job, self.id, records, before, self.mechanism)
            store.keep(job.round, kept)
            ledger.keep(digest, answer)
        return replace(answer, spent=ledger.spent(privacy.delta))

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
        return SecAggClient(self.folder, self.id)

    @property
    def ledger(self) -> Ledger:
        """The ledger of what the client's data have been charged with."""
        folder = self.policy.ledgers / str(self.id) if self.policy.ledgers else self.folder
        return Ledger(folder, self.client_data.fingerprint)
