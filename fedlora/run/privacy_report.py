"""The privacy report of a run: `privacy.json` with every fact, and `privacy.md` for people who are answerable for data.

Both are written anew after each round; `fedlora audit` writes `privacy.md` once more, with its findings. The text of
the report is `privacy_report.md.jinja` beside this file.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from math import exp
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from fedlora.storage.files import write_durably

from .directory import RunDirectory
from .privacy_statement import final_delta, final_epsilon

log = logging.getLogger("fedlora")
TEMPLATE = Path(__file__).parent / "privacy_report.md.jinja"
PEOPLE = (2, 5, 10)  # numbers of records of one person, in the table of group privacy


def write(folder: RunDirectory, facts: Mapping[str, Any]) -> None:
    """Write both files of the report of a run as it stands now."""
    content = json.dumps({**facts, "spent": _spent(folder.records())}, indent=1) + "\n"
    write_durably(folder.path / "privacy.json", content.encode())
    refresh(folder)


def facts_of(folder: RunDirectory) -> dict[str, Any]:
    """Return the facts of the report, as `privacy.json` has them; nothing of a run without any."""
    return _read(folder, "privacy.json")


def refresh(folder: RunDirectory) -> None:
    """Write `privacy.md` anew, from the facts and all findings since; nothing where the run has no such facts."""
    facts = facts_of(folder)
    if not facts:
        return
    found = {name: _read(folder, f"{name}.json") for name in ("audit", "membership")}
    planned, spent = final_epsilon(facts), facts["spent"]["epsilon"] or 0.0
    end = max(planned, spent)  # what a client tells counts the other runs on its ledger, which the plan may not know
    people = [(g, *group(g, epsilon=end, delta=final_delta(facts))) for g in PEOPLE]
    text = _template().render(facts, **found, people=people, end=end, is_beyond=spent > planned, odds=exp)
    write_durably(folder.path / "privacy.md", text.encode())


@cache
def _template() -> Template:
    env = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    env.filters["short"] = _short
    return env.from_string(TEMPLATE.read_text(encoding="utf-8"))


def group(g: int, *, epsilon: float, delta: float) -> tuple[float, float]:
    """Return epsilon and delta for g records together, given those for one.

    They are g epsilon and delta (e^(g epsilon) - 1) / (e^epsilon - 1), at most 1.
    """
    if g * epsilon > 700:
        return g * epsilon, 1.0
    grown = (exp(g * epsilon) - 1) / (exp(epsilon) - 1) if epsilon else float(g)
    return g * epsilon, min(1.0, delta * grown)


def _spent(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the run has spent after these rounds, and who refused."""
    spent: dict[str, tuple[float, int]] = {}
    joined: Counter[str] = Counter()
    refused: set[str] = set()
    for record in records:
        spent |= record.get("spent", {})
        joined.update(record.get("spent", {}).keys())
        refused |= {f"{i}: {why}" for i, why in record["failed"].items() if _is_refusal(why)}
    last = records[-1] if records else {}
    return {
        "rounds": last.get("round", 0),
        "epsilon": last.get("epsilon"),
        "epsilon_median": last.get("epsilon_median"),
        "clip": last.get("next_clip"),
        "clients": {i: {"epsilon": epsilon, "rounds_joined": joined[i]} for i, (epsilon, _) in spent.items()},
        "refused": sorted(refused),
    }


def _is_refusal(why: str) -> bool:
    return "ledger" in why or "budget" in why


def _short(x: float | None) -> str:
    """Return a count in full, and three digits of a number that was measured or calculated."""
    if x is None:
        return "more than can be told"
    return str(x) if isinstance(x, int) else f"{x:.3g}"


def _read(folder: RunDirectory, name: str) -> dict[str, Any]:
    """The content of a file of findings; empty where there is none, or, with a warning, where it is damaged."""
    path = folder.path / name
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        log.warning("%s is damaged (%s), and is left out of the privacy report; have it made again", path, e)
        return {}
    return found
