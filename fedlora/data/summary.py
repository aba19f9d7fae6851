"""What a run makes of its data, to be told before it starts: columns, sizes, classes, and what looks wrong."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any
from unicodedata import category, normalize

from .classes import class_counts
from .federated import Federated
from .rows import Rows, column_names
from .schema import LABEL, Schema, plain
from .targets import numbers_of

LARGE = 30.0  # a number of a regression beyond which a head learns too slowly
MANY = 20  # classes that are numbers, beyond which they may be quantities
LOOKED_AT = 100  # rows in which a column is looked at for text
MISSING = ("nan", "na", "n/a", "none", "null", "nil", "-", "?", "")  # what stands in a table where nothing stood


@dataclass(frozen=True)
class DataSummary:
    """The data of one side of a run, in figures and words; of a deployed client it stays on its machine."""

    kind: str  # of the schema
    used: tuple[str, ...]  # columns that are learned, or learned from
    left: tuple[str, ...]  # other columns that hold text, or by their name a class
    sizes: tuple[int, ...]  # training rows of each client
    heldout: tuple[int, ...]  # rows of each client that it holds out for its own evaluation
    evaluation: int  # rows of the global evaluation
    classes: Mapping[str, tuple[int, ...]]  # by name, in their order: the training rows that each client has of it
    warnings: tuple[str, ...]  # a sentence each
    numbers: tuple[float, ...] = ()  # of a regression the lowest, the mean and the highest number of all training rows


def summarise(federated: Federated) -> DataSummary:
    """The summary of the rows that one side of a run has."""
    schema, rows = federated.schema, [*federated.clients, federated.evaluation]
    counts = [class_counts(part, schema) for part in federated.clients]
    columns = list(dict.fromkeys(chain.from_iterable(map(column_names, rows))))
    numbers = [x for part in federated.clients for x in numbers_of(part, schema)]
    return DataSummary(
        kind=schema.kind,
        used=schema.columns,
        left=tuple(name for name in columns if _may_mean(name, rows) and name not in schema.columns),
        sizes=tuple(map(len, federated.clients)),
        heldout=tuple(map(len, federated.heldout)),
        evaluation=len(federated.evaluation),
        classes={name: tuple(count[name] for count in counts) for name in schema.labels},
        warnings=(
            *federated.warnings,
            *_alike_columns(columns),
            *_odd_classes(schema, counts),
            *_odd_numbers(schema, numbers),
        ),
        numbers=(min(numbers), fmean(numbers), max(numbers)) if numbers else (),
    )


def _may_mean(name: str, parts: Sequence[Rows]) -> bool:
    """Does a column hold text, or a class by its name?"""
    return plain(name) in LABEL or any(_holds_text(part, name) for part in parts)


def _holds_text(rows: Rows, name: str) -> bool:
    features = getattr(rows, "features", None)
    if features is not None:  # not looked into, as an image would be decoded
        return getattr(features.get(name), "dtype", "") in ("string", "large_string")
    values = (rows[i].get(name) for i in range(min(len(rows), LOOKED_AT)))
    return any(isinstance(value, str) and any(map(str.isalpha, value)) for value in values)


def _alike_columns(columns: Iterable[str]) -> Iterator[str]:
    """Yield a sentence for columns whose names are easily confused."""
    for names in _alike(columns, plain):
        yield f"the columns {_quoted(names)} differ by blanks or capitals alone"


def _odd_classes(schema: Schema, counts: Sequence[Counter[str]]) -> Iterator[str]:
    """Yield a sentence for whatever looks wrong in the classes and their counts."""
    names = schema.labels
    yield from _quantities(names)
    yield from _alike_classes(names)
    yield from _mixed(names)
    yield from _too_many(names, counts)
    yield from _missing(names)
    without = [name for name in names if not any(count[name] for count in counts)]
    if counts and without:
        yield f"no training row is of the class {_quoted(without)}"


def _alike_classes(names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for names that may stand for one class."""
    for alike in _alike(names, plain):
        yield f"the classes {_quoted(alike)} differ by blanks or capitals alone: are they one?"
    for alike in _alike(names, as_seen):
        if len({plain(name) for name in alike}) == len(alike):
            told = _quoted([ascii(name)[1:-1] for name in alike])
            yield f"the classes {told} look the same, and are of other characters: are they one?"
    for alike in _alike(names, _as_number):
        yield f"the classes {_quoted(alike)} are the same number: are they one?"


def _missing(names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for names that stand where there is no label."""
    for name in filter(lambda name: plain(name) in MISSING, names):
        yield f'the class "{name}" looks like a label that is missing'
    if "-1" in names and "0" in names:
        yield 'the class "-1" may stand for a label that is missing, as in the tests of GLUE'


def _quantities(names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for classes that may be no classes, but numbers of which one is nearer to the next."""
    if len(names) > MANY and all(map(_is_number, names)):
        yield f"all {len(names)} classes are numbers: if they measure something, set model.task = regression"


def _odd_numbers(schema: Schema, numbers: Sequence[float]) -> Iterator[str]:
    """Yield a sentence for numbers of a regression that will hardly be learned."""
    if numbers and min(numbers) == max(numbers):
        yield f'all numbers in "{schema.label_column}" are {numbers[0]:g}: there is nothing to learn'
    elif numbers and max(map(abs, numbers)) > LARGE:
        yield (
            f'the numbers in "{schema.label_column}" go from {min(numbers):g} to {max(numbers):g}, and their squared '
            "error is learned as it is: divide them all by the same number, so that they lie about between -1 and 1"
        )


def as_seen(name: str) -> str:
    """The name as a reader sees it: without what has no width, one blank for any, and every accent written one way."""
    shown = "".join(c for c in normalize("NFKC", name) if category(c) != "Cf")
    return " ".join(shown.casefold().split())


def _too_many(names: Sequence[str], counts: Sequence[Counter[str]]) -> Iterator[str]:
    """Yield a sentence where nearly every row has a class of its own."""
    rows = sum(sum(count.values()) for count in counts)
    if len(names) > max(MANY, rows // 2):
        yield f"{rows} training rows have {len(names)} classes: is that the column of the classes?"


def _mixed(names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for names of which some are whole numbers and some are not."""
    whole = [name for name in names if _is_number(name)]
    words = [name for name in names if not _is_number(name)]
    if whole and words:
        yield f"some classes are numbers ({_quoted(whole)}) and others are words ({_quoted(words)}): are they the same?"


def _is_number(name: str) -> bool:
    return isinstance(_as_number(name), float) and plain(name) not in MISSING


def _alike(names: Iterable[str], key: Any) -> list[list[str]]:
    """The names that are equal by the key, as lists of two or more."""
    groups = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _as_number(name: str) -> float | str:
    """The number that a name stands for, without regard to how it is written; the name itself if it is none."""
    try:
        return float(name)
    except ValueError:
        return plain(name) + name  # no other name's, as blanks and capitals have their own sentence


def _quoted(names: Sequence[str], most: int = 5) -> str:
    """The names in quotation marks, the first few of many."""
    shown = ", ".join(f'"{name[:40]}"' for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
