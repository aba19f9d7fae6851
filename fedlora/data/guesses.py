"""Which settings may be meant where no column has a usual name: for the end of an error, and never taken unasked."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from .tables import Table

PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp"}  # ends of the names of files
FEW = 0.5  # of the rows: a column with more different values holds no classes
LOOKED_AT = 1000  # rows


def likely_settings(table: Table, label: str = "") -> str:
    """Options that name the columns by what they hold, as words to follow a sentence; empty if nothing is likely.

    `label` is the column of the classes where its name tells it.
    """
    values = {name: list(_first_values(table, name)) for name in table.columns}
    image = next(filter(lambda name: _are_pictures(values[name]), values), "")
    text = "" if image else max(values, key=lambda name: _blanks(values[name]), default="")
    if not image and not _blanks(values.get(text, [])):
        return ""
    others = filter(lambda name: name not in (image, text) and _are_classes(values[name]), values)
    label = label or next(others, "")
    options = f"--data.image {quote(image)}" if image else f"--data.text {quote(text)}"
    return f'; is it "{options}{f" --data.label {quote(label)}" if label else ""}"?'


def _first_values(table: Table, name: str) -> Iterator[Any]:
    """Yield the first values of a column that are not empty."""
    features = getattr(table.rows, "features", None)
    if features is not None and not hasattr(features[name], "dtype"):
        return  # lists, or images
    for i in range(min(len(table.rows), LOOKED_AT)):
        value = table.rows[i].get(name)
        if value is not None and value != "":
            yield value


def _are_pictures(values: Sequence[Any]) -> bool:
    names = [Path(value[-20:]).suffix.lower() if isinstance(value, str) else "" for value in values]
    return bool(names) and {*names} <= PICTURES


def _blanks(values: Sequence[Any]) -> int:
    """How many blanks are in the column's texts; 0 for a column of single words, or of no texts."""
    return sum(value.count(" ") for value in values if isinstance(value, str))


def _are_classes(values: Sequence[Any]) -> bool:
    """Do the values repeat themselves, as the names or numbers of classes do?"""
    plain = [value for value in values if isinstance(value, int | str)]
    return len(plain) == len(values) and 2 <= len(set(plain)) <= FEW * len(plain)
