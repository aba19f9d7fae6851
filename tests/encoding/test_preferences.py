"""Preference data as examples: both answers after the same prompt, whatever form they come in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.federated import load
from fedlora.data.schema import Schema, declared_schema
from fedlora.encoding.encoder import Encoder, Example
from fedlora.errors import DataError
from fedlora.sections import DataConfig
from tests.support.models import tokenizer

ASKED, UNASKED = Schema("preference", ("prompt", "chosen", "rejected")), Schema("preference", ("chosen", "rejected"))
TEMPLATE = (
    "{% for m in messages %}{{ 'w50 ' if m.role == 'user' else 'w51 ' }}{{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w51 {% endif %}"
)
WORDS = st.lists(st.sampled_from([f"w{i}" for i in range(20)]), min_size=1, max_size=12).map(" ".join)


def encoded(schema: Schema, row: dict[str, Any], max_length: int = 64, template: str = "") -> list[Example]:
    processor = tokenizer()
    processor.chat_template = template or None
    return Encoder(processor, schema, max_length).by_row([row, {**row, "chosen": "w30", "rejected": "w31"}])[0]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def prompt_of(example: Example, prefix: str = "") -> list[int]:
    ids, labels = example[f"{prefix}input_ids"], example[f"{prefix}labels"]
    return [int(i) for i, label in zip(ids, labels, strict=True) if label == -100]


@settings(max_examples=60, deadline=None)
@given(prompt=WORDS, chosen=WORDS, rejected=WORDS, size=st.integers(8, 40), templated=st.booleans())
def test_both_answers_follow_the_same_end_of_the_prompt(
    prompt: str, chosen: str, rejected: str, size: int, templated: bool
) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    examples = encoded(ASKED, row, max_length=size, template=TEMPLATE if templated else "")
    assert len(examples) == (chosen != rejected)
    for example in examples:
        assert prompt_of(example) == prompt_of(example, "rejected_")
        assert max(len(example["input_ids"]), len(example["rejected_input_ids"])) <= size
        longer = max(chosen.count(" "), rejected.count(" "))
        if longer + 4 < size:  # both fit, and are learned with their end
            assert [int((example[f"{p}labels"] == 3).sum()) for p in ("", "rejected_")] == [1, 1]


def test_every_form_of_the_data_is_the_same_example() -> None:
    """Texts, lists of messages, and lists that repeat the prompt, as Anthropic's HH and UltraFeedback have them."""
    [texts] = encoded(ASKED, {"prompt": "w1", "chosen": "w2 w3", "rejected": "w4"}, template=TEMPLATE)
    user, good, bad = said("user", "w1"), said("assistant", "w2 w3"), said("assistant", "w4")
    forms = [
        (ASKED, {"prompt": [user], "chosen": [good], "rejected": [bad]}),
        (ASKED, {"prompt": "w1", "chosen": [user, good], "rejected": [user, bad]}),
        (UNASKED, {"chosen": [user, good], "rejected": [user, bad]}),
    ]
    for schema, row in forms:
        processor = tokenizer()
        processor.chat_template = TEMPLATE
        [example] = Encoder(processor, schema, 64)([row])
        assert example.keys() == texts.keys() and all(torch.equal(example[key], texts[key]) for key in texts)


def test_a_batch_has_all_chosen_answers_and_then_all_rejected_ones() -> None:
    encoder = Encoder(tokenizer(), ASKED, 64)
    rows = [{"prompt": "w1", "chosen": "w2", "rejected": "w3 w4"}, {"prompt": "w5", "chosen": "w6", "rejected": "w7"}]
    batch = encoder.collate(encoder(rows))
    learned = [[int(i) - 4 for i in row if i > 3] for row in batch["labels"]]
    assert learned == [[2], [6], [3, 4], [7]] and batch["input_ids"].shape == batch["attention_mask"].shape == (4, 5)


def test_a_server_without_data_knows_them_by_the_task() -> None:
    assert declared_schema(DataConfig(), "preference") == ASKED


def test_an_answer_that_is_missing_is_named_with_its_line(tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}, {"prompt": "w1", "chosen": "w2", "rejected": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match='line 2: "rejected" is null; it takes text or a list of messages'):
        load(DataConfig(path=str(tmp_path / "rows.jsonl")), "auto", clients=1, seed=0)
