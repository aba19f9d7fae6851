"""A folder with small files and models by the names that the documents' commands use."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import copy

from tests.support import encoder_decoders
from tests.support.models import make

ROOT = Path(__file__).parents[2]
MODELS = {"my-model": "llama", "my-instruct-model": "llama", "my-bert": "bert", "MINILM": "bert"}
Row = Mapping[str, object]


def block(page: str, language: str) -> str:
    """The first block of this language in a page of docs/."""
    found = re.search(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, f"docs/{page} has no block of {language}"
    return found[1]


def write_folder(at: Path) -> None:
    """Write data of some sites, models, and what the documents have their reader write."""
    for name, kind in MODELS.items():
        make(kind, at / name)
    encoder_decoders.make("t5", at / "my-t5")
    _write_data(at)
    for folder, name, page, language in (
        (".", "study.toml", "research.md", "toml"),
        (".", "limits.toml", "consortium.md", "toml"),
        ("my_lab", "clipped.py", "own-strategy.md", "python"),
    ):
        (at / folder).mkdir(exist_ok=True)
        (at / folder / name).write_text(block(page, language))
    (at / "simulations").mkdir()
    for kept in (ROOT / "simulations").glob("*.toml"):
        copy(kept, at / "simulations")


def _write_data(at: Path) -> None:
    rows = [_row(i) for i in range(400)]
    labelled = [{"text": row["text"], "label": row["label"]} for row in rows]
    reviews = [{"sentence1": row["text"], "label": row["label"]} for row in rows]
    codes = [["fever", "cough"][: i % 3] for i in range(400)]
    lines: dict[str, Sequence[Row]] = {
        "train": labelled[:200],
        "test": rows[:9],
        "other": rows[9:18],
        "sst2/val": reviews[:9],
    }
    lines |= {f"sites/hospital_{i}": rows[8 * i : 8 * i + 8] for i in range(3)}
    lines |= {f"sst2/client_{i}": reviews[10 * i : 10 * i + 10] for i in range(6)}
    lines |= {"notes": [{"text": r["text"], "label": c} for r, c in zip(rows, codes, strict=True)]}
    tables: dict[str, Sequence[Row]] = {
        "notes": [{"text": r["text"], "codes": "; ".join(c)} for r, c in zip(rows, codes, strict=True)],
        "toxic": [{"text": r["text"], "toxic": i % 2, "insult": i % 3 % 2, "threat": 0} for i, r in enumerate(rows)],
    }
    banking = [{"text": r["text"], "category": f"c{i % 5}"} for i, r in enumerate(rows)]
    tables |= {f"banking77/{name}": banking for name in ("train", "test")}
    for name, some in lines.items():
        _place(at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    for name, some in tables.items():
        with _place(at / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(some[0]))
            writer.writeheader()
            writer.writerows(some)


def _row(i: int) -> Row:
    """A text with a class, and a prompt and its answer under several names."""
    text, answer = f"w{i % 7} w{i % 5} w{i % 3}", f"w{i % 4}"
    asked = {"prompt": text, "response": answer, "letter": text, "summary": answer}
    return asked | {"text": text, "label": ("no", "yes")[i % 2]}


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
