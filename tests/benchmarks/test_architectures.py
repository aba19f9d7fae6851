"""The table of architectures: a few of its rows are run again, and the docs show what the file holds."""

from pathlib import Path

import pytest

from benchmarks.architectures import BEGIN, DOCS, END, OUTCOMES, ArchitectureResult, kept, table, try_model
from benchmarks.tiny_models import ARCHITECTURES, Task

FEW: tuple[tuple[str, Task, str], ...] = (
    ("llama", "lm", "FedAvg"),
    ("gpt2", "classify", "FedEx-LoRA, all-linear"),
    ("qwen3_next", "lm", "FedEx-LoRA, all-linear"),
    ("bert", "classify", "FedAvg"),
    ("mixtral", "lm", "FedEx-LoRA, all-linear"),
    ("swinv2", "image", "FedEx-LoRA, all-linear"),
)


@pytest.mark.parametrize(("name", "task", "run"), FEW)
def test_what_a_run_delivers_gives_the_evaluated_loss_by_transformers_and_peft_alone(
    name: str, task: Task, run: str, tmp_path: Path
) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    outcome = try_model(architecture, task, run, tmp_path)
    assert (outcome.verdict, outcome.says) == ("right", "")
    assert outcome.delivered == pytest.approx(outcome.after, rel=1e-4)


def test_the_docs_show_the_outcomes_that_are_kept() -> None:
    shown = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table(kept(OUTCOMES)).strip()


def test_no_architecture_in_the_table_gives_another_adapter_than_was_evaluated() -> None:
    outcomes = kept(OUTCOMES)
    assert not [o for o in outcomes if o.verdict == "wrong"]
    assert len({o.architecture for o in outcomes if o.verdict == "right"}) >= 40


def test_a_refusal_is_shown_with_its_reason() -> None:
    says = "BertLMHeadModel sees | both ways"
    outcome = ArchitectureResult("BertLMHeadModel", "bert", "lm", "FedAvg", "refused", says)
    assert "| BertLMHeadModel | refused: BertLMHeadModel sees \\| both ways |" in table([outcome])
