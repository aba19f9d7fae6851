"""Public benchmarks by lm-eval, with a task file and data of one's own: no network is asked."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedlora.data.schema import Schema
from fedlora.errors import ConfigError
from fedlora.models.model import Model
from fedlora.run.harness import HarnessTasks, harness, numbers
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import LABEL, make, random_adapter

TASK = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: perplexity}]
"""


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = make("llama", tmp_path / "model")
    return Model(ModelConfig(path=str(folder), device="cpu"), LoRAConfig(rank=2), Schema("text", ("text",)), seed=0)


def site(folder: Path) -> Path:
    """A folder with a task, and its data beside it."""
    rows = [{"question": f"w{i} w{i + 1}", "answer": f" w{i + 7}"} for i in range(12)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.yaml").write_text(TASK.replace("DATA", str(folder / "words.jsonl")))
    return folder


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an extra: pip install 'fedlora[eval]'")
def test_a_task_of_ones_own_is_scored_on_base_and_adapter(model: Model, tmp_path: Path) -> None:
    scores = harness(model, HarnessTasks(["words"], include_path=site(tmp_path)))
    before, after = scores(model.get_adapter()), scores(random_adapter(model, 1))
    assert before["words"].keys() == {"perplexity", "perplexity_stderr"}
    assert before["words"]["perplexity"] != after["words"]["perplexity"]  # the adapter counts
    with pytest.raises(ConfigError, match='no task "wordz"; did you mean'):
        harness(model, HarnessTasks(["wordz"], include_path=tmp_path))


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is here")
def test_without_lm_eval_the_remedy_is_named(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[eval\]'"):
        harness(model, HarnessTasks(["gsm8k"]))


def test_a_classifier_is_not_asked(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "model")
    model = Model(ModelConfig(path=str(folder), device="cpu"), LoRAConfig(rank=2), LABEL, seed=0)
    with pytest.raises(ConfigError, match="this run's model is a classifier"):
        harness(model, HarnessTasks(["gsm8k"]))


def test_scores_keep_the_name_of_their_filter() -> None:
    found = {"alias": "gsm8k", "exact_match,strict-match": 0.5, "acc,none": 1, "acc_stderr,none": "N/A", "n": 9}
    assert numbers(found) == {"exact_match,strict-match": 0.5, "acc": 1.0}
