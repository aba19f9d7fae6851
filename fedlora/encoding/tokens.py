"""Texts as tokens, with special tokens where the tokenizer itself places them, and nowhere by accident.

Two characters that Unicode keeps for a program's own use stand around the number of a special token that is no more
than text, as "</s>" in what a user wrote: `hide_special` puts them there, and `with_learned` takes them out again.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from fedlora.errors import DataError

Span = tuple[int, int]  # of characters, from and to
MARK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
UNUSABLE = re.compile(f"[\ud800-\udfff{MARK}{OPEN}{CLOSE}]")  # half of an emoji, or a character of no text
HIDDEN = re.compile(f"{OPEN}([0-9]+){CLOSE}")


@contextmanager
def refusals() -> Iterator[None]:
    """Turn the error by which a tokenizer refuses a text into a `DataError` of one sentence."""
    try:
        yield
    except Exception as e:
        if type(e) is not Exception:  # tokenizers, which is written in Rust, raises no other
            raise
        raise DataError(
            f"the model's tokenizer refuses the texts: {e}; set a token for words that it does not know (unk_token), "
            "or take the tokenizer that belongs to the model"
        ) from e


def usable(text: str) -> str:
    """The text with U+FFFD for every character that no tokenizer takes, as half of an emoji.

    >>> usable("a \\ud83d b") == "a \\ufffd b"
    True
    """
    return text if text.isascii() else UNUSABLE.sub("\ufffd", text)


def ids_of(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """The tokens of every text, without those that the tokenizer puts around one."""
    if not texts:
        return []
    got = tokenizer([usable(t) for t in texts], add_special_tokens=False, verbose=False, **options)
    return [list(ids) for ids in got["input_ids"]]


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer itself puts before a text, and after it."""
    whole, [bare] = list(tokenizer("a")["input_ids"]), ids_of(tokenizer, ["a"])
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    start = next(starts, 0)
    return whole[:start], whole[start + len(bare) :]


def ending(tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's own, or else its end token, if it has one."""
    _, after = around(tokenizer)
    eos = tokenizer.eos_token_id
    return after or ([] if eos is None else [eos])


def special_tokens(tokenizer: Any) -> list[str]:
    """The special tokens as they are written, longer ones first."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda token: (-len(token), token))


def any_of(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds any of these words; of none, one that finds nothing."""
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


def hide_special(text: str, special: Sequence[str]) -> str:
    """The text with a number in place of every special token that is written in it."""
    number = {token: n for n, token in enumerate(special)}
    return any_of(special).sub(lambda found: f"{OPEN}{number[found[0]]}{CLOSE}", text)


def with_learned(
    tokenizer: Any, text: str, spans: Sequence[Span], special: Sequence[str] = ()
) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and for each whether it has a character in one of the spans.

    What `hide_special` has hidden becomes ordinary tokens.
    """
    ids: list[int] = []
    learned: list[bool] = []
    for start, end, hidden in _pieces(text):
        if hidden is None:
            own = [(a - start, b - start) for a, b in spans]
            piece, has = _overlapping(tokenizer, text[start:end], own)
        else:
            piece = plain_ids(tokenizer, special[hidden])
            has = [any(a <= start and end <= b for a, b in spans)] * len(piece)
        ids, learned = ids + piece, learned + has
    return ids, learned


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text in which a special token is no more than its letters; unknown, where it has no other."""
    [ids] = ids_of(tokenizer, [text], split_special_tokens=True)
    special, unknown = set(tokenizer.all_special_ids), tokenizer.unk_token_id
    known = (unknown if i in special else i for i in ids)
    return [i for i in known if i is not None]


def _pieces(text: str) -> Iterator[tuple[int, int, int | None]]:
    """Yield where each piece of a text starts and ends, and of a hidden special token its number."""
    end = 0
    for found in HIDDEN.finditer(text):
        if end < found.start():
            yield end, found.start(), None
        yield found.start(), found.end(), int(found[1])
        end = found.end()
    if end < len(text):
        yield end, len(text), None


def _overlapping(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and for each whether it has a character in one of the spans."""
    if not getattr(tokenizer, "is_fast", False):
        return _overlapping_without_offsets(tokenizer, text, spans)
    got = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[Span] = got["offset_mapping"]
    return list(got["input_ids"]), [any(a < end and b > start for start, end in spans) for a, b in offsets]


def _overlapping_without_offsets(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """The same by a tokenizer that cannot say where its tokens stand: by what stays the same when the text is cut."""
    [ids] = ids_of(tokenizer, [text])
    inside: set[int] = set()
    for start, end in ((max(0, a), b) for a, b in spans if b > 0):
        [before, after] = ids_of(tokenizer, [text[:start], text[end:]])
        inside |= {*range(shared(before, ids), len(ids) - shared(after[::-1], ids[::-1]))}
    return ids, [i in inside for i in range(len(ids))]


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the common start of two texts, or lists of tokens."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
