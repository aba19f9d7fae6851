"""The tiny model and data on which a benchmark's small form runs: nothing is needed for it but the library."""

import json
from csv import writer
from dataclasses import replace
from pathlib import Path

from benchmarks.tiny_models import ARCHITECTURES, WORDS, Architecture, Task, save

NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
ROWS = {"train": 60, "test": 12}


def inputs(task: Task, folder: Path, **shape: int) -> tuple[str, str]:
    """Make a model without dropout, and training and test rows as BANKING77 or GSM8K has them; return their folders.

    `shape` are sizes of the model, by their names in its config.
    """
    name = "bert" if task == "classify" else "llama"
    found = next(a for a in ARCHITECTURES if a.name == name)
    plain = _without_dropout(found)
    save(replace(plain, options={**plain.options, **shape}), task, folder / "model")
    for part, count in ROWS.items():
        (_classes if task == "classify" else _questions)(folder / part, count)
    return str(folder / "model"), str(folder)


def _without_dropout(found: Architecture) -> Architecture:
    """Engines draw dropout differently, so without it they can be compared."""
    return replace(found, options={**found.options, **NO_DROPOUT}) if found.name == "bert" else found


def _words(seed: int, count: int) -> str:
    """So many words, that follow from the seed."""
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(count))


def _classes(path: Path, count: int) -> None:
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as f:
        rows = ((_words(i, 3 + i % 9), f"class {i % 3}") for i in range(count))
        writer(f).writerows([("text", "category"), *rows])


def _questions(path: Path, count: int) -> None:
    rows = ({"question": _words(i, 3 + i % 9), "answer": _words(i + 1, 2 + i % 5)} for i in range(count))
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def federations(folder: Path) -> str:
    """Make a model, and rows as BANKING77 and SST-2 have them, of six clients; return the model's folder."""
    model, _ = inputs("classify", folder)
    for i in range(7):
        name = f"client_{i}.jsonl" if i < 6 else "val.jsonl"
        rows = ({"sentence1": _words(i + 7 * j, 3 + j % 9), "label": (i + j) % 2} for j in range(60))
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return model
