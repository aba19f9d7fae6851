"""The held-out scores of many clients' own models, in one pass over the examples of all of them."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor

from fedlora.client import training
from fedlora.client.stacked.adapters import check_starts, most_rows
from fedlora.client.stacked.layout import core_forms, layout_of
from fedlora.client.stacked.row_pass import NotStackableError, RowPass
from fedlora.client.stacked.support import why_not
from fedlora.client.training import EvaluationTask
from fedlora.kernels.evaluation import measure_each
from fedlora.lora import LoRA
from fedlora.metrics import Metrics
from fedlora.models.model import Model

MOST_BYTES = 2 * 2**30  # of the adapters that are held at once


def evaluate(model: Model, tasks: Iterable[EvaluationTask]) -> list[Metrics]:
    """The metrics of every task, as `training.evaluate` finds them one by one."""
    return list(chain.from_iterable(_evaluated(model, portion) for portion in _portions(tasks)))


def _portions(tasks: Iterable[EvaluationTask]) -> Iterator[list[EvaluationTask]]:
    """Yield the tasks in order, so many at a time that what their clients keep is in memory together."""
    portion, held = list[EvaluationTask](), 0
    for task in tasks:
        portion.append(task)
        held += 4 * task.kept.numel()
        if held >= MOST_BYTES:
            yield portion
            portion, held = [], 0
    if portion:
        yield portion


def _evaluated(model: Model, tasks: Sequence[EvaluationTask]) -> list[Metrics]:
    found: dict[int, Metrics] = {}
    for places in _blocks(model, tasks):
        found |= zip(places, _together(model, [tasks[i] for i in places]), strict=True)
    return [found[i] for i in range(len(tasks))]


def _blocks(model: Model, tasks: Sequence[EvaluationTask]) -> Iterator[list[int]]:
    """Yield the places of tasks that are measured together, as many as there is memory for."""
    groups = defaultdict[Hashable, list[int]](list)
    for i, task in enumerate(tasks):
        groups[tuple(map(id, task.job.offset)), core_forms(task.job.start)].append(i)
    for places in groups.values():
        starts = {id(tasks[i].job.start): tasks[i].job.start for i in places}.values()
        numbers = 2 * max(start.numel() for start in starts)  # all take what the highest rank does; twice, to resume
        size = max(1, MOST_BYTES // max(1, 4 * numbers))
        yield from (places[i : i + size] for i in range(0, len(places), size))


def _together(model: Model, tasks: Sequence[EvaluationTask]) -> list[Metrics]:
    """The metrics of tasks that have the same weights beside their adapters."""
    first = tasks[0].job
    if all(task.job.start is first.start and task.job.gain == first.gain and not task.kept for task in tasks):
        training.load_start(model, first, LoRA())
        return measure_each(model, [task.examples for task in tasks])  # they all have the same model
    if why_not(model, first) is None:
        try:
            return _stacked(model, tasks)
        except NotStackableError:  # as the training of these clients has said already
            pass
    return [training.evaluate(model, task.job, task.examples, task.kept) for task in tasks]


def _stacked(model: Model, tasks: Sequence[EvaluationTask]) -> list[Metrics]:
    """The metrics of these tasks in one pass, every row with the adapter of its client."""
    jobs = [task.job for task in tasks]
    starts, taken = zip(*(training.start_of(task.job, task.kept) for task in tasks), strict=True)
    check_starts(model, starts)
    layout = layout_of(starts, "", taken)
    flat = [layout.flat(*pair, model.adapter_dtype) for pair in zip(starts, taken, strict=True)]
    theta = torch.stack(flat).to(model.device)
    model.offset.set(jobs[0].offset)
    model.net.eval()
    gains = [job.gain for job in jobs]
    with RowPass(model, layout, gains) as rows:
        for example in islice(chain.from_iterable(task.examples for task in tasks), 1):
            rows.check(theta, example)

    @contextmanager
    def telling(model: Model) -> Iterator[Callable[[Tensor], None]]:
        with RowPass(model, layout, gains) as rows:
            yield partial(rows.assign, theta)

    return measure_each(model, [task.examples for task in tasks], telling, most_rows(layout, theta))
