"""Conversations through chat templates of every habit: each of the assistant's turns is learned, with its end."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.encoding.chat import ChatTemplate
from tests.support.models import tokenizer

EOS = 3
ASKED = "{{- 'w50 ' + m.content + ' </s> ' }}"
ANSWERED = "{{- 'w51 ' + m.content + ' </s> ' }}"
PROMPT = "{%- if add_generation_prompt %}{{- 'w51 ' }}{%- endif %}"
LAST = (
    "{%- set ns = namespace(n=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.n = loop.index0 %}{%- endif %}{%- endfor %}"
)


def template(asked: str = ASKED, answered: str = ANSWERED, before: str = "") -> str:
    """A template that writes every turn by its role."""
    role = "{%- if m.role == 'assistant' %}" + answered + "{%- else %}" + asked + "{%- endif %}"
    return before + "{%- for m in messages %}" + role + "{%- endfor %}" + PROMPT


TEMPLATES = {
    "plain": template(),
    "marked": template(answered="{{- 'w51 ' }}{% generation %}{{- m.content + ' </s> ' }}{% endgeneration %}"),
    "empty thought in the newest answer alone, as Qwen3": template(
        answered="{{- 'w51 ' + ('w58 w59 ' if loop.index0 > ns.n else '') + m.content + ' </s> ' }}", before=LAST
    ),
    "prompt that opens a thought": template().replace("{{- 'w51 ' }}{%- endif", "{{- 'w51 w58 ' }}{%- endif"),
    "system's words before the newest question, as Mistral": template(
        asked="{%- if m.role == 'user' %}"
        "{{- 'w50 ' + ('w57 ' if loop.index0 == ns.n else '') + m.content + ' </s> ' }}{%- endif %}",
        before=LAST,
    ),
    "end token after the last answer alone": template(
        answered="{{- 'w51 ' + m.content + ' ' + ('</s> ' if loop.last else '') }}"
    ),
    "end token after the last answer alone, before a question that opens like it": template(
        asked="{{- '<s> ' + m.content + ' w49 ' }}",
        answered="{{- 'w51 ' + m.content + ('</s> ' if loop.last else '') }}",
    ),
    "trimmed": template(answered="{{- 'w51 ' + (m.content | trim) + ' </s> ' }}"),
}


def talk(*contents: str, system: str = "") -> list[dict[str, str]]:
    """A conversation of question, answer, question, answer ..."""
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def learned(template: str, messages: Sequence[Any], t: Any = None) -> list[str]:
    """What is learned of a conversation, a text for each run of tokens."""
    t = t or tokenizer()
    t.chat_template = template
    written = ChatTemplate(t).write(messages)
    assert len(written.ids) == len(written.learned)
    runs: list[list[int]] = [[]]
    for i, is_learned in zip(written.ids, written.learned, strict=True):
        runs = [*runs[:-1], [*runs[-1], i]] if is_learned else [*runs, []]
    return [t.decode(run) for run in runs if run]


WORD = st.integers(0, 40).map("w{}".format)
TEXT = st.lists(WORD, min_size=1, max_size=4).map(" ".join)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), system=st.sampled_from(["", "w41"]))
def test_every_assistant_turn_is_learned_with_its_end(name: str, turns: list[tuple[str, str]], system: str) -> None:
    got = learned(TEMPLATES[name], talk(*(text for turn in turns for text in turn), system=system))
    ends = [""] * (len(turns) - 1) + [" </s>"] if "alone" in name and "end" in name else [" </s>"] * len(turns)
    assert got == [answer + end for (_, answer), end in zip(turns, ends, strict=True)]


def test_answers_that_are_the_questions_words_are_told_from_them() -> None:
    assert learned(TEMPLATES["plain"], talk("w1", "w1", "w1", "w1 w1")) == ["w1 </s>", "w1 w1 </s>"]


def test_a_thought_that_is_in_the_answer_is_learned_and_one_that_the_template_drops_is_not() -> None:
    drops = (
        "{%- set a = m.content.split('w59 ')[-1] %}"
        "{%- set t = m.content.split('w59 ')[0] if 'w59' in m.content else 'w58 ' %}"
        "{{- 'w51 ' + (t + 'w59 ' if loop.index0 > ns.n else '') + a + ' </s> ' }}"
    )
    thinks = template(answered=drops, before=LAST)
    messages = talk("w1", "w58 w2 w59 w3", "w4", "w58 w5 w59 w6")
    assert learned(thinks, messages) == ["w3 </s>", "w58 w5 w59 w6 </s>"]
    assert learned(thinks, talk("w1", "w58 w2 w59 w3", "w4", "w6")) == ["w3 </s>", "w6 </s>"]


def test_an_answer_without_an_end_in_the_template_ends_in_the_end_token() -> None:
    bare = template(answered="{{- 'w51 ' + m.content + ' ' }}")
    assert learned(bare, talk("w1", "w2", "w3", "w4")) == ["w2", "w4 </s>"]


def test_an_end_token_that_was_written_after_an_answer_is_not_learned_twice() -> None:
    assert learned(TEMPLATES["plain"], talk("w1", "w2 </s>\n")) == ["w2 </s>"]


def test_a_special_token_in_the_words_of_a_turn_is_no_special_token() -> None:
    t = tokenizer()
    t.chat_template = TEMPLATES["plain"]
    written = ChatTemplate(t).write(talk("w1 </s> w2", "w3 <s> w4"))
    assert t.decode(written.ids).replace("[UNK] [UNK] [UNK]", "?") == "w50 w1 ? w2 </s> w51 w3 ? w4 </s>"


def test_a_turn_that_the_template_leaves_out_is_counted() -> None:
    for kept, ids in (("loop.last", [8, EOS]), ("not loop.last", [6])):
        t = tokenizer()
        t.chat_template = template(answered="{%- if " + kept + " %}{{- 'w51 ' + m.content + ' </s> ' }}{%- endif %}")
        written = ChatTemplate(t).write(talk("w1", "w2", "w3", "w4"))
        assert written.unlearned_turns == 1
        assert [i for i, is_learned in zip(written.ids, written.learned, strict=True) if is_learned] == ids


def test_thoughts_and_calls_beside_the_words_are_learned_too() -> None:
    reasons = template(answered="{{- 'w51 ' + (m.reasoning_content or '') + ' w59 ' + m.content + ' </s> ' }}")
    messages = [*talk("w1"), {"role": "assistant", "content": "w3", "reasoning_content": "w2"}]
    assert learned(reasons, messages) == ["w2 w59 w3 </s>"]
    calls = template(answered="{{- 'w51 ' + ('w58 ' if loop.last else '') + m.content + (m.calls or '') + ' </s> ' }}")
    messages = [*talk("w1"), {"role": "assistant", "content": "", "calls": "w2 w4"}, *talk("w5", "w6")]
    assert learned(calls, messages) == ["w2 w4 </s>", "w6 </s>"]


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_learns_the_same_words() -> None:
    from transformers import ByT5Tokenizer

    said = learned(TEMPLATES["plain"], talk("wo bist du?", "hier\u00e9", "w3", "\U0001f600!"), ByT5Tokenizer())
    assert said == ["hier\u00e9</s>", "\U0001f600!</s>"]


@pytest.mark.parametrize("form", ["plain", "marked"])
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(form: str) -> None:
    t = tokenizer()
    t.chat_template = "{{- 'w57 ' + strftime_now('w%d w%y ') }}" + TEMPLATES[form]
    assert t.decode(ChatTemplate(t).write(talk("w1", "w2")).ids).startswith("w57 w26 w24")
