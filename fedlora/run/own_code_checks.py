"""Code of the user's own, tried before the first round: a mistake in it is a sentence then, and not a failed client."""

import torch
from torch import nn

from fedlora.config import Config
from fedlora.errors import ConfigError
from fedlora.lora import LoRA, map_factors
from fedlora.metrics import HEADLINES
from fedlora.models import optimizer
from fedlora.models.added_gradients import regulariser_gradients
from fedlora.models.model import Model
from fedlora.own_code import find_own
from fedlora.privacy.preflight import mixes_losses, refuse_mixed_losses
from fedlora.sections import Training

TAKEN = (  # names of other figures of a model, or of a client in a round
    *("loss", "token_accuracy", "macro_f1", "subset_accuracy", "pearson", "spearman", "margin"),
    *("chosen_reward", "rejected_reward", "rank", "examples", "train_loss", "heldout"),
)


def check_training(model: Model, start: LoRA, config: Config) -> None:
    """Call the code that the clients' training is to run once, on made-up records and copies of the start.

    Raises `ConfigError` for what cannot be imported or fails, `PrivacyError` for a loss that no clip bounds.
    """
    training = config.train
    for key, path in training.own_code.items():
        find_own(key, path)
        _check_other_processes_find(key, path, config.engine)
    if config.dp.by_record:
        refuse_mixed_losses(model, training)
    mixes_losses(model, training)
    if training.regulariser:
        free = map_factors(lambda t: t.clone().requires_grad_(), start)
        regulariser_gradients(training.regulariser, free, start, [t for _, _, t in free.matrices()])
    if "train.optimizer" in training.own_code:
        _try_optimizer(training)


def _check_other_processes_find(key: str, path: str, engine: str) -> None:
    if engine == "flower" and path.startswith("__main__:"):
        raise ConfigError(
            f"{key} = {path} stands in a notebook or script, where the workers of engine = flower do not find it; put "
            "it into a module, or take engine = stacked"
        )


def _try_optimizer(training: Training) -> None:
    p = nn.Parameter(torch.ones(2, 3))
    made = optimizer.of_groups(training, [(training.lr, p)])
    p.grad = torch.ones(2, 3)
    try:
        made.step()
    except Exception as e:  # whatever a user's code raises
        raise ConfigError(
            f"train.optimizer = {training.optimizer} takes no step by itself: {type(e).__name__}: {e}"
        ) from e


def check_metric(path: str) -> None:
    """Raise `ConfigError` for a figure of the user's own that cannot be imported, or has the name of another."""
    name = path.partition(":")[2]
    if name in (*HEADLINES, *TAKEN):
        raise ConfigError(
            f'eval.target_metric = "{path}": "{name}" is the name of a figure of the run; give it another'
        )
    if path:
        find_own("eval.target_metric", path)
