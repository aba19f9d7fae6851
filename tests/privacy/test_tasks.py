"""Private training of every task: gradients of single records, and one record moves the sum by the clip at most."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.data.schema import Schema
from fedlora.jobs import Job, PrivacyTerms
from fedlora.models.model import Model
from fedlora.privacy import preflight
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support import encoder_decoders, models

TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=1, delta=1e-5)
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:.*sensitivity")
NAMES = ("joy", "anger", "fear")
TASKS: dict[str, tuple[Callable[[str, Path], Path], str, Schema]] = {
    "regression": (models.make, "bert", Schema("label", ("text", "label"), target="number")),
    "regression by a decoder": (models.make, "llama-cls", Schema("label", ("text", "label"), target="number")),
    "several labels": (models.make, "bert", Schema("label", ("text", "label"), NAMES, target="labels")),
    "several labels of images": (models.make, "vit", Schema("image", ("image", "label"), NAMES, target="labels")),
    "T5": (encoder_decoders.make, "t5", Schema("response", ("prompt", "response"))),
    "BART": (encoder_decoders.make, "bart", Schema("response", ("prompt", "response"))),
}


@pytest.mark.parametrize("task", TASKS)
def test_records_of_every_task_are_kept_apart(task: str, tmp_path: Path) -> None:
    make, kind, schema = TASKS[task]
    lora = LoRAConfig(rank=3, targets=("all-linear",))
    model = Model(ModelConfig(path=str(make(kind, tmp_path)), max_length=24), lora, schema, seed=1)
    found = preflight.check(model, Job(model.get_adapter(), privacy=TERMS))
    assert found.error < 1e-4 and 0.999 < found.sensitivity < 1.001
