"""How far a client may move in a round: the norm of its change, as it is and beside the others'."""

from math import hypot, inf, isfinite
from statistics import median

from fedlora.errors import WireError
from fedlora.jobs import Job, shared_start
from fedlora.lora import LoRA, difference, euclidean_norm, norm


def update_norm(lora: LoRA, job: Job) -> float:
    """The norm of what a client changed: of all the numbers it sends, or of a product where it sends its change."""
    if not job.resumes:
        return euclidean_norm(difference(lora, shared_start(job)))
    return hypot(norm(lora.only("AB")), euclidean_norm(difference(lora.only("HRD"), shared_start(job))))


def check_norm(step: float, largest: float) -> None:
    """Raise `WireError` for a change that is not finite, or has a norm above the largest."""
    if not (isfinite(step) and step <= largest):
        raise WireError(f"an update's change has norm {step:.4g}; server.largest_step = {largest:g}")


class MedianStep:
    """The norms of a round's changes so far, and what is too far beside them.

    The median is that of the majority: a minority of clients, however far it goes, moves it no further than the
    furthest of the others.
    """

    def __init__(self, ratio: float = inf) -> None:
        """`ratio`: over the median, above which a change is too far."""
        self._ratio = ratio
        self._steps: list[float] = []

    def add(self, step: float) -> None:
        """Take in the norm of a change."""
        self._steps.append(step)

    def refusal(self, step: float) -> str:
        """Why a change of this norm is too far; empty where it is not. Where most stand still, none is too far."""
        middle = median(self._steps)
        if not middle or step <= self._ratio * middle:
            return ""
        return (
            f"an update's change has norm {step:.4g}, {step / middle:.4g} times the median of its round; "
            f"server.step_ratio = {self._ratio:g}"
        )
