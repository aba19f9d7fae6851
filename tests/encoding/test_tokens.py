"""Texts as tokens: special tokens as the tokenizer places them, and characters that no tokenizer takes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Encoder
from fedlora.encoding.examples import Example
from fedlora.encoding.tokens import usable
from fedlora.errors import DataError
from tests.support.models import tokenizer

BOS, EOS = 2, 3
TEXT, ANSWER = Schema("text", ("text",)), Schema("response", ("ask", "answer"))


def encoded(schema: Schema, row: dict[str, str], single: str) -> Example:
    """The example of one row by a tokenizer that places special tokens in this way."""
    from tokenizers.processors import TemplateProcessing

    t = tokenizer()
    special = [("<s>", BOS), ("</s>", EOS)]
    t.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special) if single else None
    [example] = Encoder(t, schema, 32)([row])
    return example


@pytest.mark.parametrize("single, before", [("<s> $A </s>", [BOS]), ("<s> $A", [BOS]), ("$A </s>", []), ("", [])])
def test_a_text_opens_as_the_tokenizer_opens_it_and_has_an_end_to_learn(single: str, before: list[int]) -> None:
    assert encoded(TEXT, {"text": "w0 w1"}, single)["input_ids"].tolist() == [*before, 4, 5, EOS]
    assert encoded(ANSWER, {"ask": "w0", "answer": "w1"}, single)["input_ids"].tolist() == [*before, 4, 5, EOS]


@pytest.mark.parametrize("text", ["<s> w0 w1", "w0 w1 </s>", "<s> w0 w1 </s>"])
def test_special_tokens_that_are_written_around_a_text_are_not_doubled(text: str) -> None:
    assert encoded(TEXT, {"text": text}, "<s> $A </s>")["input_ids"].tolist() == [BOS, 4, 5, EOS]


def test_half_of_an_emoji_is_a_character_that_is_not_known() -> None:
    half = json.loads(r'"w1 \ud83d w3"')
    assert encoded(TEXT, {"text": half}, "")["input_ids"].tolist() == [5, 1, 7, EOS]
    examples = Encoder(tokenizer(), Schema("label", ("text", "label"), ("a", "b")), 8)([{"text": half, "label": "a"}])
    assert examples[0]["input_ids"].tolist() == [BOS, 5, 1, 7, EOS]


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec=None), max_size=20))
def test_every_text_has_characters_that_a_tokenizer_takes(text: str) -> None:
    assert len(usable(text)) == len(text)
    usable(text).encode()


@pytest.mark.parametrize("schema", [TEXT, ANSWER, Schema("label", ("text", "ask"), ("a", "b"))], ids=lambda s: s.kind)
def test_a_word_that_a_tokenizer_has_no_token_for_is_one_sentence(schema: Schema) -> None:
    inner = Tokenizer(WordLevel({"w1": 0, "[PAD]": 1}))
    t = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
    with pytest.raises(DataError, match=r"tokenizer refuses the texts: .*; set a token for words that it"):
        Encoder(t, schema, 32)([{"text": "w2", "ask": "a", "answer": "w3"}])
