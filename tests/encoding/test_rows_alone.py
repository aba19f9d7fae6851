"""A row's examples depend on that row alone, and hold no more tokens than are allowed, whatever kind of row it is."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Encoder
from fedlora.encoding.examples import Example
from tests.support.models import tokenizer

CHAT = "{% for m in messages %}{{ 'w50 ' + m.content + ' </s> ' }}{% endfor %}"
WORD = st.sampled_from([*(f"w{i}" for i in range(40)), "\ud83d", "\u00e9", "</s>", "<s>", "\n"])
TEXT = st.lists(WORD, max_size=30).map(" ".join)
SCHEMAS = {
    "text": Schema("text", ("text",)),
    "plain": Schema("response", ("ask", "answer"), template="plain"),
    "templated": Schema("response", ("ask", "answer"), template="chat"),
    "chat": Schema("chat", ("messages",)),
    "label": Schema("label", ("text", "label"), ("no", "yes")),
    "pair": Schema("label", ("ask", "answer", "label"), ("no", "yes")),
}
SPECIAL = [("<s>", 2), ("</s>", 3)]
PLACED = {"none": ("$A", "$A $B"), "begin": ("<s> $A", "<s> $A $B"), "both": ("<s> $A </s>", "<s> $A </s> $B </s>")}


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows that have the columns of every schema."""
    texts = draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
    return [
        {
            "text": ask,
            "ask": ask,
            "answer": answer,
            "label": "yes",
            "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}],
        }
        for ask, answer in texts
    ]


def encoder(name: str, placed: str, size: int) -> Encoder:
    t: Any = tokenizer()
    t.chat_template = CHAT
    single, pair = PLACED[placed]
    t.backend_tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=SPECIAL)
    return Encoder(t, SCHEMAS[name], size)


def plain(example: Example) -> dict[str, Any]:
    return {key: tensor.tolist() for key, tensor in example.items()}


@pytest.mark.parametrize("name", SCHEMAS)
@settings(max_examples=15, deadline=None)
@given(rows=rows(), placed=st.sampled_from([*PLACED]), size=st.integers(8, 40))
def test_a_row_is_encoded_as_if_there_were_no_other(name: str, rows: Any, placed: str, size: int) -> None:
    encode = encoder(name, placed, size)
    together = encode.encoded(rows)
    for row, found in zip(rows, together, strict=True):
        [alone] = encode.encoded([row])
        assert [*map(plain, found.examples)] == [*map(plain, alone.examples)]
        assert all(len(e["input_ids"]) <= size for e in found.examples)
        assert found.cut >= 0 and (found.learned > 0) == bool(found.examples)
