"""Membership inference on a finished run: can its training records be told from others by the adapter it delivered?

Carlini et al., Membership Inference Attacks From First Principles (S&P 2022), https://arxiv.org/abs/2112.03570

    a record is guessed to be a member where its score is high:   score = -loss,   or   loss(base) - loss(trained)

The first is the plain loss threshold. The second asks how much easier a record became, with the model before training
as the one reference that is there; LiRA proper trains many shadow models, and attacks better. As in the paper, what
counts is the true positive rate where false positives are rare: an attack can be right about few records and sure.

It is a measurement and no proof. The others are the run's evaluation and the clients' held-out rows, and these may
differ from the training rows in more than membership (in their labels, say, where clients are skewed), which by itself
moves the AUC off 1/2: the control is the same attack on the base model, which has seen none of them. The best threshold
is chosen on the very records it is judged by, so that the advantage is above zero by chance; the control's is as well.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora import config
from fedlora.data.encoding import Example, length
from fedlora.errors import CheckpointError, ConfigError
from fedlora.lora import LoRA
from fedlora.models.model import Model
from fedlora.models.peft_files import load_peft
from fedlora.privacy.client_level import client_level_dp
from fedlora.privacy.record_level import record_level_dp
from fedlora.run.compose import compose
from fedlora.run.directory import RunDirectory
from fedlora.run.privacy_report import refresh
from fedlora.run.setup import RunSetup, mute_transformers, prepare
from fedlora.storage.files import write_durably

from .statistics import Floats

MOST = 2000  # records on either side, evenly spread
DRAWS = 1000  # of the bootstrap
BATCH = 32
MEASURES = ("auc", "tpr_at_1_percent", "tpr_at_0.1_percent", "advantage")
NAMES = ("AUC", "TPR at 1 % FPR", "TPR at 0.1 % FPR", "best advantage")
CAVEAT = (
    "The others may differ from the members in more than membership, as where labels are skewed over clients: hold an "
    "attack against the control, not against an AUC of 1/2."
)
Records = Sequence[Sequence[Example]]


@dataclass(frozen=True)
class Attack:
    """How well one score tells members from others."""

    name: str
    values: tuple[float, ...]  # of `MEASURES`
    low: tuple[float, ...]  # ends of 95 % intervals
    high: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        told = dict(zip(MEASURES, self.values, strict=True))
        ends = {f"{m}_{end}": v for end in ("low", "high") for m, v in zip(MEASURES, getattr(self, end), strict=True)}
        return {"name": self.name, **told, **ends}


def attack(run: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Attack what a run delivered, print how well that goes, and write `membership.json` into its directory."""
    folder = RunDirectory(run)
    settings = config.build(folder.config(), given)
    console = Console(highlight=False, stderr=as_json)
    with console.status("loading"):
        mute_transformers()
        setup = prepare(settings)
        if not (folder.adapter / "adapter_config.json").is_file():
            raise CheckpointError(f"{run} has no adapter yet; finish the run with fedlora simulate --resume {run}")
        trained = load_peft(setup.model, folder.adapter)
        strategy = compose(setup.config, setup.start, setup.ranks)
        base = strategy.adapter(strategy.init(setup.start))
    with console.status("attacking"):
        members, others = both(setup)
        attacks = [*against(setup.model, base, trained, members, others)]
    epsilon, delta = _promise(setup, folder)
    told: dict[str, Any] = {"members": len(members), "others": len(others), "attacks": [a.record() for a in attacks]}
    if epsilon < inf:
        told |= {"epsilon": epsilon, "delta": delta, "bound": bound(epsilon, delta)}
    write_durably(run / "membership.json", json.dumps(told, indent=1).encode())
    refresh(folder)
    print(json.dumps(told)) if as_json else _show(console, attacks, told)


def both(setup: RunSetup) -> tuple[Records, Records]:
    """The records that clients trained on, and those that nobody did. Raises `ConfigError` where there are none."""
    by_row = setup.model.encoder.by_row
    parts = [
        by_row(rows) for rows in (setup.evaluation_rows, *(s.heldout_rows for s in setup.clients_data)) if len(rows)
    ]
    others = [record for part in parts for record in part]
    if not any(others):
        raise ConfigError("there are no records to compare with that nobody trained on: set data.eval or data.holdout")
    members = [record for client_data in setup.clients_data for record in by_row(client_data.train_rows)]
    if setup.config.dp.unit == "example":
        members, others = ([[e] for record in part for e in record] for part in (members, others))
    return some(members), some(others)


def against(
    model: Model, base: LoRA, trained: LoRA, members: Records, others: Records, seed: int = 0
) -> Iterator[Attack]:
    """The two attacks and the control."""
    before = [losses(model, base, side) for side in (members, others)]
    after = [losses(model, trained, side) for side in (members, others)]
    draw = np.random.default_rng(seed)
    yield measured("loss", -after[0], -after[1], draw)
    yield measured("loss less the base's", before[0] - after[0], before[1] - after[1], draw)
    yield measured("control: the base", -before[0], -before[1], draw)


@torch.no_grad()
def losses(model: Model, lora: LoRA, records: Records) -> Floats:
    """Of each record the mean loss of its examples, with the model as it is used."""
    model.set_adapter(lora)
    model.net.eval()
    of = sorted(((i, e) for i, record in enumerate(records) for e in record), key=lambda pair: length(pair[1]))
    total, count = np.zeros(len(records)), np.zeros(len(records))
    for start in range(0, len(of), BATCH):
        batch = of[start : start + BATCH]
        for (i, _), loss in zip(batch, model.losses(model.encoder.collate([e for _, e in batch])), strict=True):
            total[i] += float(loss)
            count[i] += 1
    return total / count


def measured(name: str, members: Floats, others: Floats, draw: np.random.Generator) -> Attack:
    """A score's measures, with what they are for 95 % of records drawn again from these."""
    again = [  # each side by itself
        measures(draw.choice(members, len(members)), draw.choice(others, len(others))) for _ in range(DRAWS)
    ]
    low, high = np.quantile(np.array(again), [0.025, 0.975], axis=0)
    return Attack(name, measures(members, others), tuple(low.tolist()), tuple(high.tolist()))


def measures(members: Floats, others: Floats) -> tuple[float, ...]:
    """AUC, true positive rates at false positive rates of 1 % and 0.1 %, and the best of their differences."""
    members, others = np.sort(members), np.sort(others)
    cuts = np.unique(np.concatenate([members, others]))[::-1]
    tpr = np.concatenate([[0.0], 1 - np.searchsorted(members, cuts) / len(members)])
    fpr = np.concatenate([[0.0], 1 - np.searchsorted(others, cuts) / len(others)])
    rare = (float(tpr[fpr <= most].max()) for most in (0.01, 0.001))
    return float(np.trapezoid(tpr, fpr)), *rare, float((tpr - fpr).max())


def bound(epsilon: float, delta: float) -> float:
    """The most that TPR - FPR can be of any attack on one record of an (epsilon, delta)-private run."""
    return (exp(min(epsilon, 700.0)) - 1 + 2 * delta) / (exp(min(epsilon, 700.0)) + 1)


def some(records: Records) -> Records:
    whole = [record for record in records if record]
    return [whole[i * len(whole) // MOST] for i in range(MOST)] if len(whole) > MOST else whole


def _promise(setup: RunSetup, folder: RunDirectory) -> tuple[float, float]:
    """The epsilon that the run spent on one record, at its delta; a record less is a client replaced by another."""
    settings, records = setup.config, folder.records()
    spent = max((r["epsilon"] for r in records if "epsilon" in r), default=inf)
    if settings.dp.by_client:
        hides = client_level_dp(settings.dp, settings.cohort, settings.clients, settings.rounds, settings.seed)
        return 2 * spent, (1 + exp(min(spent, 700.0))) * hides.delta
    if not settings.dp.by_record:
        return inf, 0.0
    clients = [
        client_data.client(i, rank)
        for i, (client_data, rank) in enumerate(zip(setup.clients_data, setup.ranks, strict=True))
    ]
    return spent, record_level_dp(settings.dp, settings.train, settings.rounds, clients).config.delta


def _show(console: Console, attacks: Sequence[Attack], told: Mapping[str, Any]) -> None:
    table = Table("", *(one.name for one in attacks), box=None, pad_edge=False)
    for i, name in enumerate(NAMES):
        table.add_row(name, *(f"{a.values[i]:.3f} ({a.low[i]:.3f}-{a.high[i]:.3f})" for a in attacks))
    console.print(table)
    lines = [f"{told['members']} members, {told['others']} others; 95 % intervals by bootstrap. {CAVEAT}"]
    if "bound" in told:
        lines += [
            f"(epsilon, delta) = ({told['epsilon']:.3g}, {told['delta']:.1e}) lets no attack on a record have more "
            f"advantage than {told['bound']:.3f}."
        ]
    else:
        lines += ["The run has no differential privacy, and so no bound on what a better attack could do."]
    for line in lines:
        console.print(Text(line))
