"""The README.md of what is delivered: the hub's metadata, true of the run, with nothing of this machine in it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import PeftConfig

from fedlora import Result, simulate
from fedlora.errors import ConfigError
from fedlora.models.source import BaseName, base_name
from fedlora.run.directory import RunDirectory
from fedlora.run.export import ExportOptions, export
from fedlora.sections import ModelConfig
from tests.support.models import make

Run = Callable[..., Result]
NAMES = "no;maybe;yes"
NASTY = "may`be|<b>\n---\nbase_model: x"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of one round; not to be written to."""
    site = tmp_path_factory.mktemp("secret-place")

    @cache
    def one(kind: str, noise: float = 0, strategy: str = "fedavg", ranks: str = "", names: str = NAMES) -> Result:
        rows = [{"text": f"w{i % 7} w{i % 5}", "label": names.split(";")[i % 3]} for i in range(40)]
        data = site / f"{len(list(site.iterdir()))}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = site / kind
        settings: dict[str, Any] = {
            "model.path": str(model if model.exists() else make(kind, model)),
            "data.path": str(data),
        }
        settings |= {"model.task": "classify" if kind == "bert" else "lm", "dp.noise": noise, "rounds": 1}
        settings |= {"strategy": strategy, "lora.ranks": ranks, "model.head": "local" if ranks else "shared"}
        settings |= {"train.batch_size": 4, "lora.rank": 3, "clients": 2, "cohort": 2, "threads": 1}
        return simulate(settings, out=site / f"run-{len(list(site.iterdir()))}", progress=False)

    return one


def test_the_hub_reads_what_the_run_was(run: Run) -> None:
    done = run("bert", 1.0)
    card = ModelCard.load(done.adapter / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-classification"
    assert data["tags"] == ["lora", "federated-learning", "fedlora"] and data["metrics"] == ["accuracy", "f1", "loss"]
    results = {result.metric_name: result.metric_value for result in card.data.eval_results or ()}
    assert results == pytest.approx(dict(done.evaluation), rel=1e-4)
    spent = done.rounds[-1]["epsilon"]
    assert f"one record of one client: epsilon {spent:.3g} at delta 1e-05" in card.text
    assert "FedIT (fedavg), https://arxiv.org/abs/2305.05644" in card.text and "1 of 1" in card.text


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_nothing_delivered_names_a_place_on_this_machine(run: Run, form: str, tmp_path: Path) -> None:
    """The base goes by the fingerprint of its weights, in the card as in PEFT's configuration."""
    done = run("bert", 1.0)
    export(done.folder, form, out=tmp_path / "out")
    texts = [p.read_bytes() for folder in (done.adapter, tmp_path / "out") for p in folder.iterdir()]
    assert not [text for text in texts if b"secret-place" in text or str(tmp_path).encode() in text]
    config = json.loads((done.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith("fedlora-fingerprint:")
    fingerprint = config["base_model_name_or_path"].partition(":")[2]
    assert all(f"`{fingerprint}`" in (f / "README.md").read_text() for f in (done.adapter, tmp_path / "out"))
    assert "base_model" not in ModelCard.load(done.adapter / "README.md").data.to_dict()


def test_the_lines_of_the_card_load_the_adapter(run: Run) -> None:
    done = run("bert", 1.0)
    lines = (done.adapter / "README.md").read_text().split("```python\n")[2].split("```")[0]
    base = RunDirectory(done.folder).config()["model.path"]
    found: dict[str, Any] = {}
    exec(lines.replace('"BASE"', repr(base)).replace("PATH/TO/THIS/FOLDER", str(done.adapter)), found)
    assert type(found["model"]).__name__ == "PeftModelForSequenceClassification"


def test_names_of_classes_stay_text_in_the_card(run: Run) -> None:
    text = (run("bert", names=f"no;{NASTY};yes").adapter / "README.md").read_text()
    literal = next(line for line in text.splitlines() if line.startswith("classes = "))
    assert NASTY in eval(literal.removeprefix("classes = ").partition("  #")[0])
    assert text.count("```") == 4 and "base_model: x" not in text.splitlines()


def test_a_hub_id_that_the_user_names_is_in_card_and_configuration(run: Run, tmp_path: Path) -> None:
    out = export(run("llama").folder, "adapter", out=tmp_path / "out", options=ExportOptions(base_model="org/base"))
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data["base_model"] == "org/base" and "base_model:adapter:org/base" in data["tags"]
    assert PeftConfig.from_pretrained(str(out)).base_model_name_or_path == "org/base"
    text = (out / "README.md").read_text()
    assert "vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules" in text and "llama-cli -m" in text


def test_a_clients_own_model_has_no_figures_of_the_common_one(run: Run, tmp_path: Path) -> None:
    out = export(run("bert", strategy="dual").folder, "per-client", out=tmp_path / "out")
    card = ModelCard.load(out / "client-1" / "README.md")
    assert "This is not the federation's common model: it is of client 1 alone." in card.text
    assert not card.data.eval_results and "How good it is" not in card.text


def test_all_clients_adapters_can_have_one_rank(run: Run, tmp_path: Path) -> None:
    """The logits stay those of the run, as an export verifies, for the rank is filled up with zeros."""
    folder = run("bert", strategy="flora", ranks="1,3").folder
    for options, ranks in ((ExportOptions(), {5, 7}), (ExportOptions(uniform_rank=True), {7})):
        out = export(folder, "per-client", out=tmp_path / str(len(ranks)), options=options)
        assert {PeftConfig.from_pretrained(str(one)).r for one in out.iterdir()} == ranks
    with pytest.raises(ConfigError, match="--uniform-rank: --as adapter writes one model, whose modules have one rank"):
        export(folder, "adapter", options=ExportOptions(uniform_rank=True))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/model", BaseName("org/model", "v1", "f")),
        ("models--org--model/snapshots/0a1b", BaseName("org/model", "0a1b", "f")),
        ("models--gpt2/snapshots/0a1b", BaseName("gpt2", "0a1b", "f")),
        ("mine", BaseName("", "", "f")),
        ("", BaseName("", "", "f")),
    ],
)
def test_a_base_has_the_name_that_others_know(path: str, name: BaseName, tmp_path: Path) -> None:
    """Its hub id, where it came from the hub, by its id or in the hub's cache; a folder is known by its weights."""
    on_disk = path and path != "org/model"
    if on_disk:
        (tmp_path / path).mkdir(parents=True)
    given = str(tmp_path / path) if on_disk else path
    assert base_name(ModelConfig(path=given, revision="v1" if path == "org/model" else ""), "f") == name
