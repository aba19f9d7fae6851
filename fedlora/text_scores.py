"""Scores of a generated text beside the expected one: exact match of what is extracted from both, token F1, ROUGE-L.

They are written here because the packages that have them drop every letter that is not ASCII (rouge-score) or load
their code from the hub (evaluate); on English text they give the same numbers.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from .errors import ConfigError

Extractor = Callable[[str], str]
REGEX = "regex:"  # before a pattern, as the name of an extractor
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-−] ?)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
)
ARTICLES = {"a", "an", "the"}
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # from Thai to Han
TOKEN = re.compile(rf"[{UNSPACED}]|\d+(?:[.,]\d+)+|[^\W_{UNSPACED}]+")


@dataclass(frozen=True)
class TextScore:
    """How near a generated text comes to the expected one; every number is between 0 and 1."""

    exact_match: float
    token_f1: float
    rouge_l: float


def score(generated: str, expected: str, extract: Extractor) -> TextScore:
    """The scores of a text; an extractor that finds nothing in it makes it no match."""
    wanted = extract(expected)
    return TextScore(
        exact_match=float(wanted != "" and extract(generated) == wanted),
        token_f1=token_f1(generated, expected),
        rouge_l=rouge_l(generated, expected),
    )


def extractor(name: str) -> Extractor:
    """The function that takes out of a text what an exact match compares.

    `name` is text (all of it, without regard to case and blanks), number (the last number, as GSM8K's answers end on)
    or regex:PATTERN (the last match; its first group, if it has one). Raises `ConfigError` for any other.
    """
    if name.startswith(REGEX):
        return _by_pattern(name.removeprefix(REGEX))
    if name not in EXTRACTORS:
        raise ConfigError(f'eval.extract = "{name}" is none of {", ".join(EXTRACTORS)}, {REGEX}PATTERN')
    return EXTRACTORS[name]


def _whole(text: str) -> str:
    """The text in one case, with single blanks, and without a full stop at its end."""
    return " ".join(_folded(text).split()).removesuffix(".")


def _last_number(text: str) -> str:
    """The last number in a text, written plainly: 1,200.50 and $1200.5 are both 1200.5; empty without any."""
    found = NUMBER.findall(text)
    if not found:
        return ""
    number = Decimal(re.sub(r"[$, ]", "", found[-1].replace("−", "-")))
    return "0" if number == 0 else f"{number.normalize():f}"


def _by_pattern(pattern: str) -> Extractor:
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise ConfigError(f'eval.extract = "{REGEX}{pattern}" is no regular expression: {e}') from e

    def extract(text: str) -> str:
        """The last match, or its first group, in one case and with single blanks."""
        found = [*compiled.finditer(text)][-1:]
        return "".join(_whole(match.group(1 if compiled.groups else 0) or "") for match in found)

    return extract


EXTRACTORS: dict[str, Extractor] = {"text": _whole, "number": _last_number}


def tokens(text: str) -> list[str]:
    """The words and numbers of a text in one case; of a script without blanks, its characters."""
    return TOKEN.findall(_folded(text))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def token_f1(generated: str, expected: str) -> float:
    """The harmonic mean of precision and recall over tokens, articles aside.

    Rajpurkar et al., SQuAD (https://arxiv.org/abs/1606.05250), but that a decimal point is part of its number: there,
    1.5 equals 15.
    """
    a, b = ([token for token in tokens(text) if token not in ARTICLES] for text in (generated, expected))
    return _f1((Counter(a) & Counter(b)).total(), a, b)


def rouge_l(generated: str, expected: str) -> float:
    """The F-measure of the longest common subsequence of tokens.

    Lin, ROUGE: A Package for Automatic Evaluation of Summaries (https://aclanthology.org/W04-1013), section 3.1 with
    beta = 1, without stemming.
    """
    a, b = tokens(generated), tokens(expected)
    return _f1(longest_common_subsequence(a, b), a, b)


def _f1(common: int, a: Sequence[str], b: Sequence[str]) -> float:
    """2 common / (|a| + |b|), which is the harmonic mean of precision and recall; two empty texts are equal."""
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, by a row of the usual table as the bits of one integer.

    Hyyrö, Bit-Parallel LCS-length Computation Revisited (2004): a bit of `row` is 0 where the length grows by one.
    """
    where: dict[str, int] = defaultdict(int)
    for i, token in enumerate(a):
        where[token] |= 1 << i
    mask = row = (1 << len(a)) - 1
    for token in b:
        matches = row & where.get(token, 0)
        row = (row + matches) | (row - matches)
    return len(a) - (row & mask).bit_count()
