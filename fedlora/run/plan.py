"""The plan of a run, the jobs that follow from it, and the results of its rounds, for any strategy and any fleet."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedlora.errors import ConfigError, Failure, PrivacyError, StrategyError, nearest
from fedlora.jobs import (
    Charge,
    Client,
    Job,
    PrivacySpent,
    count_steps,
    holds_scales,
    is_projected,
    why_no_projection,
    why_rows_cannot_stay,
)
from fedlora.lora import LoRA, map_factors
from fedlora.message_types import Taps, Turns, check_turns
from fedlora.metrics import Metrics
from fedlora.privacy.client_level import ClientLevelDP, NoisedUpdate
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.sections import MessageConfig, PersonalConfig, SecureConfig, Training
from fedlora.sections import Policy as Policy
from fedlora.strategy import Strategy, innermost

FILLED_IN = {  # field of a Job -> what a strategy that sets it is to do instead
    "training": "name in Job.overrides the settings in which a client differs, and in Job.lr_factor by how much",
    "privacy": "leave it out; dp.epsilon or dp.noise turns it on",
    "masking": "leave it out; secure.aggregation turns it on",
    "metrics": "leave it out; dp.metrics sets it",
    "upload": "leave it out; messages.up sets it",
    "feedback": "leave it out; messages.feedback sets it",
    "seed": "leave it out, and keep a seed of the strategy's own among its options",
    "round": "leave it out, and count rounds in the state",
    "rounds": "leave it out; rounds sets it",
    "stage": "leave it out; personal.steps and personal.alone add stages",
}
SETTINGS, TURNS, TAPS = TypeAdapter(Training), TypeAdapter(Turns), TypeAdapter(Taps)
ACCOUNTED = ("epochs", "steps", "batch_size", "accumulate", "clip")  # training settings behind a private run's noise


@dataclass(frozen=True)
class JobInFlight:
    """A job that a client is at while rounds go on (server.mode = async)."""

    client: int
    version: int  # of the model that it starts from, counted from 0
    began: float  # seconds on the clock of the run


@dataclass(frozen=True, eq=False)
class JobsInFlight:
    """What an asynchronous run has in flight, beside the newest state."""

    jobs: tuple[JobInFlight, ...]
    states: Mapping[int, Any]  # of the versions from which these jobs start
    used: Mapping[int, int]  # client -> updates of it that were used so far


@dataclass(frozen=True, eq=False)
class ResumePoint:
    """What the rounds so far have left, from which the next round or a resumed run goes on."""

    rounds: int  # finished
    state: Any
    losses: tuple[float, ...] = ()  # of the global model, one an evaluation
    spent: Mapping[int, PrivacySpent] = field(default_factory=dict)  # client -> what its ledger said, or must say
    joined: Mapping[int, int] = field(default_factory=dict)  # client -> rounds that it was in, of a private run
    clip: float | None = None  # of clients' updates, where the run hides clients
    charges: tuple[Charge, ...] = ()  # for that, of all rounds
    scores: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # client -> its last held-out scores
    clock: float = 0.0  # seconds on the clock of the run, where it has one
    in_flight: JobsInFlight | None = None  # of an asynchronous run

    def with_spent(self, spent: Mapping[int, PrivacySpent]) -> "ResumePoint":
        """The same after these clients were charged for a round."""
        joined = Counter(self.joined)
        joined.update(spent.keys())
        return replace(self, spent={**self.spent, **spent}, joined=joined)


@dataclass(frozen=True, eq=False)
class RoundResult:
    """The result of a round."""

    number: int  # from 1
    state: Any
    asked: tuple[int, ...]
    failed: Mapping[int, Failure]
    train_loss: float | None  # mean over clients by weight; none where the round was skipped, or nobody tells one
    eval: Mapping[str, float] | None  # of the global model
    eval_clients: Mapping[str, float | int | str] | None  # of each client's model on its own held-out examples
    bytes_up: int
    bytes_down: int
    seconds: float
    notes: Mapping[str, float] = field(default_factory=dict)  # the strategy's own figures
    exactness: float | None = None  # relative distance from the mean of the clients' models; none: not measured
    spent: Mapping[int, PrivacySpent] = field(default_factory=dict)  # of every client ever charged, after this round
    charged: Collection[int] = ()  # clients that were charged in this round, whatever became of their updates
    client_level: NoisedUpdate | None = None  # where the run hides clients
    scores: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # client -> its last, for who needs senders
    each: Mapping[int, Mapping[str, float]] | None = None  # client -> its own figures; none: they may not be told
    skipped: bool = False  # too few clients answered, and the state is as it was
    clock: float | None = None  # seconds since the run began, on the clock of a simulation or of an asynchronous run
    arrivals: Sequence[tuple[int, int]] = ()  # of an asynchronous run: client, how many versions old, in order
    in_flight: JobsInFlight | None = None  # of an asynchronous run

    def record(self) -> dict[str, Any]:
        """The round's line in `rounds.jsonl`."""
        notes = {"notes": dict(self.notes)} if self.notes else {}
        measured = {"exactness": self.exactness} if self.exactness is not None else {}
        return {
            "round": self.number,
            "clients": len(self.asked),
            "answered": len(self.asked) - len(self.failed),
            "failed": {str(i): failure.public for i, failure in self.failed.items()},
            "train_loss": self.train_loss,
            "eval": self.eval,
            "eval_clients": self.eval_clients,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": round(self.seconds, 3),
            **notes,
            **measured,
            **self._each(),
            **self._course(),
            **self._privacy(),
        }

    def _each(self) -> dict[str, Any]:
        """The key with every client's own figures, to six digits, where they may be told."""
        if self.each is None:
            return {}
        return {"each": {str(i): {name: _short(x) for name, x in own.items()} for i, own in sorted(self.each.items())}}

    def _course(self) -> dict[str, Any]:
        """The keys of a run with a clock, and of one in which clients arrive at any time."""
        clock = {"clock": round(self.clock, 3)} if self.clock is not None else {}
        return clock | ({"arrivals": [list(arrival) for arrival in self.arrivals]} if self.in_flight else {})

    def _privacy(self) -> dict[str, Any]:
        """The keys that a private run has in that line besides."""
        if self.client_level:
            return self.client_level.record()
        if not self.spent:
            return {}
        epsilons = [s.epsilon for s in self.spent.values()]
        of_this_round = {str(i): [s.epsilon, s.charges] for i, s in self.spent.items() if i in self.charged}
        return {"epsilon": max(epsilons), "epsilon_median": median(epsilons), "spent": of_this_round}


@dataclass(frozen=True)
class Plan:
    """What `fit` is to do, for any strategy and any fleet."""

    rounds: int
    cohort: int  # clients asked in a round; of an asynchronous run, those that are at work at once
    seed: int = 0
    training: Training = field(default_factory=Training)
    policy: Policy = field(default_factory=Policy)
    buffer: int = 1  # updates that make a new version of the model, in an asynchronous run
    evaluate: Callable[[LoRA], Metrics] | None = None  # the global model on the global held-out set
    generate: Callable[[LoRA, int], Mapping[str, float]] | None = None  # its answers after so many rounds, scored
    generate_every: int = 1  # rounds between generations; 0: before the first and after the last alone
    evaluate_clients: bool = False
    exactness: Mapping[str, float] | None = None  # module -> s, to measure it; all of a round's updates are then held
    metrics: bool = True  # may clients tell their training loss?
    record_level: RecordLevelDP | None = None  # clients hide their records by DP-SGD
    client_level: ClientLevelDP | None = None  # the server hides clients
    secure: SecureConfig | None = None  # it sees sums alone
    messages: MessageConfig = field(default_factory=MessageConfig)
    personal: PersonalConfig = field(default_factory=PersonalConfig)  # what clients do after the last round

    @property
    def tells_each(self) -> bool:
        """May what is told of single clients be kept, as their losses and scores?"""
        return self.metrics and not (self.secure or self.client_level)


def _short(figure: float) -> float:
    """A figure to six digits, which its line in `rounds.jsonl` has for each client; counts as they are."""
    return figure if isinstance(figure, int) else float(f"{figure:.6g}")


def job_for(
    strategy: Strategy[Any], state: Any, client: Client, plan: Plan, t: int, spent: PrivacySpent | None = None
) -> Job:
    """A client's job of round t: what the strategy has it do, and what the run fills in.

    Raises `StrategyError` for a job in which the strategy sets what the run fills in, and `PrivacyError` for one that
    changes what a private run's noise was computed for.
    """
    job = strategy.client_init(state, client)
    name = type(innermost(strategy)).__name__
    _check_left_to_the_run(name, job)
    _check_turns_and_filter(name, job)
    _check_scales(name, job)
    _check_projection(name, job, client, plan)
    if why := why_rows_cannot_stay(job):
        raise StrategyError(f"strategy {name} gives client {client.id} a job that cannot be done: {why}")
    _check_start_is_sent_whole(name, job, plan)
    if plan.record_level:
        _check_terms_are_kept(name, job, client)
    filled = replace(
        job,
        training=_training(name, job, plan.training),
        overrides={},
        lr_factor=1.0,
        seed=plan.seed,
        round=t,
        rounds=plan.rounds,
        metrics=plan.metrics and bool(job.trains),  # without training there is no loss
        privacy=plan.record_level.terms_for(client, known=spent.charges if spent else 0) if plan.record_level else None,
    )
    _check_every_side_has_its_turn(name, filled)
    return with_encoding(filled, strategy, plan)


def _check_left_to_the_run(strategy: str, job: Job) -> None:
    """Raise `StrategyError` where a strategy has set what the run fills in, which would be lost."""
    untouched = Job(job.start)
    for name, remedy in FILLED_IN.items():
        value, default = getattr(job, name), getattr(untouched, name)
        if value != default or (name == "training" and value is not default):  # the run's may equal the default
            raise StrategyError(f"strategy {strategy} sets {name} in a Job, which the run fills in: {remedy}")


def _check_turns_and_filter(strategy: str, job: Job) -> None:
    """Raise `StrategyError` for turns or a filter that no job may have."""
    try:
        check_turns(TURNS.validate_python(job.turns), job.trains)
        TAPS.validate_python(job.smoothing)
    except ValueError as e:  # pydantic's is one
        what = "; ".join(x["msg"] for x in e.errors()) if isinstance(e, ValidationError) else str(e)
        raise StrategyError(f"strategy {strategy} makes a job whose turns or smoothing cannot be: {what}") from e


def _check_every_side_has_its_turn(strategy: str, job: Job) -> None:
    """Raise `StrategyError` where train.steps is so small that a round ends before some side's turn."""
    if resting := never_trained(job, steps=job.training.steps) if job.training.steps else "":
        raise StrategyError(
            f"strategy {strategy} trains {' and '.join(job.each_turn)} in turn, step by step, and a round of "
            f"train.steps = {job.training.steps} ends before the turn of {', '.join(resting)}: set train.steps to a "
            f"multiple of {len(job.turns)}"
        )


def never_trained(job: Job, *, steps: int) -> str:
    """The sides that a job trains in turn, and has trained in none of so many local steps."""
    taken = {side for step in range(min(steps, len(job.turns))) for side in job.turns[step]}
    return "".join(side for side in job.trains if job.turns and side not in taken)


def local_steps(job: Job, client: Client) -> int:
    """The local steps of a client in a round, by what the server knows of it."""
    return job.privacy.steps if job.privacy else count_steps(job.training, client.examples)


def _check_scales(strategy: str, job: Job) -> None:
    """Raise `StrategyError` for scales without heads that are trained and sent with them."""
    if job.scales and not holds_scales(job):
        raise StrategyError(
            f"strategy {strategy} sets scales in a Job that trains {job.trains or 'nothing'} and shares "
            f"{job.shares or 'nothing'}: they are in the heads of a core, so give it an R, train it in every step, and "
            "share it"
        )


def _check_projection(strategy: str, job: Job, client: Client, plan: Plan) -> None:
    """Raise `StrategyError` for a projection that no client can send, `PrivacyError` where one is not to be hidden."""
    if why := why_no_projection(job):
        raise StrategyError(f"strategy {strategy} gives client {client.id} a job that cannot be done: {why}")
    if plan.client_level and is_projected(job):
        raise PrivacyError(
            f"strategy {strategy} asks for projections of a product, and dp.level = client has one clipped and noised "
            "release a round of what is a sum of changes; take dp.level = record, or a strategy that shares its factors"
        )


def _check_start_is_sent_whole(strategy: str, job: Job, plan: Plan) -> None:
    """Raise `StrategyError` where clients start from rounded numbers, and the server takes these for their steps."""
    if job.correction and plan.messages.down != "float32":
        raise StrategyError(
            f"strategy {strategy} reads each client's gradients off how far it moves from the model, and with "
            f"messages.down = {plan.messages.down} clients start from a rounded one: leave messages.down out"
        )


def _check_terms_are_kept(strategy: str, job: Job, client: Client) -> None:
    """Raise `PrivacyError` where a client would draw other samples, or take other steps, than its noise is for."""
    for name in ACCOUNTED:
        if name in job.overrides and (name != "clip" or job.overrides[name]):  # DP-SGD takes none but dp.clip
            raise PrivacyError(
                f"strategy {strategy} overrides train.{name} for client {client.id}, and a private run (dp.level = "
                "record) samples, steps and clips as its noise was computed for: leave it out of Job.overrides, or run "
                "without dp.epsilon and dp.noise"
            )


def _training(strategy: str, job: Job, run: Training) -> Training:
    """The run's training settings with what the job overrides. Raises `StrategyError` for what is no such setting."""
    if not job.overrides and job.lr_factor == 1.0:
        return run
    values = asdict(run)
    for name in job.overrides:
        if name not in values:
            raise StrategyError(f'strategy {strategy} overrides "{name}", no training setting; {nearest(name, values)}')
    values |= job.overrides
    values |= {name: job.lr_factor * values[name] for name in ("lr", "head_lr")}
    try:
        return SETTINGS.validate_python(values)
    except ConfigError as e:
        raise StrategyError(f"strategy {strategy} makes {e}, by its overrides") from e
    except ValidationError as e:
        wrong = e.errors()[0]
        where = f"train.{wrong['loc'][0]}" if wrong["loc"] else "training"
        raise StrategyError(
            f"strategy {strategy} makes {where} = {wrong['input']!r} by overrides and lr_factor: {wrong['msg']}"
        ) from e


def with_encoding(job: Job, strategy: Strategy[Any], plan: Plan) -> Job:
    """The job with the encoding of its numbers; masked updates and changes of a product travel as they are.

    So do projections, of which the server makes orthonormal columns: the rounding would become directions of its own.
    """
    if plan.messages.down == "bfloat16":
        job = replace(job, start=map_factors(lambda t: t.bfloat16().to(t.dtype), job.start))
    if plan.secure or job.resumes or is_projected(job):
        return job
    stays = strategy.continues and not job.sketch  # then a rounding error belongs to the factors of the next round too
    return replace(job, upload=plan.messages.up, feedback=plan.messages.feedback and stays)
