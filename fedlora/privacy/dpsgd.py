"""DP-SGD on an adapter: the share of each record in what a client sends is bounded, and hidden in noise.

Abadi et al., Deep Learning with Differential Privacy (CCS 2016), https://arxiv.org/abs/1607.00133

    every record is in a step with probability q, by itself
    g_j <- g_j min(1, C / |g_j|),   step along (sum_j g_j + N(0, sigma^2 C^2 I)) / (q N)

g_j is the gradient of one record's own mean loss over all parameters that are trained, sent or not: those that a
client keeps move its next gradients (FedSA-LoRA's B). With a head there are two groups of parameters, clipped apart at
C_A and C_H with C_A^2 + C_H^2 = C^2, as a fresh head's gradient would take nearly all of one clip; together they are
still one release of sensitivity C. The divisor is q N and not the size of the batch; a step without any record is noise
alone.

Where sides are trained in turn, g_j is of the sides of the step, and these alone are noised: still one release of
sensitivity C a step, whatever its sides. A filter on the noised sum is post-processing.

Dropout is drawn in secret too. Which mask a record meets depends on the other records in its batch: to an adversary who
knew the masks, one record more or less would change the gradients of all after it, and the sum by more than C.
"""

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedlora.encoding.encoder import Example, Records
from fedlora.errors import PrivacyError, TrainingDiverged
from fedlora.jobs import Job, PrivacyTerms
from fedlora.lora import LoRA, at_least_float32
from fedlora.message_types import MOST_LOSS
from fedlora.models import optimizer
from fedlora.models.added_gradients import added_gradients
from fedlora.models.model import Model
from fedlora.seeds import derive

from .noise import SecureRandom, secret_draws
from .per_sample_gradients import ENGINES, LAYERS, GradientFn, Gradients, Learner, LossMeter, PerExample, add_up, clip

Engine = Callable[[Learner, Sequence[nn.Parameter]], PerExample]


def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
    """Return the random numbers for a job's noise and samples: the system's, or in an experiment the run's seed's."""
    if privacy.seeded:
        return SecureRandom.seeded(derive(job.seed, "noise", client, job.round))
    return SecureRandom.secret()


class NoiseAdder(Protocol):
    """A function that adds noise to a sum, as `add_noise` does."""

    def __call__(self, total: Tensor, *, deviation: float, random: SecureRandom) -> Tensor: ...


def add_noise(total: Tensor, *, deviation: float, random: SecureRandom) -> Tensor:
    """Return a sum of clipped gradients plus normal noise of this standard deviation, in float64.

    The sum is rounded after the noise and not before, so that the noise hides its last bits too.
    """
    return total.double() + deviation * random.normal(*total.shape).to(total.device)


def engine(model: Learner, parameters: Sequence[nn.Parameter], privacy: PrivacyTerms) -> type[PerExample]:
    """Return the engine of single gradients that the job names, or for `auto` the fastest that knows the model.

    That is one pass, or Opacus's hooks where a trained layer is unknown to it. Over weights of fewer than 32 bits it is
    one record at a time: a record's gradient depends there, by rounding, on what else is in its micro-batch, which one
    record more then moves by more than the clip. Raises `PrivacyError` for another engine over such weights.
    """
    if not is_precise(model.net):
        if privacy.engine not in ("auto", "one"):
            raise PrivacyError(
                f"dp.engine = {privacy.engine} over a base of fewer than 32 bits: records of one micro-batch move each "
                "other's gradients by rounding; choose dp.engine = one (or auto), or model.dtype = float32"
            )
        return ENGINES["one"]
    if privacy.engine != "auto":
        return ENGINES[privacy.engine]
    trained = {id(p) for p in parameters}
    holders = {type(module) for module in model.net.modules() if _holds(module, trained)}
    return ENGINES["lora" if holders <= LAYERS.keys() else "hooks"]


def is_precise(net: nn.Module) -> bool:
    """Are all weights of 32 bits or more? Then what rounding takes is a millionth, whatever is in a batch.

    Whole numbers, as quantised weights are, are not rounded with the batch: the type of the others says in which type
    their products are computed.
    """
    return all(p.dtype.itemsize >= 4 for p in net.parameters() if p.is_floating_point())


def _holds(module: nn.Module, trained: Container[int]) -> bool:
    return any(id(p) in trained for p in module.parameters(recurse=False))


class RowGradients(Protocol):
    """A function that returns the gradients of single records of many clients, (examples, P_t): a row for each.

    `owner`, (examples,), has the place of each example's client among those that are trained together.
    """

    def __call__(self, examples: Sequence[Example], owner: Tensor) -> Tensor: ...


def _unchanged(gradients: RowGradients) -> RowGradients:
    return gradients


def _unwatched(read: Callable[[], LoRA]) -> None:
    """Look at nothing."""


@dataclass(frozen=True)
class Mechanism:
    """The parts of DP-SGD that its guarantee rests on: the audit observes them, and plants bugs in them one by one.

    They are the same whether a client is trained by itself or in one pass with others, but for the gradients.
    """

    source: Callable[[Job, int, PrivacyTerms], SecureRandom] = source
    draw: Callable[[SecureRandom, int, float], list[int]] = SecureRandom.poisson_sample
    engine: Callable[[Model, Sequence[nn.Parameter], PrivacyTerms], Engine] = engine  # of a client by itself
    rows: Callable[[RowGradients], RowGradients] = _unchanged  # of a pass, around which a client's mechanism may stand
    clip: Callable[[Gradients, Sequence[int], Sequence[float]], list[Tensor]] = clip
    add_noise: NoiseAdder = add_noise
    watch: Callable[[Callable[[], LoRA]], None] = _unwatched  # is given, before the first step, what reads the adapter


STANDARD = Mechanism()


def train(
    model: Model,
    sides: Mapping[str, list[nn.Parameter]],
    job: Job,
    client: int,
    records: Records,
    mechanism: Mechanism = STANDARD,
) -> list[float]:
    """Run all steps of a private job on the model's parameters, which are given by side.

    Returns the loss of every record that was drawn, once for each time: no noise hides them (see `told_loss`).
    Raises `PrivacyError`, before any record is read, for a model whose records' gradients cannot be told apart, and
    `TrainingDiverged` where the parameters are not finite afterwards; they are functions of what was released already.
    """
    privacy = privacy_of(job)
    parameters = [p for side in sides.values() for p in side]
    added = added_gradients(model, job)
    expected_batch = privacy.rate * len(records)
    random = mechanism.source(job, client, privacy)
    steps = optimizer.make(job.training, model, sides)
    meter = LossMeter(model)
    model.net.train()
    mechanism.watch(model.get_adapter)
    with secret_draws(random.key()):
        for turn, stretch in job.stretches(privacy.steps):
            now = optimizer.turn_to(model, sides, job, turn)
            trained = [p for side in now.values() for p in side]
            with mechanism.engine(model, trained, privacy)(meter, trained) as gradients:
                for step in stretch:
                    optimizer.set_rates(steps, job.training, job, step=step, steps=privacy.steps)
                    examples = draw_examples(records, mechanism, random, rate=privacy.rate)
                    batches = model.encoder.batches(examples, job.training.batch_size)
                    sums = clipped_sum(gradients, trained, batches, now, job, mechanism)
                    for p, total in zip(trained, sums, strict=True):
                        noisy = mechanism.add_noise(total, deviation=privacy.noise * privacy.clip, random=random)
                        p.grad = (noisy / expected_batch).to(p.dtype)
                    added.add()
                    optimizer.smooth_gradients(now, job.smoothing)  # of what is noised: post-processing
                    steps.step()
                    steps.zero_grad()
    refuse_infinite(parameters, job)
    return meter.kept()


def told_loss(losses: Iterable[float], *, records: int, fewest: int) -> float | None:
    """Return the mean loss of the records that a client drew, or None where it may not be told.

    It may not where the client has fewer than `fewest` records or drew fewer, as the server names the rate at which
    they are drawn; nor where the mean is too large to travel. A record whose loss is not finite is left out, as its
    gradient is by `clip`. The mean is the same to the last bit whatever the order.
    """
    finite = [loss for loss in losses if isfinite(loss)]
    if min(records, len(finite)) < max(fewest, 1):
        return None
    mean = fsum(finite) / len(finite)
    return mean if abs(mean) <= MOST_LOSS else None


def refuse_infinite(trained: Iterable[Tensor], job: Job) -> None:
    """Raise `TrainingDiverged` where what a job has trained is not finite."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained):
        raise TrainingDiverged(
            f"the adapter is not finite after round {job.round + 1}; a train.lr below {job.training.lr:g} may help"
        )


def draw_examples(records: Records, mechanism: Mechanism, random: SecureRandom, *, rate: float) -> list[Example]:
    """Return one example, drawn at random, of every record in a Poisson sample; records without examples have none."""
    drawn = [records[i] for i in mechanism.draw(random, len(records), rate)]
    return [record[random.one_of(len(record))] for record in drawn if len(record)]


def clipped_sum(
    gradients: GradientFn,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Sequence[Example]],
    sides: Mapping[str, list[nn.Parameter]],
    job: Job,
    mechanism: Mechanism = STANDARD,
) -> Gradients:
    """Return the sum of these examples' clipped gradients for each parameter, computed a batch at a time."""
    sums = [torch.zeros_like(at_least_float32(p)) for p in parameters]
    groups, bounds = grouped(sides, privacy_of(job))
    for batch in batches:
        single = gradients(batch)
        for total, (part,) in zip(sums, add_up(single, mechanism.clip(single, groups, bounds)), strict=True):
            total += part
        del single  # not held through the next pass
    return sums


def grouped(sides: Mapping[str, Collection[Any]], privacy: PrivacyTerms) -> tuple[list[int], list[float]]:
    """Return the group of each parameter, 0 for the factors and 1 for the head, and the clips of the two groups.

    `sides` has the parameters of each side, or their names.
    """
    groups = [int(side == "H") for side, parameters in sides.items() for _ in parameters]
    if len(set(groups)) < 2:
        return groups, [privacy.clip, privacy.clip]
    return groups, [privacy.clip * sqrt(1 - privacy.head_share), privacy.clip * sqrt(privacy.head_share)]


def privacy_of(job: Job) -> PrivacyTerms:
    """Return the DP-SGD parameters of a job. Raises `PrivacyError` for a job without any."""
    if job.privacy is None:
        raise PrivacyError("this job has no terms of privacy")
    return job.privacy
