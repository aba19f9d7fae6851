"""Rows with answers, as prompt and response or as conversations, written as tokens and cut to the longest allowed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from fedlora.data.conversations import Conversation, conversation
from fedlora.data.schema import Schema
from fedlora.errors import DataError

from .chat import ChatTemplate, WrittenChat
from .tokens import any_of, around, ending, ids_of


@dataclass(frozen=True, eq=False)
class AnswerWriter:
    """Writes rows of one schema by one tokenizer: through its chat template, or as prompt, newline and response."""

    tokenizer: Any
    schema: Schema

    def write(self, row: Mapping[str, Any]) -> WrittenChat:
        """All tokens of a row, and which of them are learned. Raises `DataError` for what the template refuses."""
        return self.write_conversation(conversation(self.schema, row))

    def write_conversation(self, said: Conversation) -> WrittenChat:
        """All tokens of a conversation, and which of them are learned: through the chat template, or without one."""
        if self.schema.kind == "chat" or self._is_templated(said.prompt):
            return self._template.write(said.messages, given=len(said.given))
        return self._plain(said.prompt, said.answer)

    def kept(self, written: WrittenChat, size: int) -> list[int]:
        """Which tokens stay where there is room for `size`, by their places.

        The token that opens a text stays. Of a conversation its end stays; where there is one answer, the prompt is cut
        first, from its left, and then the answer, from its right.
        """
        ids = written.ids
        opening = min(len(ids), int(ids[:1] in self._openings))
        start = len(ids) if self.schema.kind == "chat" else start_of_last(written.learned)
        answer = range(start, min(len(ids), start + size - opening))
        before = range(max(opening, start - (size - opening - len(answer))), start)
        return [*range(opening), *before, *answer]

    def _is_templated(self, prompt: str) -> bool:
        """Does this prompt go through the chat template? One with special tokens in it has gone through one before."""
        if self.schema.template != "auto":
            return self.schema.template == "chat"
        return bool(getattr(self.tokenizer, "chat_template", None)) and not self._special.search(prompt)

    def _plain(self, prompt: str, response: str) -> WrittenChat:
        """Prompt, newline and response, of which the response and its end are learned."""
        given, answer = ids_of(self.tokenizer, [prompt + "\n", response])
        given, answer = opened(given, self._first), ended(answer, self._last)
        learned = chain([False] * len(given), [True] * len(answer))
        return WrittenChat(given + answer, list(learned), unlearned_turns=0)

    @cached_property
    def _template(self) -> ChatTemplate:
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template; use an instruction-tuned "
                "model, or data.prompt and data.response with data.template = plain"
            )
        return ChatTemplate(self.tokenizer)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return any_of(ChatTemplate(self.tokenizer).special)

    @cached_property
    def _openings(self) -> list[list[int]]:
        """The tokens, each in a list, that may open a text."""
        return [self._first[:1] or [-1], [self.tokenizer.bos_token_id]]

    @cached_property
    def _first(self) -> list[int]:
        return around(self.tokenizer)[0]

    @cached_property
    def _last(self) -> list[int]:
        return ending(self.tokenizer)


def start_of_last(learned: Sequence[bool]) -> int:
    """Where the last run of learned tokens starts; at the end, if none is learned."""
    ends = next((i for i in range(len(learned), 0, -1) if learned[i - 1]), 0)
    starts = (i for i in range(ends, 0, -1) if not learned[i - 1])
    return next(starts, 0) if ends else len(learned)


def opened(ids: list[int], first: list[int]) -> list[int]:
    """The tokens of a text with those that open one, if they are not written in it."""
    return ids if ids[: len(first)] == first else [*first, *ids]


def ended(ids: list[int], last: list[int]) -> list[int]:
    """The tokens of a text with those that end one, if they are not written in it."""
    return ids if last and ids[-len(last) :] == last else [*ids, *last]
