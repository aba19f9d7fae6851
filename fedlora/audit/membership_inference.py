"""Membership inference on a finished run: does its adapter tell the training records from other records?

Carlini et al., Membership Inference Attacks From First Principles (S&P 2022), https://arxiv.org/abs/2112.03570

    a record is guessed to be a member where its score is high:   score = -loss,   or   loss(base) - loss(trained)

The first is the plain loss threshold. The second asks how much easier a record became, with the model before training
as the only reference; LiRA proper trains many shadow models, and attacks better. As in the paper, the true positive
rate where false positives are rare matters most: an attack may be right about few records, and certain of them.

What it measures is a release: the figures are functions of the training records' own losses, with no noise on them,
and no epsilon covers them. They stay on the screen and in `membership.json`; the run's privacy report, which is made to
be passed on, says that they exist and not what they are.

This is a measurement and no proof. The other records are the run's evaluation data and the clients' held-out rows. They
may differ from the training rows in more than membership (in their labels, say, where clients are skewed). That by
itself moves the AUC off 1/2, so the control is the same attack on the base model, which has seen none of the records.
The best threshold is chosen on the records that it is judged by, so that the advantage is above zero by chance; so is
the control's.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import exp, inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora import config as config_module
from fedlora.data.rows import Rows
from fedlora.encoding.encoder import Records, length
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

MOST = 2000  # members, and as many others, that are attacked
DRAWS = 1000  # samples of the bootstrap
BATCH = 32
MEASURES = ("auc", "tpr_at_1_percent", "tpr_at_0.1_percent", "advantage")
NAMES = ("AUC", "TPR at 1 % FPR", "TPR at 0.1 % FPR", "best advantage")
CAVEAT = (
    "The others may differ from the members in more than membership, as where labels are skewed over clients: hold an "
    "attack against the control, not against an AUC of 1/2."
)
RELEASE = (
    "These figures are computed from the training records with no noise on them: to pass them on is a release that no "
    "epsilon covers. privacy.md leaves them out."
)


@dataclass(frozen=True)
class Attack:
    """How well one score tells members from others."""

    name: str
    values: tuple[float, ...]  # of `MEASURES`
    low: tuple[float, ...]  # ends of 95 % intervals
    high: tuple[float, ...]

    def cell(self, i: int) -> str:
        """Return measure i and its interval, for a table."""
        return f"{self.values[i]:.3f} ({self.low[i]:.3f}-{self.high[i]:.3f})"

    def record(self) -> dict[str, Any]:
        """Return the attack as it stands in `membership.json`."""
        columns = {"": self.values, "_low": self.low, "_high": self.high}
        record: dict[str, Any] = {"name": self.name}
        for end, values in columns.items():
            record |= {f"{measure}{end}": value for measure, value in zip(MEASURES, values, strict=True)}
        return record


def attack(run: Path, given: Mapping[str, Any], *, as_json: bool) -> None:
    """Attack the adapter of a finished run, print the result, and write `membership.json` into the run's directory."""
    folder = RunDirectory(run)
    settings = config_module.build(folder.config(), given)
    console = Console(highlight=False, stderr=as_json)
    with console.status("loading"):
        mute_transformers()
        setup = prepare(settings)
        folder.check_files(setup.files, of="model.path")
        if not (folder.adapter / "adapter_config.json").is_file():
            raise CheckpointError(f"{run} has no adapter yet; finish the run with fedlora simulate --resume {run}")
        trained = load_peft(setup.model, folder.adapter)
        strategy = compose(setup.config, setup.start, setup.ranks)
        base = strategy.adapter(strategy.init(setup.start))
    with console.status("attacking"):
        members, others = members_and_others(setup)
        attacks = [*against(setup.model, base, trained, members, others)]
    epsilon, delta = _spent(setup, folder)
    content: dict[str, Any] = {
        "release": RELEASE,
        "members": len(members),
        "others": len(others),
        "attacks": [a.record() for a in attacks],
    }
    if epsilon < inf:
        content |= {"epsilon": epsilon, "delta": delta, "bound": bound(epsilon=epsilon, delta=delta)}
    with folder.only_writer():
        write_durably(run / "membership.json", json.dumps(content, indent=1).encode())
        refresh(folder)
    print(json.dumps(content)) if as_json else _show(console, attacks, content)


def members_and_others(setup: RunSetup) -> tuple[Records, Records]:
    """Return the records that clients trained on, and records that nobody trained on, at most `MOST` of each.

    Raises `ConfigError` where there are no others.
    """
    clients_data = setup.clients_data
    others = _records(setup, [setup.evaluation_rows, *(client_data.heldout_rows for client_data in clients_data)])
    if not any(others):
        raise ConfigError("there are no records to compare with that nobody trained on: set data.eval or data.holdout")
    members = _records(setup, [client_data.train_rows for client_data in clients_data])
    return evenly_spread(members), evenly_spread(others)


def _records(setup: RunSetup, parts: Sequence[Rows]) -> Records:
    """Return the records of these rows: a row each, or each example of a row, as the run's `dp.unit` says."""
    records = list(chain.from_iterable(map(setup.model.encoder.by_row, filter(len, parts))))
    if setup.config.dp.unit == "row":
        return records
    return [[example] for example in chain.from_iterable(records)]


def against(
    model: Model, base: LoRA, trained: LoRA, members: Records, others: Records, seed: int = 0
) -> Iterator[Attack]:
    """Yield the two attacks and the control."""
    before = [losses(model, base, side) for side in (members, others)]
    after = [losses(model, trained, side) for side in (members, others)]
    draw = np.random.default_rng(seed)
    yield measured("loss", -after[0], -after[1], draw)
    yield measured("loss less the base's", before[0] - after[0], before[1] - after[1], draw)
    yield measured("control: the base", -before[0], -before[1], draw)


@torch.no_grad()
def losses(model: Model, lora: LoRA, records: Records) -> Floats:
    """Return the mean loss over the examples of each record, (records,), with the model in evaluation mode."""
    model.set_adapter(lora)
    model.net.eval()
    examples = [(i, e) for i, record in enumerate(records) for e in record]
    examples.sort(key=lambda pair: length(pair[1]))  # like lengths together: less padding
    total, count = np.zeros(len(records)), np.zeros(len(records))
    for start in range(0, len(examples), BATCH):
        rows, batch = zip(*examples[start : start + BATCH], strict=True)
        found = model.losses(model.encoder.collate(batch))
        np.add.at(total, list(rows), found.double().cpu().numpy())
        np.add.at(count, list(rows), 1)
    return total / count


def measured(name: str, members: Floats, others: Floats, draw: np.random.Generator) -> Attack:
    """Return how well a score tells members from others, with 95 % intervals by bootstrap of either side."""
    again = [measures(draw.choice(members, len(members)), draw.choice(others, len(others))) for _ in range(DRAWS)]
    low, high = np.quantile(np.array(again), [0.025, 0.975], axis=0)
    return Attack(name, measures(members, others), tuple(low.tolist()), tuple(high.tolist()))


def measures(members: Floats, others: Floats) -> tuple[float, ...]:
    """Return AUC, true positive rates at false positive rates of 1 % and 0.1 %, and the largest TPR - FPR."""
    members, others = np.sort(members), np.sort(others)
    cuts = np.unique(np.concatenate([members, others]))[::-1]
    tpr = np.concatenate([[0.0], 1 - np.searchsorted(members, cuts) / len(members)])
    fpr = np.concatenate([[0.0], 1 - np.searchsorted(others, cuts) / len(others)])
    rare = (float(tpr[fpr <= most].max()) for most in (0.01, 0.001))
    return float(np.trapezoid(tpr, fpr)), *rare, float((tpr - fpr).max())


def bound(*, epsilon: float, delta: float) -> float:
    """Return the largest TPR - FPR that an attack on one record of an (epsilon, delta)-private run can have."""
    return (exp(min(epsilon, 700.0)) - 1 + 2 * delta) / (exp(min(epsilon, 700.0)) + 1)


def evenly_spread(records: Records) -> Records:
    """Return at most `MOST` of the records that have examples, evenly spread over them."""
    whole = list(filter(None, records))
    if len(whole) <= MOST:
        return whole
    return [whole[i * len(whole) // MOST] for i in range(MOST)]


def _epsilon(folder: RunDirectory) -> float:
    """Return the largest epsilon that the run tells; inf where it tells none."""
    return max((record["epsilon"] for record in folder.records() if "epsilon" in record), default=inf)


def _spent(setup: RunSetup, folder: RunDirectory) -> tuple[float, float]:
    """Return the epsilon that the run spent on one record, and its delta; inf for a run without privacy.

    With client-level privacy, one record less is one client replaced by another, which costs epsilon twice.
    """
    config, spent = setup.config, _epsilon(folder)
    if config.dp.by_client:
        mechanism = client_level_dp(
            config.dp, cohort=config.cohort, clients=config.clients, rounds=config.rounds, seed=config.seed
        )
        return 2 * spent, (1 + exp(min(spent, 700.0))) * mechanism.delta
    if not config.dp.by_record:
        return inf, 0.0
    clients = [
        client_data.client(i, rank)
        for i, (client_data, rank) in enumerate(zip(setup.clients_data, setup.ranks, strict=True))
    ]
    return spent, record_level_dp(config.dp, config.train, config.rounds, clients).delta


def _show(console: Console, attacks: Sequence[Attack], content: Mapping[str, Any]) -> None:
    table = Table("", *(attack.name for attack in attacks), box=None, pad_edge=False)
    for i, name in enumerate(NAMES):
        table.add_row(name, *(attack.cell(i) for attack in attacks))
    console.print(table)
    counts = f"{content['members']} members, {content['others']} others; 95 % intervals by bootstrap. {CAVEAT}"
    console.print(Text(counts))
    console.print(Text(_promise(content)))
    console.print(Text(RELEASE))


def _promise(content: Mapping[str, Any]) -> str:
    """Return what the run's privacy says about all attacks."""
    if "bound" not in content:
        return "The run has no differential privacy, and so no bound on what a better attack could do."
    return (
        f"(epsilon, delta) = ({content['epsilon']:.3g}, {content['delta']:.1e}) lets no attack on a record have more "
        f"advantage than {content['bound']:.3f}."
    )
