"""The privacy report of a run: `privacy.json` with every fact, and `privacy.md` for people who answer for data.

It is written anew after each round, and by whoever adds findings to the folder (`fedlora audit`). Its words are those
of `privacy_report.md.jinja` beside this file.
"""

import json
from collections.abc import Mapping
from math import exp, inf
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fedlora.storage.files import write_durably

from .directory import RunDirectory

TEMPLATE = Path(__file__).parent / "privacy_report.md.jinja"
PEOPLE = (2, 5, 10)  # records of one person, in the table of what they come to


def write(folder: RunDirectory, facts: Mapping[str, Any]) -> None:
    """Write the report of a run as it stands now."""
    records = folder.records()
    spent: dict[str, tuple[float, int]] = {}
    for record in records:
        spent |= record.get("spent", {})
    last = records[-1] if records else {}
    refused = {f"{i}: {why}" for r in records for i, why in r["failed"].items() if "ledger" in why or "budget" in why}
    so_far = {
        "rounds": last.get("round", 0),
        "epsilon": last.get("epsilon"),
        "epsilon_median": last.get("epsilon_median"),
        "clip": last.get("next_clip"),
        "clients": {i: {"epsilon": e, "rounds_joined": n} for i, (e, n) in spent.items()},
        "refused": sorted(refused),
    }
    content = json.dumps({**facts, "spent": so_far}, indent=1) + "\n"
    write_durably(folder.path / "privacy.json", content.encode())
    refresh(folder)


def refresh(folder: RunDirectory) -> None:
    """Write `privacy.md` anew, from the facts and what was found since; nothing where the run has no such facts."""
    facts = _read(folder, "privacy.json")
    if not facts:
        return
    found = {name: _read(folder, f"{name}.json") for name in ("audit", "membership")}
    env = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    env.filters["short"] = _short
    env.globals |= {"people": [(g, *group(g, _epsilon(facts), _delta(facts))) for g in PEOPLE], "odds": exp}
    text = env.from_string(TEMPLATE.read_text(encoding="utf-8")).render(facts, **found)
    write_durably(folder.path / "privacy.md", text.encode())


def group(g: int, epsilon: float, delta: float) -> tuple[float, float]:
    """Epsilon and delta of g records together: g epsilon and delta (e^(g epsilon) - 1) / (e^epsilon - 1), 1 at most."""
    if g * epsilon > 700:
        return g * epsilon, 1.0
    grown = (exp(g * epsilon) - 1) / (exp(epsilon) - 1) if epsilon else float(g)
    return g * epsilon, min(1.0, delta * grown)


def _short(x: float | None) -> str:
    """A count in full, and three digits of what was measured or worked out."""
    if x is None:
        return "more than can be told"
    return str(x) if isinstance(x, int) else f"{x:.3g}"


def _epsilon(facts: Mapping[str, Any]) -> float:
    """What the run comes to at its end."""
    if facts.get("record"):
        return max(float(facts["record"][end]["epsilon"]) for end in ("smallest", "largest"))
    client = facts.get("client") or {}
    return float(client.get("epsilon_prv") or client.get("epsilon_rdp") or inf)


def _delta(facts: Mapping[str, Any]) -> float:
    return float((facts.get("record") or facts.get("client") or {"delta": 1.0})["delta"])


def _read(folder: RunDirectory, name: str) -> dict[str, Any]:
    path = folder.path / name
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
