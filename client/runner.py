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
from fedlora.errors import ClientFailed, FedloraError, PrivateJobFailed
from fedlora.jobs import (
    Job,
    PrivacySpent,
    PrivacyTerms,
    SecAggStep,
    Update,
    is_projected,
    shared_part,
    shared_start,
    start_with,
)
from fedlora.lora import LoRA
from fedlora.messages.compression import compress_with_error_feedback
from fedlora.messages.parts import hash_parts_and_job
from fedlora.messages.sketch import scatter_rows, select_rows
from fedlora.metrics import Metrics
from fedlora.models.model import Model
from fedlora.privacy import preflight
from fedlora.privacy.dpsgd import STANDARD, Mechanism
from fedlora.run.export import save_own
from fedlora.storage.client_state import CachedReply, ClientState, earlier_job_hash
from fedlora.storage.own_model import by_itself, own_model

log = logging.getLogger("fedlora")
FACTORS = "factors"  # the name of the files with what was trained in a round of which there is a second pass
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
        _check_projection(model, job)
        if job.stage != "round":
            return (yield from self._by_itself(model, job))
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

    def _by_itself(self, model: Model, job: Job) -> Steps:
        """Do a stage for this client's own use: its result stays here, and the update holds nothing of it.

        Where no scores may be told, it does not say either that the training failed: that depends on the data.
        """
        alone = by_itself(job, ClientState(self.folder).before(job.round + 1))
        examples = self.client_data.train
        outcome = yield TrainingTask(client=self.id, job=alone, kept=LoRA(), examples=examples)
        try:
            kept = trained(outcome)[1]
            ClientState(self.folder, job.stage).keep(job.round, kept)
            if self.once:  # on a machine of its own, where no run directory is
                save_own(model, start_with(alone, kept), job.offset, self.folder / f"{job.stage}-adapter")
        except Exception:  # whatever it is: its kind may depend on the records
            if self.policy.metrics and not self.policy.masked:
                raise
            log.warning("what this client was to do for its own use failed", exc_info=True)
        return Update(LoRA(), max(1, len(examples)), None)

    def _trained(self, model: Model, job: Job, digest: str) -> Steps:
        if job.left:
            return self._second_pass(job)
        return self._private(model, job, job.privacy, digest) if job.privacy else self._plain(job, digest)

    def _second_pass(self, job: Job) -> Steps:
        """What a second pass asks about the factors that this client trained in the round: nothing is trained for it.

        Nothing is charged either, as the factors of a private job are a function of what was noised. The same job has
        the same answer, so none is kept. Raises `ClientFailed` where the client has no such factors.
        """
        yield from ()
        factors = ClientState(self.folder, FACTORS).of(job.round)
        spent = self._spent(job, job.privacy) if job.privacy else None
        if not factors or (job.privacy and spent is None):
            raise ClientFailed(
                f"client {self.id} is asked about the factors that it trained in round {job.round + 1}, and has none; "
                "it takes part again from the next round on"
            )
        data = self.client_data
        return Update(shared_part(job, factors), len(data.records if job.privacy else data.train), None, spent)

    def _spent(self, job: Job, privacy: PrivacyTerms) -> PrivacySpent | None:
        """What the ledger says after a round; None where no job of that round was charged."""
        ledger = self.ledger
        with ledger.locked():
            return ledger.spent(privacy.delta) if ledger.charged(job.round) else None

    def _keep(self, job: Job, kept: LoRA) -> None:
        """Write what a round leaves: the sides to go on from and, apart from these, what a second pass asks about.

        What lies apart is all that a second pass can ever ask about, whatever else a client keeps.
        """
        if job.right:
            ClientState(self.folder, FACTORS).keep(job.round, kept.only("AB"))
            kept = kept.only("HRD")
        ClientState(self.folder).keep(job.round, kept)

    def _compressed(self, job: Job, update: Update) -> Update:
        """The update encoded as the job asks, and with the numbers that the server will decode from it."""
        if job.upload == "float32":
            return update
        store = ClientState(self.folder, "left")
        residual = store.before(job.round) if job.feedback else LoRA()
        packed, received, left = compress_with_error_feedback(shared_start(job), update.lora, residual, job.upload)
        if job.feedback:
            store.keep(job.round, left)
        return replace(update, lora=received, packed=packed)

    def _plain(self, job: Job, digest: str) -> Steps:
        """The update of a job without DP-SGD; with `once`, the kept one if this job was done already."""
        last = CachedReply(self.folder)
        if self.once and (done := last.to(digest)):
            return done
        before = ClientState(self.folder).before(job.round)
        task = TrainingTask(client=self.id, job=job, kept=before, examples=self.client_data.train)
        update, kept = trained((yield task))
        log.debug("trained round %d", job.round + 1)
        self._keep(job, kept)
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
        try:
            before = ClientState(self.folder).before(job.round)
            task = TrainingTask(
                client=self.id,
                job=job,
                kept=before,
                records=records,
                mechanism=self.mechanism,
                fewest_told=self.policy.fewest_scored,
            )
            answer, kept = trained((yield task))
            self._keep(job, kept)
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
            ScoredRounds(self.folder, job.stage).note(job.round, digest or hash_parts_and_job(job))
        own, kept = own_model(job, self.folder)
        return training.evaluate(model, own, heldout, kept)

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


def _check_projection(model: Model, job: Job) -> None:
    """Raise `ClientFailed` for a job that asks for a projection of a product where the model has no plain one."""
    if is_projected(job) and model.kind != "lora":
        raise ClientFailed(
            f"the job asks for a projection of B A, and lora.kind = {model.kind} computes with more than that product; "
            "take lora.kind = lora"
        )


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
