"""Every file of a run directory and of its clients' state, damaged in every way, and what the resumed run then does.

    python tests/deploy/damaged_files.py             # a few minutes; prints what it sees
    python tests/deploy/damaged_files.py --write     # and puts the table into docs/faults.md

A row is good where the run ends as it would have without the damage, or where one sentence says what is wrong: as the
error that ends it, or as a client's failure in the round's record. It exits with 1 where there is any other row: a
traceback, or a run that is another one without a word.
"""

import argparse
import logging
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from fedlora import FedloraError, Result  # noqa: E402
from tests.support.damage import DAMAGE, damaged_copy  # noqa: E402
from tests.support.small_run import Outcome, begin, outcome, resume, site  # noqa: E402

RUNS: dict[str, dict[str, Any]] = {
    "FedSA, uploads as int8": {},
    "FedSA with DP-SGD": {"dp": {"noise": 1.0, "seeded": True, "delta": 0.01}, "messages": {}},
}
SKIPPED = "tensorboard/", "lock", "checkpoint/clients/1/"  # curves, a file without content, and one client more
PRIVATE = "checkpoint/clients/0/answer", "checkpoint/clients/0/ledger", "privacy."  # what a run has besides with DP-SGD
ONLY = {"FedSA with DP-SGD": PRIVATE}
MARKS = "<!-- what follows is written by tests/deploy/damaged_files.py -->", "<!-- up to the end -->"


class Warnings(logging.Handler):
    """Keeps what a run warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@dataclass(frozen=True)
class Row:
    """What a resumed run did after one file was damaged in one way."""

    run: str
    name: str
    how: str
    kind: str  # same, sentence, told, SILENT or TRACEBACK
    said: str = ""

    @property
    def is_good(self) -> bool:
        return self.kind in ("same", "sentence", "told")


def files(run: Path, only: tuple[str, ...]) -> list[str]:
    """The files of a run directory that are damaged, by their names there, which begin with one of `only`."""
    found = (path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file())
    return [name for name in found if name.startswith(only) and not name.startswith(SKIPPED)]


def attempt(run: Path, expected: Outcome) -> tuple[str, str]:
    """Resume a damaged run; return the kind of what came of it, and what was said."""
    heard = Warnings()
    logging.getLogger("fedlora").addHandler(heard)
    try:
        return compared(resume(run), expected, heard.said)
    except FedloraError as e:
        return "sentence" if "\n" not in str(e) else "TRACEBACK", str(e)
    except Exception:
        return "TRACEBACK", traceback.format_exc().strip().splitlines()[-1]
    finally:
        logging.getLogger("fedlora").removeHandler(heard)


def compared(result: Result, expected: Outcome, said: list[str]) -> tuple[str, str]:
    """Whether a run ended as expected; if not, it must have said why."""
    told = said[0] if said else ""
    if outcome(result) == expected:
        return "same", told
    return ("told", told) if told else ("SILENT", "")


def rows(place: Path, label: str, only: str) -> Iterator[Row]:
    """Damage every file of a run that has `only` in its name in every way."""
    begun = begin(place, place / f"begun {label}", **RUNS[label])
    expected = outcome(resume(Path(shutil.copytree(begun, place / f"undisturbed {label}"))))
    for name in filter(lambda name: only in name, files(begun, ONLY.get(label, ("",)))):
        for how in DAMAGE:
            with TemporaryDirectory(dir=place) as folder:
                copy = damaged_copy(begun, Path(folder) / "run", name, how)
                kind, said = attempt(copy, expected)
                yield Row(label, name, how, kind, said.replace(str(copy), "RUN").replace("|", "/"))


def table(found: list[Row]) -> str:
    """The rows in short: of each file how often what came of it, then the rows that were not the same run."""
    lines = [f"{len(found)} damages: {', '.join(f'{n} {kind}' for kind, n in Counter(r.kind for r in found).items())}."]
    lines += ["", "| run | file | the same run | one sentence ends it | a client fails, told | otherwise |"]
    lines.append("|---|---|---|---|---|---|")
    for run, name in dict.fromkeys((row.run, row.name) for row in found):
        counts = Counter(row.kind for row in found if (row.run, row.name) == (run, name))
        others = sum(n for kind, n in counts.items() if kind not in ("same", "sentence", "told"))
        lines.append(f"| {run} | `{name}` | {counts['same']} | {counts['sentence']} | {counts['told']} | {others} |")
    lines += ["", "| file | damage | what was said, of the first |", "|---|---|---|"]
    unlike = [row for row in found if row.kind != "same"]
    for name, kind in dict.fromkeys((row.name, row.kind) for row in unlike):
        alike = [row for row in unlike if (row.name, row.kind) == (name, kind)]
        lines.append(f"| `{name}` | {', '.join(row.how for row in alike)} | {kind}: {alike[0].said[:240]} |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the table between its marks in docs/faults.md."""
    path = ROOT / "docs" / "faults.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    path.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")


def main() -> int:
    """Damage, print, and say whether every row is good."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    parser.add_argument("--only", default="", help="files whose name has this in it")
    asked = parser.parse_args()
    logging.getLogger("fedlora").propagate = False
    found = []
    with TemporaryDirectory(prefix="damaged-") as folder:
        place = site(Path(folder))
        for label in RUNS:
            for row in rows(place, label, asked.only):
                found.append(row)
                print(f"{row.run} | {row.name} | {row.how} | {row.kind} | {row.said[:160]}", flush=True)
    print(table(found))
    if asked.write:
        write(table(found))
    return int(not all(row.is_good for row in found))


if __name__ == "__main__":
    sys.exit(main())
