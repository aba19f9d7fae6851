"""Public benchmarks of the Language Model Evaluation Harness (lm-eval), on a run's model with any adapter.

It is an extra, `pip install 'fedlora[eval]'`. Its tasks are those that it comes with, whose data it loads from the hub
or its cache, and those of a folder of the user's own, whose data may lie beside them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, nearest
from fedlora.lora import LoRA
from fedlora.models.model import Model

Scores = dict[str, dict[str, float]]  # task -> name of the score, as lm-eval has it -> the score
RESAMPLED = 1000  # times, for the standard errors that no formula gives


@dataclass(frozen=True)
class HarnessTasks:
    """Which tasks are done, and how much of them; the names are those of lm-eval's own options."""

    names: Sequence[str]
    include_path: Path | None = None  # a folder with task files of one's own
    limit: int | None = None  # examples of a task; none: all
    num_fewshot: int | None = None  # solved examples before a question; none: as the task says
    apply_chat_template: bool | None = None
    batch_size: int = 16


def harness(model: Model, tasks: HarnessTasks) -> Callable[[LoRA], Scores]:
    """A function that gives the scores of the model with an adapter on these tasks.

    Raises `ConfigError` where lm-eval or a task is missing, or the model writes no text.
    """
    if model.schema.has_head:
        raise ConfigError("--tasks asks a language model, and this run's model is a classifier; leave it out")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise ConfigError("--tasks needs lm-eval: pip install 'fedlora[eval]'") from e
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(tasks.include_path) if tasks.include_path else None)
    for name in tasks.names:
        if name not in manager.all_tasks:
            raise ConfigError(f'--tasks: lm-eval has no task "{name}"; {nearest(name, manager.all_tasks)}')
    asked = HFLM(pretrained=model.net, tokenizer=model.encoder.processor, batch_size=tasks.batch_size)

    def scores(lora: LoRA) -> Scores:
        model.set_adapter(lora)
        model.net.eval()
        try:
            done = simple_evaluate(
                asked,
                tasks=[*tasks.names],
                task_manager=manager,
                limit=tasks.limit,
                num_fewshot=tasks.num_fewshot,
                apply_chat_template=bool(tasks.apply_chat_template),
                bootstrap_iters=RESAMPLED,
                log_samples=False,
            )
        except (OSError, ValueError, ImportError) as e:  # data out of reach, a wrong task, a package that it needs
            raise ConfigError(f"--tasks {','.join(tasks.names)}: {' '.join(str(e).split())[:300]}") from e
        return {name: numbers(values) for name, values in done["results"].items()}

    return scores


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a task by name, with the filter behind it where there is one: `acc`, `exact_match,strict-match`."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
