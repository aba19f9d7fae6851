"""Membership inference: it finds members that a model learned by heart, and none of an untrained model."""

import json
from math import exp
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from fedlora.audit.membership_inference import MOST, against, bound, evenly_spread, losses, measures
from fedlora.checks.small_models import LABELS, WORDS, small_model
from fedlora.client import training as local_training
from fedlora.encoding.encoder import Records
from fedlora.jobs import Job
from fedlora.lora import LoRA
from fedlora.sections import Training
from tests.cli.test_simulate import fedlora
from tests.support.models import make

SMALL = ["--train.batch_size", "4", "--lora.rank", "3", "--model.max_length", "16", "--threads", "1"]


@pytest.fixture(scope="module")
def records() -> Records:
    """Random words and labels: a model can tell one record from another only if it has learned them by heart."""
    draw = Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=8)), "label": draw.choice(LABELS)} for _ in range(92)]
    return small_model("bert").model.encoder.by_row(rows)


@pytest.fixture(scope="module")
def client_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and private runs of a round on it: one that is finished, and one that nobody was evaluated in."""
    folder = tmp_path_factory.mktemp("membership")
    make("bert", folder / "model")
    for name in ("train", "test"):
        rows = [{"text": f"w{i % 7} w{i % 5}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = ["simulate", "--model", "model", "--data", "train.jsonl", "--clients", "2", "--cohort", "2", "--rounds", "1"]
    run += ["--dp-noise", "3", "--dp-delta", "1e-3", *SMALL]
    for out, evaluation in (("run", ["--eval-data", "test.jsonl"]), ("blind", ["--data.eval_share", "0"])):
        done = fedlora(*run, *evaluation, "--out", out, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_members_that_were_learned_by_heart_are_told_from_others(records: Records) -> None:
    where, members = small_model("bert"), records[:12]
    training = Training(lr=0.03, epochs=60, batch_size=12, clip=0)
    examples = [e for record in members for e in record]
    update, _ = local_training.train(where.model, Job(where.start, training=training), 0, examples, LoRA())
    plain, calibrated, control = against(where.model, where.start, update.lora, members, records[12:])
    assert plain.values[0] > 0.8 and plain.low[0] > 0.65 and calibrated.values[0] > 0.8
    assert control.low[0] < 0.6 and plain.values[3] > control.values[3]


def test_of_a_model_that_was_not_trained_nobody_is(records: Records) -> None:
    where = small_model("bert")
    plain, calibrated, control = against(where.model, where.start, where.start, records[::2], records[1::2])
    assert plain.low[0] < 0.5 < plain.high[0] and plain.values == control.values
    assert calibrated.values == (0.5, 0.0, 0.0, 0.0)


def test_measures_are_what_they_are_by_hand() -> None:
    assert measures(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == (1.0, 1.0, 1.0, 1.0)
    assert measures(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == (0.0, 0.0, 0.0, 0.0)
    assert measures(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == (0.5, 0.0, 0.0, 0.0)
    assert measures(np.array([1.0, 4.0]), np.array([2.0, 3.0])) == pytest.approx((0.5, 0.5, 0.5, 0.5))
    members, others = np.arange(1000) + 15.5, np.arange(1000.0)
    auc, one, tenth, advantage = measures(members, others)
    pairs = (members[:, None] > others).mean()
    assert (auc, one, tenth, advantage) == pytest.approx((pairs, 0.025, 0.016, 0.016), abs=1e-3)


def test_a_records_loss_is_the_mean_over_its_examples(records: Records) -> None:
    where = small_model("bert")
    single = losses(where.model, where.start, records[:4])
    joined = losses(where.model, where.start, [[*records[0], *records[1]], [*records[2], *records[3]]])
    assert joined == pytest.approx([(single[0] + single[1]) / 2, (single[2] + single[3]) / 2])


def test_the_bound_is_that_of_randomised_response() -> None:
    """An answer that is true with probability e^eps / (1 + e^eps) is recognised with an advantage of tanh(eps / 2)."""
    assert bound(epsilon=1.0, delta=0.0) == pytest.approx((exp(1) - 1) / (exp(1) + 1))
    assert bound(epsilon=0.0, delta=0.1) == pytest.approx(0.1)
    assert bound(epsilon=1e9, delta=0.0) == 1.0


def test_of_many_records_some_are_looked_at_evenly() -> None:
    every: Any = [[i] for i in range(5000)]
    taken = [r[0] for r in evenly_spread([*every, []])]
    assert len(taken) == MOST and taken[0] == 0 and taken[-1] > 4990 and len(set(taken)) == MOST


def test_a_private_runs_attack_comes_with_its_bound(client_data: Path) -> None:
    done = fedlora("audit", "run", "--membership", cwd=client_data)
    told = json.loads((client_data / "run" / "membership.json").read_text())
    assert done.returncode == 0 and "best advantage" in done.stdout, done.stderr
    assert told["members"] == told["others"] == 40 and len(told["attacks"]) == 3 and told["delta"] == 1e-3
    assert told["bound"] == pytest.approx(bound(epsilon=told["epsilon"], delta=1e-3)) and 0 < told["bound"] < 1
    assert told["attacks"][0]["auc_low"] < told["attacks"][0]["auc"] < told["attacks"][0]["auc_high"]
    assert json.loads(fedlora("audit", "run", "--membership", "--json", cwd=client_data).stdout) == told


def test_an_attacks_figures_are_called_a_release_and_are_not_in_the_privacy_report(client_data: Path) -> None:
    done = fedlora("audit", "run", "--membership", cwd=client_data)
    assert "is a release that no epsilon covers" in " ".join(done.stdout.split())
    page = (client_data / "run" / "privacy.md").read_text()
    assert "membership.json" in page and "AUC" not in page


def test_what_cannot_be_attacked_is_one_sentence(client_data: Path, tmp_path: Path) -> None:
    done = fedlora("audit", "blind", "--membership", cwd=client_data)
    assert done.returncode == 1 and "set data.eval or data.holdout" in done.stderr
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").write_bytes((client_data / "run" / "config.toml").read_bytes())
    done = fedlora("audit", tmp_path / "begun", "--membership", cwd=client_data)
    assert done.returncode == 1 and "has no adapter yet" in done.stderr
