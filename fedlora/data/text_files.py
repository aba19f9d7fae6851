"""Tables from text files: JSON lines, a JSON list, CSV, and the same with tabs."""

import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.errors import DataError, cut
from fedlora.lfs import is_lfs_pointer

from .tables import Table

# an escaped backslash; a character in two halves, as JSON writes an emoji; or one half alone
HALVES = re.compile(r"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)")
TAB = "\t"
SEPARATORS = (",", ";", TAB, "|")  # of fields; files are read with commas, or with tabs
LONGEST_FIELD = min(sys.maxsize, 2**31 - 1)  # characters of a field in CSV; Python's own limit is 131,072


def read_jsonl(path: Path) -> Table:
    """The table of a file with an object a line."""
    rows, lines, halves = [], [], []
    for n, line in enumerate(_text(path).split("\n"), 1):  # splitlines would also cut at the likes of U+2028
        if line.strip():
            whole = _whole_characters(line)
            rows.append(_row(path, n, whole))
            lines.append(n)
            halves += [n] if whole != line else []
    return Table(str(path), rows, lines, _replaced(path, halves))


def _row(path: Path, n: int, line: str) -> dict[str, Any]:
    """The object on line n."""
    if line.strip() in ("{", "["):
        kind = "an object" if "{" in line else "a list"
        raise DataError(
            f"{path} line {n}: {kind} that goes on in the next line; write one object a line, "
            "or a list of them in a file that ends in .json"
        )
    row = _loads(line, f"{path} line", n)
    if not isinstance(row, dict):
        raise DataError(f"{path} line {n}: a {type(row).__name__}, and not an object with columns{_list_hint(row)}")
    return row


def _list_hint(value: Any) -> str:
    return "; a list of objects belongs in a file that ends in .json" if isinstance(value, list) else ""


def read_json(path: Path) -> Table:
    """The table of a file with a list of objects, or with an object a line."""
    text = _text(path)
    start = text.lstrip()[:1]
    first_line = text.lstrip().partition("\n")[0].strip()
    if start == "[":
        return _listed(path, text)
    if start == "{" and not first_line.endswith("}"):
        raise _one_object(path, _loads(text, f"{path} line", 1))
    table = read_jsonl(path)
    if len(table.rows) == 1 and _holds_rows(table.rows[0]):
        raise _one_object(path, table.rows[0])
    return table


def _listed(path: Path, text: str) -> Table:
    whole = _whole_characters(text)
    rows = _loads(whole, f"{path} line", 1)
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {n}: a {type(row).__name__}, and not an object with columns")
    warnings = (f"{path}: {HALF} is replaced by U+FFFD",) if whole != text else ()
    return Table(str(path), rows, warnings=warnings)


def _holds_rows(row: Any) -> bool:
    """Is this object no row, but one that holds rows or columns?"""
    values = list(row.values())
    columns = all(isinstance(value, list) for value in values) or all(isinstance(value, dict) for value in values)
    return bool(values) and ((columns and not any(map(_are_messages, values))) or any(map(_are_rows, values)))


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict) and not _are_messages(value)


def _are_messages(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else {}
    return isinstance(first, dict) and not first.keys().isdisjoint(("role", "from"))


def _one_object(path: Path, found: Any) -> DataError:
    """The error for a file that holds one object and no list of rows."""
    lists = [f'"{cut(key)}"' for key, value in found.items() if _are_rows(value)] if isinstance(found, dict) else []
    remedy = (
        f"its {' and '.join(lists[:3])} {'are lists: save each alone' if lists[1:] else 'is a list: save that alone'}"
    )
    return DataError(f"{path}: an object, not a list of rows; {remedy if lists else 'write one object a row'}")


def _loads(text: str, place: str, line: int) -> Any:
    """The value that a JSON text stands for; `line` is the number of its first line in the file."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as e:
        more = "; write one object a line, or a list of them" if e.msg == "Extra data" else ""
        raise DataError(f"{place} {line + e.lineno - 1}: not JSON ({e.msg} at column {e.colno}){more}") from e
    except RecursionError as e:
        raise DataError(f"{place} {line}: JSON that is nested too deeply to be read; leave that column out") from e
    except ValueError as e:  # a key that stands twice, or a number of more digits than Python converts
        raise DataError(f"{place} {line}: cannot be read as JSON ({cut(str(e), 80)})") from e


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, in which no key stands twice: JSON would let one of its values go in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'"{next(key for key in keys if keys.count(key) > 1)}" stands twice in one object')
    return made


HALF = "half of a character, as of an emoji that was cut in two,"


def _whole_characters(text: str) -> str:
    """The JSON text with U+FFFD in place of escaped halves of characters that have no other half."""
    if "\\ud" not in text and "\\uD" not in text:
        return text
    return HALVES.sub(lambda found: "\\ufffd" if found[1] else found[0], text)


def _replaced(path: Path, lines: Sequence[int]) -> tuple[str, ...]:
    """A sentence about the lines in which halves of characters were replaced; none without any."""
    rows = f"and {len(lines) - 1} more " if len(lines) > 1 else ""
    return (f"{path} line {lines[0]} {rows}has {HALF} which is replaced by U+FFFD",) if lines else ()


def read_csv(path: Path) -> Table:
    """The table of a file with commas between its fields."""
    return _separated(path, ",")


def read_tsv(path: Path) -> Table:
    """The table of a file with tabs between its fields."""
    return _separated(path, TAB)


def _separated(path: Path, separator: str) -> Table:
    text = _text(path)
    _check_separator(path, text.partition("\n")[0], separator)
    _, *others = text.partition("\n")[0].split(separator)
    blanks = bool(others) and all(name.startswith(" ") for name in others)
    records, lines = _records(path, text, separator, skipinitialspace=blanks)  # as in "text, label"
    header = [name.strip() for name in records[0]] if records else []
    if len(set(header)) < len(header):
        raise DataError(f"{path} line 1: two columns have the same name: {cut(', '.join(header), 200)}")
    for fields, line in zip(records, lines, strict=True):
        if len(fields) != len(header):
            raise DataError(_uneven(f"{path} line {line}", len(fields), len(header), separator))
    rows = [dict(zip(header, fields, strict=True)) for fields in records[1:]]
    return Table(str(path), rows, lines[1:], _swallowed(path, records[1:], lines[1:], separator))


def _uneven(place: str, fields: int, columns: int, separator: str) -> str:
    """The sentence about a row that has more or fewer fields than the header has columns."""
    shown = "tab" if separator == TAB else "comma"
    remedy = (
        f"put a field with a {shown} in it into quotes" if fields > columns else f"an empty field needs its {shown} too"
    )
    return f"{place}: {fields} field{'s' * (fields != 1)} under a header of {columns}; {remedy}"


def _swallowed(path: Path, records: Sequence[Sequence[str]], lines: Sequence[int], separator: str) -> tuple[str, ...]:
    """A sentence about the first quoted field in which there seem to be rows, as after a quote that none closes."""
    ends = tuple({record[place] for record in records} for place in (0, -1)) if records else ()
    for record, line in zip(records, lines, strict=True):
        long = [field.split("\n") for field in record if "\n" in field]
        more = max((_rows_within(pieces, len(record), separator, *ends) for pieces in long), default=0)
        if more:
            return (
                f"{path} line {line}: a quote that opens here closes {more} lines further on, over what seem to be "
                f"{more} rows; a quote that belongs to the text is written twice, in a field that is in quotes",
            )
    return ()


def _rows_within(pieces: Sequence[str], columns: int, separator: str, first: set[str], last: set[str]) -> int:
    """How many rows end within the lines of one field, if by their cells they are rows; else 0.

    There are as many separators as rows would have, and each line begins or ends as rows of the file do.
    """
    cells = [piece.rstrip("\r").split(separator) for piece in pieces]
    more = len(cells) - 1
    if columns < 2 or sum(len(line) - 1 for line in cells) != more * (columns - 1):
        return 0
    begin, end = all(line[0] in first for line in cells[1:]), all(line[-1] in last for line in cells[:-1])
    return more if begin or end else 0


def _check_separator(path: Path, header: str, separator: str) -> None:
    """Raise `DataError` for a first line that has another separator in it and not this one."""
    others = [other for other in SEPARATORS if other in header and separator not in header]
    if others:
        shown = "a tab" if others[0] == TAB else f'"{others[0]}"'
        raise DataError(
            f'{path} line 1: one column, "{cut(header.strip())}": is the separator {shown}? '
            "Save the file with commas, or with tabs under a name that ends in .tsv"
        )


def _records(path: Path, text: str, separator: str, **options: Any) -> tuple[list[list[str]], list[int]]:
    """The fields of every record that has any, the header among them, and the line on which each begins."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator, **options)
    records, lines, start = [], [], 1
    try:
        for fields in reader:
            if fields:
                records.append(fields)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as e:
        raise DataError(
            f"{path} line {start}: not CSV ({e}); close its quote; one that belongs to the text is written twice, "
            "in a field that is in quotes"
        ) from e
    return records, lines


def _text(path: Path) -> str:
    try:
        if is_lfs_pointer(path):
            raise DataError(f"{path} is a pointer of Git LFS, and not the file itself; run git lfs pull in its folder")
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8 ({e.reason}); save the file as UTF-8") from e
