"""DP-SGD on an adapter: what of a client's records gets into what it sends is bounded, and hidden in noise.

Abadi et al., Deep Learning with Differential Privacy (CCS 2016), https://arxiv.org/abs/1607.00133

    every record is in a step with probability q, by itself
    g_j <- g_j min(1, C / |g_j|),   step along (sum_j g_j + N(0, sigma^2 C^2 I)) / (q N)

g_j is the gradient of one record's own mean loss over all that is trained, whether it will be sent or not: what a
client keeps moves its next gradients (FedSA-LoRA's B). With a head there are two groups of parameters, clipped apart at
C_A and C_H with C_A^2 + C_H^2 = C^2, as a fresh head's gradient would take nearly all of one clip; together they are
still one release of sensitivity C. The divisor is q N and not how many came; a step to which none came is noise alone.

Dropout is drawn in secret too. Which mask a record meets depends on who else is in its batch: to one who knew the
masks, a record more or less would change the gradients of all that come after it, and the sum by more than C.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from fedlora.data.encoding import Example, Records, length
from fedlora.errors import PrivacyError, TrainingDiverged
from fedlora.jobs import Job, PrivacyTerms
from fedlora.lora import at_least_float32
from fedlora.models import optimizer
from fedlora.models.model import Model
from fedlora.seeds import derive, seeded

from .noise import SecureRandom
from .per_sample_gradients import ENGINES, LAYERS, GradientFn, Gradients, Learner, PerExample, add_up, clip

Engine = Callable[[Model, Sequence[nn.Parameter]], PerExample]


def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
    """Where a job's noise and samples come from: the system, or in an experiment the run's seed."""
    return (
        SecureRandom.seeded(derive(job.seed, "noise", client, job.round)) if privacy.seeded else SecureRandom.secret()
    )


def add_noise(total: Tensor, deviation: float, numbers: SecureRandom) -> Tensor:
    """A sum of clipped gradients with noise, added in float64: rounded after it, not before, it hides its last bits."""
    return total.double() + deviation * numbers.normal(*total.shape).to(total.device)


def engine(model: Learner, parameters: Sequence[nn.Parameter], privacy: PrivacyTerms) -> type[PerExample]:
    """The engine that is named; of itself one pass, or Opacus's hooks where a trained layer is unknown to that."""
    if privacy.engine != "auto":
        return ENGINES[privacy.engine]
    trained = {id(p) for p in parameters}
    holders = {type(m) for m in model.net.modules() for p in m.parameters(recurse=False) if id(p) in trained}
    return ENGINES["lora" if holders <= LAYERS.keys() else "hooks"]


@dataclass(frozen=True)
class Mechanism:
    """What the guarantee rests on, part by part, for an audit to look at; a test spoils one and sees it caught."""

    source: Callable[[Job, int, PrivacyTerms], SecureRandom] = source
    draw: Callable[[SecureRandom, int, float], list[int]] = SecureRandom.poisson_sample
    engine: Callable[[Model, Sequence[nn.Parameter], PrivacyTerms], Engine] = engine
    clip: Callable[[Gradients, Sequence[int], Sequence[float]], list[Tensor]] = clip
    add_noise: Callable[[Tensor, float, SecureRandom], Tensor] = add_noise


STANDARD = Mechanism()


def train(
    model: Model,
    sides: Mapping[str, list[nn.Parameter]],
    job: Job,
    client: int,
    records: Records,
    mechanism: Mechanism = STANDARD,
) -> None:
    """All steps of a private job. Raises `PrivacyError` for a model that cannot have it, before a record is looked at.

    Raises `TrainingDiverged` where the parameters are no longer numbers; these are functions of what was released.
    """
    privacy = privacy_of(job)
    parameters = [p for side in sides.values() for p in side]
    start = [p.detach().clone() for p in parameters]
    numbers = mechanism.source(job, client, privacy)
    steps = optimizer.make(job.training, model, sides)
    model.net.train()
    with seeded(numbers.seed()), mechanism.engine(model, parameters, privacy)(model, parameters) as gradients:
        for step in range(privacy.steps):
            optimizer.set_rates(steps, job.training, (job.round + (step + 1) / privacy.steps) / job.rounds)
            drawn = mechanism.draw(numbers, len(records), privacy.rate)
            examples = [records[i][numbers.one_of(len(records[i]))] for i in drawn if len(records[i])]
            sums = clipped_sum(gradients, parameters, examples, sides, job, mechanism)
            for p, total in zip(parameters, sums, strict=True):
                noisy = mechanism.add_noise(total, privacy.noise * privacy.clip, numbers)
                p.grad = (noisy / (privacy.rate * len(records))).to(p.dtype)
            optimizer.add_proximal_gradient(parameters, start, job.training.prox)
            steps.step()
            steps.zero_grad()
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise TrainingDiverged(
            f"client {client}: the adapter is not finite after round {job.round + 1}; a train.lr below "
            f"{job.training.lr:g} may help"
        )


def clipped_sum(
    gradients: GradientFn,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    sides: Mapping[str, list[nn.Parameter]],
    job: Job,
    mechanism: Mechanism = STANDARD,
) -> Gradients:
    """Of each parameter the sum of these examples' clipped gradients, `train.batch_size` of them at a time."""
    sums = [torch.zeros_like(at_least_float32(p)) for p in parameters]
    groups, bounds = grouped(sides, privacy_of(job))
    ordered, size = sorted(examples, key=length), job.training.batch_size  # like lengths together: less padding
    for i in range(0, len(ordered), size):
        each = gradients(ordered[i : i + size])
        for total, (part,) in zip(sums, add_up(each, mechanism.clip(each, groups, bounds)), strict=True):
            total += part
        del each  # not held through the next pass
    return sums


def grouped(sides: Mapping[str, list[nn.Parameter]], privacy: PrivacyTerms) -> tuple[list[int], list[float]]:
    """The group of each parameter, 0 the factors and 1 the head, and the groups' bounds."""
    groups = [int(side == "H") for side, some in sides.items() for _ in some]
    if len(set(groups)) < 2:
        return groups, [privacy.clip, privacy.clip]
    return groups, [privacy.clip * sqrt(1 - privacy.head_share), privacy.clip * sqrt(privacy.head_share)]


def privacy_of(job: Job) -> PrivacyTerms:
    """A private job's terms."""
    if job.privacy is None:
        raise PrivacyError("this job has no terms of privacy")
    return job.privacy
