"""`fedlora.simulate`: a run as a function, with the names of the command."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedlora
import fedlora.config
from fedlora import (
    Client,
    Config,
    ConfigError,
    Job,
    LoRA,
    Result,
    StopRun,
    Strategy,
    StrategyError,
    open_run,
    simulate,
)
from fedlora.config import SHORT, build, settings
from fedlora.lora import average
from tests.cli.test_simulate import fedlora as command
from tests.support.models import make


@dataclass(frozen=True)
class Pulled(Strategy[LoRA]):
    """Pulled: the mean of B, drawn towards zero. https://example.org"""

    pull: float = 0.0

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, trains="BH", shares="BH")

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        mean = average(updates, weights)
        return LoRA(B={m: (1 - self.pull) * b for m, b in mean.B.items()}, H=mean.H).over(state)

    def adapter(self, state: LoRA) -> LoRA:
        return state


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keywords of a run that takes a second."""
    folder = tmp_path_factory.mktemp("api")
    rows = [{"text": f"w{i % 7} w{i % 5}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": make("bert", folder / "model"),
        "data": folder / "train.jsonl",
        "clients": 4,
        "cohort": 2,
        "rounds": 2,
        "threads": 1,
        "train": {"lr": 0.01, "steps": 2, "batch_size": 4},
        "lora": {"rank": 3},
        "progress": False,
    }


@pytest.fixture(scope="module")
def done(given: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return simulate(**given, out=tmp_path_factory.mktemp("runs") / "run")


def same(one: Result, other: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one.adapter, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_importing_fedlora_does_not_import_torch() -> None:
    code = "import sys, fedlora; fedlora.ConfigError; dir(fedlora); print('torch' in sys.modules); fedlora.LoRA"
    code += "; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "False\nTrue\n"


def test_every_public_name_is_there() -> None:
    assert {*fedlora.__all__} <= {*dir(fedlora)}
    assert all(getattr(fedlora, name).__name__ == name for name in fedlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        fedlora.simulat  # noqa: B018


def test_it_returns_what_lies_in_the_run_directory(done: Result) -> None:
    lines = (done.folder / "rounds.jsonl").read_text().splitlines()
    assert list(done.rounds) == [json.loads(line) for line in lines] and len(lines) == 2
    assert (done.adapter / "adapter_config.json").is_file()
    assert done.evaluation == done.rounds[1]["eval"] and done.before == done.rounds[0]["before"]


def test_it_is_the_commands_run(done: Result, given: Mapping[str, Any], tmp_path: Path) -> None:
    words = ["--model", given["model"], "--data", given["data"], "--clients", "4", "--cohort", "2", "--rounds", "2"]
    words += ["--threads", "1", "--train.lr", "0.01", "--train.steps", "2", "--train.batch_size", "4"]
    assert command("simulate", *words, "--lora.rank", "3", "--out", tmp_path / "run").returncode == 0
    assert same(done, tmp_path / "run" / "adapter")


def test_a_run_is_opened_again_and_is_a_table(done: Result) -> None:
    assert open_run(done.folder) == done
    frame, clients = done.frame(), done.clients()
    assert list(frame["round"]) == [0, 1, 2] and frame["eval/loss"].iloc[-1] == done.evaluation["loss"]
    assert len(clients) == 4 and clients["train_loss"].notna().all()
    with pytest.raises(ConfigError, match="is no run directory"):
        open_run(done.folder.parent)


def test_every_round_calls_and_may_end_the_run(given: Mapping[str, Any], tmp_path: Path) -> None:
    seen: list[int] = []

    def until_the_second(record: Mapping[str, Any]) -> None:
        seen.append(record["round"])
        if record["round"] == 2:
            raise StopRun

    made = simulate(**given | {"rounds": 5}, on_round=until_the_second, out=tmp_path / "run")
    assert seen == [1, 2] and len(made.rounds) == 2 and (made.adapter / "adapter_config.json").is_file()
    assert [r["round"] for r in simulate(resume=made.folder, rounds=3, progress=False).rounds] == [1, 2, 3]


def test_what_a_function_of_each_round_raises_is_the_callers(given: Mapping[str, Any], tmp_path: Path) -> None:
    def fails(record: Mapping[str, Any]) -> None:
        raise ZeroDivisionError(record["round"])

    with pytest.raises(ZeroDivisionError):
        simulate(**given, on_round=fails, out=tmp_path / "run")
    assert (tmp_path / "run" / "adapter").is_dir() and len(open_run(tmp_path / "run").rounds) == 1


def test_data_and_model_may_be_objects_and_the_run_goes_on_with_them(given: Mapping[str, Any], tmp_path: Path) -> None:
    """Two clients, each with rows of its own, and a model with its tokenizer."""
    rows = [json.loads(line) for line in Path(given["data"]).read_text().splitlines()]
    net = AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=3)
    known = AutoTokenizer.from_pretrained(given["model"])
    own = {"data": {"path": [rows[:30], rows[30:50]], "holdout": 0.2}, "eval_data": rows[50:]}
    small = {key: value for key, value in given.items() if key not in ("data", "model", "clients", "cohort")}
    made = simulate(**small, **own, model=net, tokenizer=known, out=tmp_path / "run")
    assert made.clients()["client"].nunique() == 2 and made.evaluation
    assert len(simulate(resume=made.folder, rounds=3, progress=False).rounds) == 3
    kept = fedlora.config.read(made.folder / "config.toml")
    assert Path(kept["data.path"]) == made.folder.absolute() / "given" / "data" and kept["data.partition"] == "files"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rounds": [{"text": "a"}]}, "rounds is given rows, which it does not take"),
        (
            {"model": torch.nn.Linear(2, 2), "tokenizer": 3},
            "the model is a Linear, and a run takes one of transformers",
        ),
        ({"tokenizer": 3}, "tokenizer goes with a model that is given as an object"),
        ({"data": [{"text": "a"}, {"text": 5}]}, "its rows cannot be kept as a table"),
    ],
)
def test_an_object_in_the_wrong_place_is_one_sentence(wrong: Mapping[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(fedlora.FedloraError, match=says):
        simulate(**wrong, out=tmp_path / "run", progress=False)
    assert not [*tmp_path.glob("run/*")]


def test_settings_are_a_mapping_a_file_or_a_config_alike(
    done: Result, given: Mapping[str, Any], tmp_path: Path
) -> None:
    toml = done.folder / "config.toml"
    whole = build(fedlora.config.read(toml))
    assert isinstance(whole, Config)
    sections = {key: value for key, value in given.items() if key != "progress"}
    for number, config in enumerate((toml, str(toml), whole, sections)):
        assert same(done, simulate(config, out=tmp_path / str(number), progress=False).adapter)


def test_dotted_keys_and_later_keywords_win(given: Mapping[str, Any], tmp_path: Path) -> None:
    made = simulate({"seed": 3, "rounds": 5}, **given, **{"dp.unit": "example"}, seed=4, out=tmp_path / "run")
    kept = fedlora.config.read(made.folder / "config.toml")
    assert (kept["seed"], kept["rounds"], kept["dp.unit"]) == (4, 2, "example")


def test_it_can_be_called_in_a_thread_and_twice(done: Result, given: Mapping[str, Any], tmp_path: Path) -> None:
    made: list[Result] = []
    for name in ("one", "two"):
        thread = Thread(target=lambda name=name: made.append(simulate(**given, out=tmp_path / name)))
        thread.start()
        thread.join()
    assert len(made) == 2 and all(same(done, result.adapter) for result in made)


def test_a_run_goes_on_with_more_rounds(given: Mapping[str, Any], tmp_path: Path) -> None:
    begun = simulate(**given, out=tmp_path / "run")
    more = simulate(resume=begun.folder, rounds=3, progress=False)
    assert more.folder == begun.folder and [r["round"] for r in more.rounds] == [1, 2, 3]
    assert more.rounds[:2] == begun.rounds
    with pytest.raises(ConfigError, match="leave config and out away"):
        simulate(resume=begun.folder, out=tmp_path / "other")


@pytest.mark.parametrize("strategy", [Pulled(pull=1.0), Pulled, f"{__name__}:Pulled"], ids=["made", "class", "path"])
def test_a_strategy_of_ones_own_is_given_as_it_is(strategy: Any, given: Mapping[str, Any], tmp_path: Path) -> None:
    made = simulate(**given, strategy=strategy, out=tmp_path / "run")
    numbers = load_file(made.adapter / "adapter_model.safetensors")
    pulled = not any(t.any() for name, t in numbers.items() if "lora_B" in name)
    assert pulled == isinstance(strategy, Pulled)
    assert len(simulate(resume=made.folder, rounds=3, progress=False).rounds) == 3


def test_a_strategy_that_cannot_be_found_again_is_refused(given: Mapping[str, Any], tmp_path: Path) -> None:
    class Hidden(Pulled):
        pass

    with pytest.raises(StrategyError, match=r"strategy Hidden is not to be found as .*; define it at the top of"):
        simulate(**given, strategy=Hidden(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"clint": 5}, 'unknown key "clint"; did you mean "clients"?'),
        ({"evaldata": "x"}, 'unknown key "evaldata"; did you mean "eval_data"?'),
        ({"train": {"lrr": 1}}, 'unknown key "train.lrr"; did you mean "train.lr"?'),
        ({"train": 3}, 'unknown key "train"; did you mean "train.'),
        ({"strategy": "fedaxg"}, 'did you mean "fedavg"'),
        ({"train.lr": -1}, "train.lr = -1: input should be greater than 0"),
        ({"dp_noise": 0}, "dp.noise = 0 adds no noise"),
    ],
)
def test_a_wrong_keyword_is_one_sentence(wrong: Mapping[str, Any], says: str) -> None:
    with pytest.raises(fedlora.FedloraError) as error:
        simulate(**wrong)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_every_short_name_stands_for_a_setting() -> None:
    assert {*SHORT.values()} <= {setting.key for setting in settings()}


def test_progress_is_shown_or_not(given: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate(**given, out=tmp_path / "silent")
    assert capsys.readouterr().out == ""
    simulate(**given | {"progress": True}, out=tmp_path / "told")
    assert "2/2" in (said := capsys.readouterr().out) and f"adapter: {tmp_path}/told/adapter" in said


def test_what_the_page_on_training_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/training.md: a loss, a regulariser, an optimizer and a figure of one's own."""
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    cells = ModuleType("cells")
    monkeypatch.setitem(sys.modules, "cells", cells)
    with chdir(tmp_path):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(compile(block, "docs/training.md", "exec"), cells.__dict__)
    assert 0 < cells.result.evaluation["in_top_ten"] < 1
    kept = [
        fedlora.config.read(run / "config.toml")["train.optimizer"] for run in sorted((tmp_path / "runs").iterdir())
    ]
    assert sorted(kept) == ["adamw", "adamw", "adamw", "cells:Lion"]


def test_code_that_a_resumed_run_would_not_find_is_refused(given: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"train.loss: .*<lambda> is not to be found at the top of tests.test_api"):
        simulate(**given | {"train": {"loss": lambda scores, targets: scores}})


def test_what_the_guide_shows_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/python.md, one block after the other, as the cells of a notebook."""
    guide = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    (tmp_path / "run.toml").write_text(
        "clients = 10\ncohort = 2\nthreads = 1\n[train]\nsteps = 1\n[data]\neval_limit = 8\n"
    )
    cells = ModuleType("cells")
    monkeypatch.setitem(sys.modules, "cells", cells)
    with chdir(tmp_path):
        for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
            exec(compile(block, "docs/python.md", "exec"), cells.__dict__)
        assert isinstance(cells.result, Result) and cells.result.folder.name.endswith("Shrunk")
    assert 'unknown key "clint"; did you mean "clients"?' in capsys.readouterr().out
    assert [r["round"] for r in simulate(resume=tmp_path / "runs" / "mine", progress=False).rounds] == [1, 2, 3, 4, 5]
    assert type(fedlora.load("fedex_lora", assignment="keep")).__name__ == "FedEx"
