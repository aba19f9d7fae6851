"""Tasks of several clients, trained on one model: those that fit together in one pass, each of the others by itself."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain

from fedlora.client import training
from fedlora.client.stacked import cohort, private, support
from fedlora.client.stacked.row_pass import NotStackableError
from fedlora.client.training import Outcome, TrainingTask
from fedlora.errors import FedloraError
from fedlora.jobs import Job
from fedlora.models.model import Model

MOST_BYTES = 4 * 2**30  # of the numbers of clients that train together, and all that is kept for each
TRAINED = 24  # bytes for a number that is trained: itself, its start, its gradient, two moments, and the job's own
FROZEN = 4  # for one that is not: each client has a copy of it all the same


def perform(model: Model, tasks: Sequence[TrainingTask], warn: Callable[[str], None]) -> Iterator[tuple[int, Outcome]]:
    """Yield the place of each task and what came of it, or whatever was raised: what becomes of that its client says.

    `warn` is told, in a sentence, why tasks are trained by themselves; it may be told the same more than once.
    """
    groups = defaultdict[Hashable, list[int]](list)
    for place, task in enumerate(tasks):
        if why := support.why_not(model, task.job):
            warn(why)
            yield place, training.outcome_of(model, task)
        else:
            groups[cohort.group(model, task)].append(place)
    for places in chain.from_iterable(_passes(tasks, places) for places in groups.values()):
        yield from zip(places, _together(model, [tasks[place] for place in places], warn), strict=True)


def memory(job: Job) -> int:
    """Bytes that a client takes in a pass; beside one of a higher rank it takes as many as that one does."""
    trained = job.start.only(job.trains).numel()
    subtracted = job.start.only("AB").numel() if job.resumes else 0  # stands beside its weights
    corrected = job.correction.only(job.trains).numel()
    return max(1, TRAINED * trained + FROZEN * (job.start.numel() - trained + subtracted + corrected))


def _passes(tasks: Sequence[TrainingTask], places: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield the places of tasks of one group, as many at a time as there is memory for."""
    size = max(1, MOST_BYTES // max(memory(tasks[place].job) for place in places))
    return (places[i : i + size] for i in range(0, len(places), size))


def _together(model: Model, tasks: Sequence[TrainingTask], warn: Callable[[str], None]) -> Iterable[Outcome]:
    """What comes of tasks that fit together: of one pass, or where that cannot be, of each by itself."""
    train = private.train if tasks[0].job.privacy else cohort.train
    try:
        return train(model, tasks)
    except NotStackableError as e:
        warn(str(e))
    except FedloraError:  # of one client, as a file that cannot be read: alone, it fails alone
        pass
    return (training.outcome_of(model, task) for task in tasks)
