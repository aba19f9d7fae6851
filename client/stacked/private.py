"""DP-SGD of many clients in one pass: what `dpsgd.train` does for one, with the same parts of the mechanism.

A row of G is one record's gradient, whoever's it is. It is clipped by itself, and added to the sum of its own client:

    sum_k = sum of g_j min(1, C / |g_j|) over the records j that client k drew
    client k steps along (sum_k + noise) / (q_k N_k)

Each client draws its records and its noise from a source of its own; no other client's records, nor how many there
are, change what it draws. Of what is shared, nothing has a say in a client's sum but by the rounding of float32: rows
are cut into micro-batches by the lengths of all, and dropout is drawn from one stream for the pass. Its key is made of
keys from all clients' sources, so that it is secret as long as one of them is: whose masks shift when a record is added
then tells nobody anything (see `dpsgd`).

A pass that breaks off for whatever one client's records are would fail all, and tell them of it. So every client is
then trained by itself, and the one fails alone; nothing has left the pass, and its noise is not used again.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from hashlib import sha256
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedlora.client import training
from fedlora.client.stacked import support
from fedlora.client.stacked.adapters import Adapters
from fedlora.client.stacked.cohort import with_data
from fedlora.client.stacked.layout import layout_of
from fedlora.client.stacked.row_pass import NotStackableError, RowPass
from fedlora.client.stacked.row_passes import RowPasses
from fedlora.client.training import Outcome, TrainingTask
from fedlora.encoding.encoder import Example
from fedlora.errors import PrivacyError, TrainingDiverged
from fedlora.jobs import Job
from fedlora.kernels.example_batches import micro_batches
from fedlora.kernels.threads import side_by_side
from fedlora.lora import LoRA, from_matrices
from fedlora.models.model import Model
from fedlora.privacy import dpsgd, preflight
from fedlora.privacy.dpsgd import privacy_of
from fedlora.privacy.noise import secret_draws
from fedlora.privacy.per_sample_gradients import Gradients

COMPANY = 2  # made-up records of another client, in whose pass the checked ones are
log = logging.getLogger("fedlora")
_passed: WeakKeyDictionary[Model, set[tuple[object, ...]]] = WeakKeyDictionary()


def train(model: Model, tasks: Sequence[TrainingTask]) -> list[Outcome]:
    """The update and the kept sides of every private task, or its client's error; all tasks are of one group.

    Raises `NotStackableError`, before any record is read, where the records of a pass cannot be told apart.
    """
    check_once(model, tasks[0].job)
    return with_data(tasks, partial(_train, model))


def _train(model: Model, tasks: Sequence[TrainingTask]) -> list[Outcome]:
    try:
        return _train_together(model, tasks)
    except Exception:  # whatever it is: it may be for one client's records alone
        log.warning("a pass over private clients broke off; each is trained by itself", exc_info=True)
        return [training.outcome_of(model, task) for task in tasks]


def _train_together(model: Model, tasks: Sequence[TrainingTask]) -> list[Outcome]:
    if not tasks:
        return []
    cohort = PrivateCohort(model, tasks)
    with cohort.adapters.training(model, secret_draws(cohort.dropout_key())):
        for step in range(max(cohort.adapters.steps)):
            cohort.step(step)
    return [cohort.result(place) for place in range(len(tasks))]


class PrivateCohort:
    """Private clients in the middle of their training."""

    def __init__(self, model: Model, tasks: Sequence[TrainingTask]) -> None:
        self._model, self._tasks, job = model, tasks, tasks[0].job
        self._terms = [privacy_of(task.job) for task in tasks]
        self._random = [t.mechanism.source(t.job, t.client, p) for t, p in zip(tasks, self._terms, strict=True)]
        self.adapters = Adapters(model, tasks, [p.steps for p in self._terms])
        self._turn_to(job.trains)
        self._clip = tasks[0].mechanism.clip
        self._losses: list[tuple[Tensor, Tensor]] = []  # place of each record's client, and its loss
        self._gradients = reduce(lambda inner, task: task.mechanism.rows(inner), tasks, self._of_records)
        for place, task in enumerate(tasks):
            task.mechanism.watch(partial(self.adapters.lora, place))

    def dropout_key(self) -> bytes:
        """The key of the pass's dropout, which nobody knows who does not know the source of every client."""
        return sha256(b"".join(random.key() for random in self._random)).digest()

    def _turn_to(self, sides: str) -> None:
        """Let these sides be those that are clipped together, noised and followed."""
        job = self._tasks[0].job
        names = {side: list(job.start.side(side)) for side in job.trains if side in sides}
        self._keys = [(side, module) for side, modules in names.items() for module in modules]
        self._groups, self._bounds = dpsgd.grouped(names, self._terms[0])

    def step(self, step: int) -> None:
        """Do the same step of all clients that have one left."""
        self.adapters.turn_to(step)
        self._turn_to(self._tasks[0].job.sides_of(step))
        places = self.adapters.places(step)
        drawn = [self._draw(place) for place in places]
        owners = [place for place, own in zip(places, drawn, strict=True) for _ in own]
        sums = self._clipped_sums(list(chain.from_iterable(drawn)), owners).cpu()
        means = side_by_side(lambda place: self._noisy_mean(place, sums[place]), places)  # each from its own source
        for place, mean in zip(places, means, strict=True):
            self.adapters.set_gradient(place, mean)
        self.adapters.step(step)

    def _draw(self, place: int) -> list[Example]:
        task = self._tasks[place]
        rate = self._terms[place].rate
        return dpsgd.draw_examples(task.records, task.mechanism, self._random[place], rate=rate)

    def _clipped_sums(self, examples: Sequence[Example], owners: Sequence[int]) -> Tensor:
        """The sum of the clipped gradients of each client's records: (clients, P_t)."""
        sums, layout = torch.zeros_like(self.adapters.gradient), self.adapters.layout

        def clipped(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
            owner = torch.tensor([owners[i] for i in chosen], device=sums.device)
            gradient = self._gradients([examples[i] for i in chosen], owner)
            by_matrix = [layout.view(gradient, key) for key in self._keys]  # the same memory
            factors = self._clip(by_matrix, self._groups, self._bounds)
            for g, factor in zip(by_matrix, factors, strict=True):
                g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))
            return owner, gradient

        batches = micro_batches(self._model, examples, self.adapters.most_rows)
        for owner, gradient in self.adapters.rows.each(clipped, batches):
            sums.index_add_(0, owner, gradient)
        return sums

    def _of_records(self, examples: Sequence[Example], owner: Tensor) -> Tensor:
        """The gradient of each example's own mean loss: (examples, P_t); the losses are kept."""
        gradient, losses = gradients_and_losses(self._model, self.adapters.rows, self.adapters.theta, owner, examples)
        self._losses.append((owner, losses))
        return gradient

    def _noisy_mean(self, place: int, total: Tensor) -> LoRA:
        """What a client steps along: its sum with noise, over the expected count of its records."""
        task, terms, random = self._tasks[place], self._terms[place], self._random[place]
        deviation, expected = terms.noise * terms.clip, terms.rate * len(task.records)
        own = self.adapters.of_trained(total, place)

        def noisy(t: Tensor) -> Tensor:
            return task.mechanism.add_noise(t, deviation=deviation, random=random) / expected

        return from_matrices((s, m, noisy(own.side(s)[m])) for s, m in self._keys)

    def result(self, place: int) -> Outcome:
        """What became of one task, once all steps are done."""
        task = self._tasks[place]
        after = self.adapters.lora(place)
        try:
            dpsgd.refuse_infinite((t for _, _, t in after.only(task.job.trains).matrices()), task.job)
        except TrainingDiverged as e:
            return e
        return self.adapters.update(place, len(task.records), self._mean_loss(place) if task.job.metrics else None)

    def _mean_loss(self, place: int) -> float | None:
        """The mean loss of the records that a client drew in all steps, as it may be told."""
        task, own = self._tasks[place], (losses[owner == place].tolist() for owner, losses in self._losses)
        return dpsgd.told_loss(chain.from_iterable(own), records=len(task.records), fewest=task.fewest_told)


def gradients_and_losses(
    model: Model, rows: RowPass | RowPasses, theta: Tensor, owner: Tensor, examples: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """The gradient of each example's mean loss over its own targets, (examples, P_t), and that loss, (examples,).

    Each is by its client's row of theta.
    """
    weights = torch.tensor([1 / max(model.targets([example]), 1) for example in examples], dtype=torch.float64)
    gradient, losses = rows.gradients(theta, owner, weights.to(theta), examples)
    return gradient, losses * weights.to(losses)


def why_not(model: Model, job: Job) -> str:
    """The sentence that says why a private job has to be trained by itself, the checks being done; empty if not."""
    if why := support.why_not(model, job):
        return why
    try:
        check_once(model, job)
    except NotStackableError as e:
        return str(e)
    return ""


def check_once(model: Model, job: Job) -> None:
    """Put the pass to the checks of `preflight`, once for a model and what is trained.

    Raises `NotStackableError`, naming the module, where it does not pass.
    """
    ranks = preflight.ranks(job.start)
    passed = _passed.setdefault(model, set())
    for sides in job.each_turn:
        if (sides, ranks, job.training.loss) not in passed:
            alone = replace(job, trains=sides, turns=())
            try:
                preflight.check(model, alone, engine=partial(StackedGradients, alone))
            except PrivacyError as e:
                raise NotStackableError(str(e)) from e
            passed.add((sides, ranks, job.training.loss))


class StackedGradients:
    """An engine of single gradients for the checks: one pass over these records and some of another client's."""

    def __init__(self, job: Job, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._shapes = model, [p.shape for p in parameters]
        own = model.get_adapter()
        pair = [own, preflight.random_start(own)]
        self._layout = layout_of(pair, job.trains)
        self._theta = torch.stack([self._layout.flat(lora, LoRA(), model.adapter_dtype) for lora in pair])
        self._theta = self._theta.to(model.device)
        self._keys = [(side, module) for side in job.trains for module in own.side(side)]
        self._rows = RowPass(model, self._layout, [job.gain, job.gain])
        self._company = preflight.synthetic(model.encoder, COMPANY)

    def __enter__(self) -> "StackedGradients":
        self._rows.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.__exit__(*error)

    def __call__(self, examples: Sequence[Example]) -> Gradients:
        n = len(examples)
        owner = torch.tensor([0] * n + [1] * COMPANY, device=self._theta.device)
        found = gradients_and_losses(self._model, self._rows, self._theta, owner, [*examples, *self._company])[0][:n]
        views = [self._layout.view(found, key) for key in self._keys]
        turned = [v.transpose(1, 2) if side == "B" else v for v, (side, _) in zip(views, self._keys, strict=True)]
        return [v.reshape(n, *shape) for v, shape in zip(turned, self._shapes, strict=True)]
