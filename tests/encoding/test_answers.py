"""Prompt and response: through the chat template of a model that has one, and else with a newline between them."""

from dataclasses import replace
from typing import Any, Literal

import pytest

from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Encoder
from fedlora.encoding.prompts import prompts
from fedlora.errors import DataError
from tests.support.models import tokenizer

BOS, EOS = 2, 3
ANSWER = Schema("response", ("ask", "answer"))
CHAT = (
    "{% for m in messages %}{{ 'w9 ' + m.content + ' </s> ' }}{% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
)
ROW = {"ask": "w0", "answer": "w1"}
TEMPLATED, PLAIN = [13, 4, EOS, 13, 5, EOS], [BOS, 4, 5, EOS]


def encoder(template: Literal["auto", "chat", "plain"], chat: str = CHAT, max_length: int = 32) -> Encoder:
    t: Any = tokenizer()
    t.chat_template = chat or None
    return Encoder(t, replace(ANSWER, template=template), max_length)


def ids_and_learned(encoder: Encoder, row: dict[str, str]) -> tuple[list[int], list[int]]:
    [example] = encoder([row])
    return example["input_ids"].tolist(), [i for i in example["labels"].tolist() if i != -100]


@pytest.mark.parametrize("template, ids", [("auto", TEMPLATED), ("chat", TEMPLATED), ("plain", PLAIN)])
def test_prompt_and_response_go_through_a_chat_template_if_the_settings_let_them(template: Any, ids: list[int]) -> None:
    assert ids_and_learned(encoder(template), ROW) == (ids, [5, EOS])


def test_without_a_chat_template_prompt_and_response_are_as_they_are() -> None:
    assert ids_and_learned(encoder("auto", chat=""), ROW) == (PLAIN, [5, EOS])
    with pytest.raises(DataError, match="has no chat template"):
        encoder("chat", chat="")([ROW])


def test_a_prompt_that_went_through_a_template_before_does_not_go_through_it_again() -> None:
    row = {"ask": "w9 w0 </s> w9", "answer": "w1 </s>"}
    assert ids_and_learned(encoder("auto"), row) == ([BOS, *TEMPLATED], [5, EOS])


def test_a_long_prompt_in_a_template_loses_its_beginning_and_a_long_response_its_end() -> None:
    many = " ".join(f"w{n}" for n in range(20))
    assert ids_and_learned(encoder("auto", max_length=8), {"ask": many, "answer": "w1"}) == (
        [20, 21, 22, 23, EOS, 13, 5, EOS],
        [5, EOS],
    )
    ids, learned = ids_and_learned(encoder("auto", max_length=8), {"ask": "w0", "answer": many})
    assert ids == learned == [*range(4, 12)]


def test_an_evaluation_begins_to_answer_where_training_did() -> None:
    [templated], [plain] = prompts(encoder("auto"), [ROW]), prompts(encoder("plain"), [ROW])
    assert (templated.ids.tolist(), plain.ids.tolist()) == ([13, 4, EOS, 13], [BOS, 4])


def test_every_row_tells_how_many_tokens_it_has_and_how_many_are_cut() -> None:
    many = " ".join(f"w{n}" for n in range(20))
    [short, long, empty] = encoder("plain", max_length=8).encoded(
        [ROW, {"ask": many, "answer": "w1"}, {"ask": "w1", "answer": ""}]
    )
    assert [(row.tokens, row.cut, row.learned) for row in (short, long, empty)] == [(4, 0, 2), (23, 15, 2), (3, 0, 1)]
