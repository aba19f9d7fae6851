"""Generated answers in a run: scored, kept and shown, and refused in a sentence where there is nothing to answer."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora import Result, simulate
from fedlora.cli.app import app
from fedlora.errors import ConfigError, StrategyError
from fedlora.run.answers import own_metric, spread_evenly
from fedlora.run.console import answers_line
from fedlora.strategy import find
from tests.support.models import make

CHOSEN = {"generate": True, "limit": 3, "max_new_tokens": 4, "extract": "number"}


def site(folder: Path) -> Path:
    """A model and two clients' questions, whose answers end on a number."""
    make("llama", folder / "model")
    rows = [{"prompt": f"w{i} w{i % 5}", "response": f"w{i % 3} w9"} for i in range(24)]
    for name, part in {"client_0": rows[:9], "client_1": rows[9:18], "eval": rows[18:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def run(folder: Path, **settings: object) -> Result:
    chosen = {"data": folder / "client_*.jsonl", "eval_data": folder / "eval.jsonl", "rounds": 3, "threads": 1}
    chosen |= {"train": {"steps": 1, "batch_size": 4}, "lora": {"rank": 2}, "out": folder / "run", "progress": False}
    return simulate(model=folder / "model", **(chosen | settings))


def test_answers_are_scored_kept_and_told_in_the_rounds_that_are_to_have_them(tmp_path: Path) -> None:
    result = run(site(tmp_path), eval=CHOSEN | {"every": 2})
    scored = {record["round"]: "exact_match" in record["eval"] for record in result.rounds}
    assert scored == {1: False, 2: True, 3: True}
    assert {"token_f1", "rouge_l", "unfinished", "loss"} <= result.before.keys() & result.evaluation.keys()
    kept = sorted(path.name for path in (result.folder / "answers").iterdir())
    assert kept == ["round-0000.jsonl", "round-0002.jsonl", "round-0003.jsonl"]
    answers = [json.loads(line) for line in (result.folder / "answers" / kept[-1]).read_text().splitlines()]
    assert [answer["expected"] for answer in answers] == ["w0 w9", "w2 w9", "w1 w9"]  # of six rows every second
    assert "generated answers: exact_match 0 before" in answers_line(result.rounds, result.before)


def test_a_score_of_ones_own_stands_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scores.py").write_text("def words(generated, expected):\n    return len(expected.split())\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(site(tmp_path), rounds=1, eval=CHOSEN | {"metric": "own_scores:words"}).evaluation["words"] == 2
    sys.modules.pop("own_scores")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval": CHOSEN | {"extract": "regex:#+"}}, 'finds nothing in any of 3 expected answers, as in "w0 w9"'),
        ({"eval": CHOSEN, "eval_data": None, "data.eval_share": 0.0}, "no held-out examples; set data.eval"),
        ({"eval": CHOSEN | {"metric": "nowhere:f"}}, 'eval.metric = "nowhere:f" could not be imported'),
    ],
)
def test_what_cannot_be_answered_or_scored_is_refused_in_a_sentence(
    tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(site(tmp_path), **settings)
    assert said in str(refused.value)


def test_plain_texts_have_no_answers_and_that_is_said(tmp_path: Path) -> None:
    folder = site(tmp_path)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"w{i} w{i + 1}"}) + "\n" for i in range(9)))
    with pytest.raises(ConfigError, match="data of kind text have no answers; set data"):
        run(folder, data=folder / "texts.jsonl", clients=2, eval_data=None, eval=CHOSEN)


def test_a_metric_that_is_no_function_is_refused() -> None:
    with pytest.raises(ConfigError, match="is str, and no function"):
        own_metric("fedlora.run.console:__name__")


def test_so_many_rows_are_taken_evenly_spread() -> None:
    rows = [{"n": i} for i in range(10)]
    assert [row["n"] for row in spread_evenly(rows, 4)] == [0, 2, 5, 7]
    assert spread_evenly(rows, 0) == rows and spread_evenly(rows, 99) == rows


def test_where_no_model_is_common_the_clients_own_answer_after_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none where clients keep side B to themselves"):
        run(site(tmp_path), strategy="fedsa_lora", eval=CHOSEN)
    done = run(tmp_path, strategy="fedsa_lora", rounds=1, out=tmp_path / "other")
    given = ["--eval.generate", "--eval.limit", "3", "--eval.max_new_tokens", "4", "--json"]
    said = CliRunner().invoke(app, ["evaluate", str(done.folder), *given])
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["own"].keys() >= {"exact_match", "rouge_l"} and "exact_match" in found["before"]


@pytest.mark.parametrize("name", ["loss", "accuracy", "exact_match", "unfinished"])
def test_a_score_of_ones_own_takes_the_place_of_no_figure_of_the_run(name: str) -> None:
    with pytest.raises(ConfigError, match=f'"{name}" is the name of a figure of the run; give it another'):
        own_metric(f"own_scores:{name}")


def test_a_module_of_ones_own_that_is_no_python_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_scores.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r'eval\.metric = "broken_scores:f" could not be imported'):
        own_metric("broken_scores:f")
    with pytest.raises(StrategyError, match=r"broken_scores could not be imported: SyntaxError"):
        find("broken_scores:F")
