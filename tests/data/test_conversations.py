"""Instruction, chat and preference data in one form, whatever they are written in."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.conversations import conversation, preference, wrong_messages
from fedlora.data.schema import Schema

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = Schema("chat", ("messages",))
ALPACA = Schema("response", ("instruction", "input", "output"))
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), min_size=1)
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


@given(turns=TURNS)
def test_sharegpts_turns_are_the_same_messages(turns: list[tuple[str, str]]) -> None:
    usual = [{"role": role, "content": content} for role, content in turns]
    shared = [{"from": NAMES[role], "value": content} for role, content in turns]
    assert conversation(CHAT, {"messages": shared}) == conversation(CHAT, {"messages": usual})
    assert list(conversation(CHAT, {"messages": usual}).learned) == usual


@given(instruction=st.text(), given=st.none() | st.text(), answer=st.text())
def test_every_text_of_an_instruction_is_in_its_prompt(instruction: str, given: str | None, answer: str) -> None:
    said = conversation(ALPACA, {"instruction": instruction, "input": given, "output": answer})
    assert [message["role"] for message in said.messages] == ["user", "assistant"]
    assert [text in said.prompt for text in (instruction, given or "") if text.strip()].count(False) == 0
    assert said.answer == answer


def test_an_instruction_without_an_input_has_no_empty_line() -> None:
    assert conversation(ALPACA, {"instruction": "i", "input": "", "output": "o"}).prompt == "i"
    assert conversation(ALPACA, {"instruction": "i", "input": "x", "output": "o"}).prompt == "i\nx"


def test_a_system_column_comes_first() -> None:
    schema = Schema("chat", ("system", "messages"), system="system")
    assert conversation(schema, {"system": "s", "messages": [USER, ASSISTANT]}).given == (
        {"role": "system", "content": "s"},
    )
    assert conversation(schema, {"system": None, "messages": [USER, ASSISTANT]}).given == ()


@pytest.mark.parametrize("prompt", ["q", [USER]])
@pytest.mark.parametrize("completion", ["a", [ASSISTANT]])
def test_prompt_and_completion_may_be_texts_or_messages(prompt: Any, completion: Any) -> None:
    said = conversation(Schema("chat", ("prompt", "completion")), {"prompt": prompt, "completion": completion})
    assert (said.given, said.learned) == ((USER,), (ASSISTANT,))


@pytest.mark.parametrize(("columns", "row"), [
    (("prompt", "chosen", "rejected"), {"prompt": "q", "chosen": "a", "rejected": "b"}),
    (("prompt", "chosen", "rejected"), {"prompt": [USER], "chosen": [ASSISTANT], "rejected": "b"}),
    (("prompt", "chosen", "rejected"), {"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, "b"]}),
    (("chosen", "rejected"), {"chosen": [USER, ASSISTANT], "rejected": [USER, "b"]}),
])  # fmt: skip
def test_a_preference_has_one_prompt_and_two_answers(columns: tuple[str, ...], row: dict[str, Any]) -> None:
    bad = {"role": "assistant", "content": "b"}
    row = {key: [bad if m == "b" else m for m in value] if isinstance(value, list) else value
           for key, value in row.items()}  # fmt: skip
    found = preference(Schema("preference", columns), row)
    assert found.chosen.given == found.rejected.given == (USER,)
    assert (found.chosen.learned, found.rejected.learned) == ((ASSISTANT,), (bad,))


def test_two_texts_without_a_prompt_begin_with_it() -> None:
    row = {"chosen": "Human: hi Assistant: hello", "rejected": "Human: hi Assistant: help"}
    found = preference(Schema("preference", ("chosen", "rejected")), row)
    assert (found.chosen.prompt, found.chosen.answer, found.rejected.answer) == (
        "Human: hi Assistant:", " hello", " help")  # fmt: skip


@pytest.mark.parametrize(("content", "says"), [
    ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], ""),
    ([{"type": "image", "url": "x"}], 'number 1, without "content"'),
])  # fmt: skip
def test_content_in_parts_is_read_if_all_are_text(content: Any, says: str) -> None:
    messages = [{"role": "assistant", "content": content}]
    assert says in wrong_messages(messages)
    if not says:
        assert conversation(CHAT, {"messages": messages}).answer == "ab"


def test_messages_in_columns_are_messages_in_rows() -> None:
    """As datasets keeps a `Sequence` of messages."""
    columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    assert conversation(CHAT, {"messages": columns}).learned == (USER, ASSISTANT)


def test_what_else_a_message_says_is_kept_unless_it_is_null() -> None:
    message = {**ASSISTANT, "tool_calls": None, "reasoning_content": "hm"}
    assert conversation(CHAT, {"messages": [message]}).learned == ({**ASSISTANT, "reasoning_content": "hm"},)


@pytest.mark.parametrize("said", [{"content": None}, {}, {"content": ""}])
def test_who_says_nothing_but_which_tools_to_call_says_nothing(said: dict[str, Any]) -> None:
    calling = {"role": "assistant", **said, "tool_calls": [{"function": {"name": "f"}}]}
    messages = [USER, calling, {"role": "tool", "content": "1"}, ASSISTANT]
    assert not wrong_messages(messages)
    assert conversation(CHAT, {"messages": messages}).learned[1]["content"] == ""


def test_who_says_nothing_at_all_is_refused() -> None:
    assert 'without "content"' in wrong_messages([USER, {"role": "assistant", "content": None, "tool_calls": None}])


def test_a_list_that_is_written_as_a_text_is_told_from_no_list() -> None:
    assert wrong_messages(str([USER, ASSISTANT])).startswith("is a text in which a list is written; give the list")
    assert wrong_messages("hello") == "is no list of messages"
