"""Conversations as the tokenizer's chat template writes them, and which of their tokens an assistant has to learn.

A template may write a turn otherwise once others follow (Qwen3 drops its thoughts, Mistral moves the system's words).
So a turn is looked for in the whole conversation: this is written a second time with a mark in the place of the turn's
words, and what stands where the mark stands are the words. A thought that the template itself writes, and leaves empty,
is before the mark, and not learned. To the turn belongs what ends it, up to its first special token.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from fedlora.errors import DataError

from .tokens import MARK, Span, any_of, hide_special, shared, special_tokens, usable, with_learned

Message = Mapping[str, Any]  # role and content, and whatever else the template knows
MARKS_ANSWERS = re.compile(r"{%-?\s*generation\b")  # in a chat template
PLAIN_KEYS = {"role", "content", "name"}
REFUSED = (TypeError, ValueError, KeyError, AttributeError)  # by a template, of what is not as it expects
A_DAY = datetime(2024, 7, 26)  # which Llama's templates write without a clock: by one a row would change overnight
TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")  # in a chat template
ROLES = 6  # that are told of a conversation in an error


@dataclass(frozen=True, eq=False)
class WrittenChat:
    """A conversation as tokens, before anything is cut."""

    ids: list[int]
    learned: list[bool]  # of each token
    unlearned_turns: int  # of the assistant, that are not found in what the template writes


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The chat template of a tokenizer."""

    tokenizer: Any

    @cached_property
    def special(self) -> list[str]:
        """The special tokens of the tokenizer as they are written."""
        return special_tokens(self.tokenizer)

    def write(self, messages: Sequence[Message], given: int = 0) -> WrittenChat:
        """The conversation as tokens, of which the assistant's are learned, but for those in the first `given` turns.

        Raises `DataError` where the template refuses it.
        """
        messages = [self._as_text(message) for message in messages]
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        known = sum(1 for n in turns if n < given)
        if MARKS_ANSWERS.search(self.tokenizer.get_chat_template()):
            whole, spans = self._marked(messages)
            return WrittenChat(*with_learned(self.tokenizer, whole, spans[known:], self.special), unlearned_turns=0)
        whole, turns = self._render(messages), turns[known:]
        found = dict(self._answers(messages, turns, whole))
        last = len(messages) - 1
        if last in found and self._ends.search(whole[found[last][0] :]) is None:
            whole, found[last] = self._ended(whole, found[last])
        tokens = with_learned(self.tokenizer, whole, list(found.values()), self.special)
        return WrittenChat(*tokens, unlearned_turns=len(turns) - len(found))

    def _as_text(self, message: Message) -> Message:
        """The message with no special token in its content; an end that was written after an answer is left out."""
        content, end = message.get("content"), self.tokenizer.eos_token
        if not isinstance(content, str):
            return message
        if end and message["role"] == "assistant":
            content = content.rstrip().removesuffix(end) if content.rstrip().endswith(end) else content
        return {**message, "content": hide_special(usable(content), self.special)}

    def _marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The conversation as text, and where the template itself marks it as the assistant's."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # typed as if it returned one text
        with _refusals(messages):
            [whole], [spans] = render(
                conversations=[[_without_none(message) for message in messages]],
                chat_template=self._of_one_day or self.tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return whole, [(start, end) for start, end in spans]

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        with _refusals(messages):
            options |= {"chat_template": self._of_one_day} if self._of_one_day else {}
            return str(self.tokenizer.apply_chat_template([*messages], tokenize=False, **options))

    @cached_property
    def _of_one_day(self) -> str:
        """The template with one and the same date in the place of today's; empty where it asks for none."""
        template = self.tokenizer.get_chat_template()
        fixed = TODAY.sub(lambda found: repr(A_DAY.strftime(found[2])), template)
        return fixed if fixed != template else ""

    def _try(self, messages: Sequence[Message], **options: Any) -> str:
        """The conversation as text; empty where the template refuses it, as one that is made up may be."""
        try:
            return self._render(messages, **options) if messages else ""
        except DataError:
            return ""

    def _answers(self, messages: Sequence[Message], turns: Sequence[int], whole: str) -> Iterator[tuple[int, Span]]:
        """Yield the number of each of the assistant's turns that is found in the text, and where it stands."""
        quickly = self._all_words(messages, turns, whole)
        alone = self._after_words(messages[: turns[-1] + 1]) if quickly else ""
        after = 0  # the turn before
        for n in turns:
            span = quickly.get(n) or self._words(messages, n, whole, after)
            if span is not None:
                ends = alone or self._after_words(messages[: n + 1])
                after = span[1] + self._closing(ends, whole[span[1] :])
                yield n, (span[0], after)

    def _all_words(self, messages: Sequence[Message], turns: Sequence[int], whole: str) -> dict[int, Span]:
        """Where the words of all these turns stand, if each stands as it is in the place of a mark; none otherwise."""
        before, *pieces = self._try(_with_marks(messages, turns)).split(MARK)
        if len(pieces) != len(turns) or not whole.startswith(before):
            return {}
        spans, at = {}, len(before)
        for n, piece in zip(turns, pieces, strict=True):
            words = str(messages[n].get("content") or "")
            words = words if whole.startswith(words + piece, at) else words.strip()
            if not whole.startswith(words + piece, at):
                return {}
            spans[n] = (at, at + len(words))
            at += len(words) + len(piece)
        return spans if at == len(whole) else {}

    def _words(self, messages: Sequence[Message], n: int, whole: str, after: int) -> Span | None:
        """Where the words of turn n stand, not before character `after`; the surest way to tell comes first."""
        head, mark, tail = self._try(_with_marks(messages, [n])).partition(MARK)
        changed = (shared(head, whole), len(whole) - shared(tail[::-1], whole[::-1])) if mark else None
        if changed == (len(head), len(whole) - len(tail)):
            return changed
        found = [self._after_prompt(messages[: n + 1], whole), changed]
        if changed and {*messages[n]} <= PLAIN_KEYS:
            found.insert(0, _verbatim(str(messages[n].get("content") or "").strip(), whole, changed[0], after))
        return next((span for span in found if span and after <= span[0] < span[1]), None)

    def _after_prompt(self, messages: Sequence[Message], whole: str) -> Span | None:
        """Where the last of these turns stands, if the text begins as it does when that turn is asked for."""
        before = self._try(messages[:-1], add_generation_prompt=True)
        if not before or not whole.startswith(before):
            return None
        turn = whole[len(before) : shared(self._try(messages), whole)]
        ends = [special.end() for special in self._ends.finditer(turn)]
        return len(before), len(before) + (ends[-1] if ends else len(turn))

    def _after_words(self, messages: Sequence[Message]) -> str:
        """What the template writes after the words of the last of these turns, where nothing follows."""
        return self._try(_with_marks(messages, [len(messages) - 1])).partition(MARK)[2]

    def _closing(self, alone: str, rest: str) -> int:
        """How many characters after its words still belong to a turn: what ends it.

        `rest` is all that stands after its words, and `alone` what would stand there if nothing followed.
        """
        size = shared(alone, rest)
        special = self._ends.search(rest)
        if special is None or special.start() >= size:
            return size
        return special.end() if special.end() <= size else special.start()  # other special tokens may begin alike

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        return any_of(self.special)

    def _ended(self, whole: str, last: Span) -> tuple[str, Span]:
        """The text with an end token after the last answer, where the template writes none."""
        end = self.tokenizer.eos_token or ""
        return whole[: last[1]] + end, (last[0], last[1] + len(end))


def _verbatim(words: str, whole: str, changed: int, after: int) -> Span | None:
    """Where the words stand as they are, at the first character that changes with them, or around it."""
    at = whole.find(words, max(after, changed - len(words))) if words else -1
    return (at, at + len(words)) if 0 <= at <= changed else None


def _with_marks(messages: Sequence[Message], turns: Sequence[int]) -> list[Message]:
    """The conversation with a mark in the place of the words of these turns."""
    return [{"role": m["role"], "content": MARK} if i in turns else m for i, m in enumerate(messages)]


def _without_none(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


@contextmanager
def _refusals(messages: Sequence[Message]) -> Iterator[None]:
    """Turn the errors by which a template refuses a conversation into a `DataError` of one sentence."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, *REFUSED) as e:
        roles = ", ".join([str(m["role"]) for m in messages[:ROLES]] + ["..."] * (len(messages) > ROLES))
        raise DataError(f"the model's chat template refuses a conversation of {roles}: {e}") from e
