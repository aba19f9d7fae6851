"""Rows of instruction, chat and preference data in one form: who says what, and what of it is to be learned.

What people have is read as it is:

    instruction, input, output      texts; what asks becomes a user's message, what answers an assistant's
    system                          a text that comes first
    messages, conversations         lists of messages with role and content, or ShareGPT's from and value
    prompt, completion              texts, or lists of messages, as TRL has them
    prompt, chosen, rejected        the same with two answers; without a prompt, what both begin with is the prompt
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

from .schema import Schema

Message = Mapping[str, Any]  # role and content, both text, and what else the data say, as tool_calls

ROLES = {  # that stand for a role of chat templates
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # a template may have others
ROLE, CONTENT = ("role", "from"), ("content", "value")  # the keys of a message, the usual one first


@dataclass(frozen=True)
class Conversation:
    """What one row says."""

    given: tuple[Message, ...]  # comes first, and nothing of it is learned
    learned: tuple[Message, ...]  # of these the assistant's turns are learned

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages, in their order."""
        return (*self.given, *self.learned)

    @property
    def prompt(self) -> str:
        """What is given as plain text, a line for each message."""
        return "\n".join(message["content"] for message in self.given)

    @property
    def answer(self) -> str:
        """The text of the last message, which answers."""
        return str(self.learned[-1]["content"])


@dataclass(frozen=True)
class Preference:
    """Two ways to go on, of which one was preferred."""

    chosen: Conversation
    rejected: Conversation  # with the same given messages


def conversation(schema: Schema, row: Mapping[str, Any]) -> Conversation:
    """What a row of prompts and responses, or of a chat, says; the row fits the schema (see row_checks.py)."""
    return Conversation(_given(schema, row), messages_of(row[schema.spoken[-1]], "assistant"))


def preference(schema: Schema, row: Mapping[str, Any]) -> Preference:
    """What a row of preference data says. What both answers begin with, as many data repeat the prompt, is given."""
    chosen, rejected = (row[name] for name in schema.spoken[-2:])
    given = _given(schema, row)
    if isinstance(chosen, str) and isinstance(rejected, str) and not schema.asking:
        size = _shared_words(chosen, rejected)
        given, chosen, rejected = (*given, *_said("user", chosen[:size])), chosen[size:], rejected[size:]
    good, bad = messages_of(chosen, "assistant"), messages_of(rejected, "assistant")
    shared = _shared(good, bad)
    given = (*_system(schema, row), *good[:shared]) if shared else given
    return Preference(Conversation(given, good[shared:]), Conversation(given, bad[shared:]))


def _given(schema: Schema, row: Mapping[str, Any]) -> tuple[Message, ...]:
    """What comes before the answer: the system's message and the prompt, as far as there are columns of them."""
    prompt: tuple[Message, ...] = ()
    if schema.kind == "response":
        prompt = _said("user", "\n".join(prompt_texts(schema, row)))
    elif schema.asking:
        prompt = messages_of(row[schema.asking[0]], "user")
    return (*_system(schema, row), *prompt)


def prompt_texts(schema: Schema, row: Mapping[str, Any]) -> list[str]:
    """The texts that ask, in the columns' order: where there are several columns, those that the row fills."""
    if len(schema.asking) == 1:
        return [row[schema.asking[0]]]
    texts = (row.get(name) or "" for name in schema.asking)
    return [text for text in texts if text.strip()]


def _system(schema: Schema, row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The system's message, where a column holds it and the row fills it."""
    text = row.get(schema.system) or ""
    return _said("system", text) if text.strip() else ()


def messages_of(value: Any, role: str) -> tuple[Message, ...]:
    """The messages of a value: of a list each, of a text one in this role."""
    return _said(role, value) if isinstance(value, str) else tuple(map(_message, _listed(value)))


def _said(role: str, text: str) -> tuple[Message, ...]:
    return ({"role": role, "content": text},)


def _listed(value: Any) -> Any:
    """The messages as a list; datasets keeps a `Sequence` of messages as a list for each key."""
    if isinstance(value, Mapping) and all(isinstance(part, list) for part in value.values()):
        return [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    return value


def _message(message: Mapping[str, Any]) -> Message:
    """A message with its role and content under these names, and with all else that it says."""
    role = _field(message, ROLE)
    rest = {key: value for key, value in message.items() if key not in (*ROLE, *CONTENT) and value is not None}
    return {"role": ROLES.get(role.lower(), role.lower()), "content": _content(message), **rest}


def _field(message: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value under the first of these keys that has one; null without any."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _content(message: Mapping[str, Any]) -> Any:
    """The text of a message; empty where it says nothing but which tools to call."""
    content = _field(message, CONTENT)
    return "" if content is None and message.get("tool_calls") else _text(content)


def _text(content: Any) -> Any:
    """The text of a message's content, which may stand in parts as {"type": "text", "text": ...}."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _shared_words(one: str, other: str) -> int:
    """How many characters both begin with, up to the end of a word."""
    size = _shared(one, other)
    return size if size == min(len(one), len(other)) else len(one[:size].rpartition(" ")[0])


def wrong_messages(value: Any, *, answers: bool = True) -> str:
    """The reason to refuse a value as messages; empty for good ones. `answers`: must an assistant's turn be there?"""
    messages = _listed(value)
    if reason := _no_list(messages):
        return reason
    for n, message in enumerate(messages, 1):
        if reason := _wrong_message(message):
            return f"has a message, number {n}, {reason}"
    roles = [_message(message)["role"] for message in messages]
    return "" if "assistant" in roles or not answers else "has no assistant's turn to learn from"


def _no_list(messages: Any) -> str:
    """The reason to refuse what is no list of messages; empty for one."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        return "is a text in which a list is written; give the list itself, which JSON lines and Parquet can hold"
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    return "" if is_list else "is no list of messages"


def _wrong_message(message: Any) -> str:
    """The reason to refuse a message, to follow its number; empty for a good one."""
    fields = message if isinstance(message, Mapping) else {}
    style = 0 if fields.keys().isdisjoint((ROLE[1], CONTENT[1])) else 1  # by which the error names what is lacking
    parts = {ROLE[style]: _field(fields, ROLE), CONTENT[style]: _content(fields)}
    for name, value in parts.items():
        if not isinstance(value, str):
            return f'without "{name}" or where it is not text'
    role = _message(message)["role"]
    close = [] if role in KNOWN_ROLES else get_close_matches(role, KNOWN_ROLES, n=1, cutoff=0.75)
    return f'of the role "{role}"; did you mean "{close[0]}"?' if close else ""
