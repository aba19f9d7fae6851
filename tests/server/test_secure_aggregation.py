"""Secure aggregation in whole rounds, with real clients: the same mean, and nothing but sums at the server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from fedlora.checks.small_models import RANK, small_model
from fedlora.client.policy import ClientPolicy
from fedlora.encoding.client_data import ClientData
from fedlora.errors import Failure, RoundFailed
from fedlora.jobs import SecAggStep
from fedlora.lora import SIDES, LoRA, delta
from fedlora.messages.parts import PartTracker
from fedlora.metrics import Metrics
from fedlora.privacy.client_level import ClientLevelDP
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.run.plan import Plan, RoundResult
from fedlora.sections import Policy, PrivacyConfig, SecureConfig, Training
from fedlora.server.aggregation import Answers
from fedlora.server.rounds import fit
from fedlora.simulations.serial import Serial
from fedlora.strategy import Client, Job, Strategy, Update, catalogue, load

SGD = Training(optimizer="sgd", lr=0.1, steps=2, batch_size=4, clip=0.0)
PLAN = Plan(rounds=1, cohort=5, training=SGD)
SECURE = SecureConfig(aggregation=True)
SUMS = sorted(e.name for e in catalogue() if e.cls.sums_only)
START = small_model("bert").start


@dataclass
class Line:
    """A fleet whose every message is kept as the server gets it; some clients fall silent at some step."""

    fleet: Serial
    silent: Mapping[str, int] = field(default_factory=dict)  # step -> the client that is not heard from then on
    heard: list[Any] = field(default_factory=list)

    @property
    def traffic(self) -> PartTracker:
        return self.fleet.traffic

    def clients(self) -> Sequence[Client]:
        return self.fleet.clients()

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        for i, answer in self.fleet.train(jobs):
            self.heard.append(answer)
            yield i, Failure("its line is dead") if i == self.silent.get("train") else answer

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        replies: dict[int, Mapping[str, str] | Failure] = dict(self.fleet.ask(asks))
        self.heard += replies.values()
        for i, ask in asks.items():
            if i == self.silent.get(ask.step):
                replies[i] = Failure("its line is dead")
        return replies

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        return self.fleet.evaluate(jobs)


def line(folder: Path, ranks: Sequence[int] = (RANK,) * 5, fewest_scored: int = 1, **silent: int) -> Line:
    where = small_model("bert")
    rows = [where.clients[i % 3].train_rows[: 4 + i] for i in range(len(ranks))]
    policy = ClientPolicy(fewest_scored=fewest_scored)
    data = [ClientData(where.model.encoder, r) for r in rows]
    return Line(Serial(where.model, data, ranks, folder, policy=policy), silent)


def run(fleet: Line, plan: Plan, strategy: Strategy[Any] | None = None) -> list[RoundResult]:
    return list(fit(strategy or load("fedavg"), fleet, START, plan))


def apart(one: LoRA, other: LoRA) -> float:
    """The largest difference of two numbers in the same place."""
    pairs = [(t, other.side(s)[m]) for s in SIDES for m, t in one.side(s).items()]
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("name", SUMS)
def test_the_mean_is_that_of_a_run_without_it(name: str, tmp_path: Path) -> None:
    ranks = (1, 2, 2, 1, 2) if name == "fslora" else (RANK,) * 5
    plain = run(line(tmp_path / "plain", ranks), PLAN, load(name))
    secure = run(line(tmp_path / "secure", ranks), replace(PLAN, secure=SECURE), load(name))
    one, other = (load(name).adapter(done[-1].state) for done in (plain, secure))
    if name in ("fedsvd", "fedask"):  # whose factors turn by any angle where singular values are nearly equal
        one, other = (LoRA(D=delta(x), H=x.H) for x in (one, other))
    assert apart(one, other) < 2e-7
    assert secure[0].train_loss == pytest.approx(plain[0].train_loss, rel=1e-5)


def test_the_server_gets_no_update_and_no_loss_of_a_single_client(tmp_path: Path) -> None:
    fleet = line(tmp_path)
    run(fleet, replace(PLAN, secure=SECURE))
    updates = [h for h in fleet.heard if isinstance(h, Update)]
    assert len(updates) == 5
    assert all(not u.lora and u.loss is None and u.masked is not None for u in updates)
    told = {key for h in fleet.heard if isinstance(h, Mapping) for key in h}
    assert told == {"sealing", "masking", "mark", "examples", "records", *"01234"}  # keys, weights, and sealed shares


def test_what_a_single_client_sends_looks_like_noise(tmp_path: Path) -> None:
    """Uniform bytes, and no trace of the update in them: its real values have no correlation with what was sent."""
    fleet = line(tmp_path)
    run(fleet, replace(PLAN, secure=SECURE))
    real = dict(line(tmp_path / "plain").train({i: _job(i) for i in range(5)}))
    for i, sent in enumerate(h for h in fleet.heard if isinstance(h, Update)):
        assert sent.masked is not None
        counts = torch.bincount(sent.masked.view(torch.uint8).long(), minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-6
        delta = torch.cat([(real[i].lora.side(s)[m] - t).flatten() for s in "ABH" for m, t in START.side(s).items()])
        pair = torch.stack([sent.masked[: len(delta)].double(), delta.double()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) * len(delta) ** 0.5 < 5


def _job(i: int) -> Job:
    return replace(load("fedavg").client_init(START, Client(i, 1, RANK)), training=SGD)


@pytest.mark.parametrize("step", ["join", "share", "train"])
def test_who_drops_out_before_the_sum_is_left_out_of_the_mean(step: str, tmp_path: Path) -> None:
    done = run(line(tmp_path / "secure", **{step: 2}), replace(PLAN, secure=SECURE))[0]
    without = run(line(tmp_path / "plain", train=2), PLAN)[0]
    assert set(done.failed) == {2} and apart(done.state, without.state) < 2e-7


def test_who_drops_out_after_its_update_came_is_in_the_mean(tmp_path: Path) -> None:
    done = run(line(tmp_path / "secure", reveal=2), replace(PLAN, secure=SECURE))[0]
    assert not done.failed and apart(done.state, run(line(tmp_path / "plain"), PLAN)[0].state) < 2e-7


def test_two_may_be_lost_at_different_steps(tmp_path: Path) -> None:
    done = run(line(tmp_path, (RANK,) * 6, train=1, reveal=3), replace(PLAN, cohort=6, secure=SECURE))[0]
    assert set(done.failed) == {1}


def test_too_few_for_a_sum_end_the_round_with_the_reason(tmp_path: Path) -> None:
    plan = replace(PLAN, secure=replace(SECURE, threshold=1.0))
    with pytest.raises(RoundFailed, match=r"0 of 5 clients answered.*4 members sent a masked update, 5 must"):
        run(line(tmp_path, train=2), plan)
    with pytest.raises(RoundFailed, match="2 members joined; a sum hides a vector from 3 members on"):
        run(line(tmp_path / "two", (RANK, RANK)), replace(PLAN, cohort=2, secure=SECURE))


def test_a_sum_that_cannot_be_unmasked_ends_the_round_with_the_reason_and_not_the_run(tmp_path: Path) -> None:
    """Here all updates came; one of the shares that take the masks off them did not."""
    plan = replace(PLAN, rounds=2, secure=replace(SECURE, threshold=1.0))
    fleet = line(tmp_path, reveal=2)
    rounds = fit(load("fedavg"), fleet, START, plan)
    first = next(rounds)
    assert first.skipped and "4 members revealed their shares, 5 must" in first.failed[0].reason
    fleet.silent = {}
    assert not next(rounds).skipped


def test_a_round_without_a_sum_may_be_skipped(tmp_path: Path) -> None:
    plan = replace(PLAN, rounds=2, secure=replace(SECURE, threshold=1.0), policy=Policy(below_quorum="skip"))
    with pytest.raises(RoundFailed, match="no client answered in any of 2 rounds"):
        run(line(tmp_path, train=2), plan)


def test_an_update_beyond_reach_is_its_clients_failure_and_not_cut(tmp_path: Path) -> None:
    with pytest.raises(
        RoundFailed, match=r"client 0: the largest value of an update is .*, beyond 1e-05: raise secure"
    ):
        run(line(tmp_path), replace(PLAN, secure=replace(SECURE, reach=1e-5)))


def test_quantisation_is_small_against_an_update(tmp_path: Path) -> None:
    """An update of 1e-3 and less is off by less than a part in ten thousand, where Flower's own is off by 1e-4."""
    plan = replace(PLAN, training=replace(SGD, lr=1e-3))
    plain, secure = run(line(tmp_path / "a"), plan)[0], run(line(tmp_path / "b"), replace(plan, secure=SECURE))[0]
    moved = apart(plain.state, START)
    assert 1e-5 < moved < 1e-2 and apart(plain.state, secure.state) < 1e-4 * moved


def test_only_its_owner_can_read_a_clients_secrets(tmp_path: Path) -> None:
    run(line(tmp_path), replace(PLAN, secure=SECURE))
    files = list(tmp_path.rglob("member.json"))
    assert len(files) == 5 and all(f.stat().st_mode & 0o077 == 0 for f in files)


def test_records_can_be_hidden_as_well(tmp_path: Path) -> None:
    """DP-SGD at the client, then the mask; with the noise of a seed both ways end alike."""
    dp = PrivacyConfig(noise=1.0, delta=1e-3, rate=0.5, seeded=True)
    plan = replace(PLAN, record_level=RecordLevelDP(config=dp, training=SGD, rounds=1), metrics=False)
    plain, secure = run(line(tmp_path / "a"), plan)[0], run(line(tmp_path / "b"), replace(plan, secure=SECURE))[0]
    assert apart(plain.state, secure.state) < 2e-7 and plain.spent == secure.spent and len(secure.spent) == 5
    assert secure.train_loss is None


@pytest.mark.parametrize(("rate", "fewest", "told"), [(0.75, 1, 5), (0.25, 1, 4), (0.75, 99, 0)])
def test_the_loss_under_a_mask_is_the_mean_of_those_who_drew_records_enough(
    rate: float, fewest: int, told: int, tmp_path: Path
) -> None:
    dp = PrivacyConfig(noise=1.0, delta=1e-3, rate=rate, seeded=True)
    training = replace(SGD, steps=1)
    plan = replace(PLAN, training=training, record_level=RecordLevelDP(config=dp, training=training, rounds=1), seed=4)
    plain = run(line(tmp_path / "a", fewest_scored=fewest), plan)[0]
    secure = run(line(tmp_path / "b", fewest_scored=fewest), replace(plan, secure=SECURE))[0]
    assert len([each for each in plain.record()["each"].values() if "train_loss" in each]) == told
    assert secure.train_loss == (pytest.approx(plain.train_loss, rel=1e-4) if told else None)


@pytest.mark.parametrize("clients", [2, 3])
def test_a_cohort_too_small_for_a_sum_is_released_as_noise(clients: int, tmp_path: Path) -> None:
    """Whether three were drawn and stayed is nothing that a model may tell."""
    hidden = ClientLevelDP(noise=0.3, rate=1.0, population=clients, delta=1e-2, clip=0.01, amplified=False)
    plan = replace(PLAN, client_level=hidden, metrics=False, secure=SECURE)
    done = run(line(tmp_path, (RANK,) * clients, train=1), plan)[0]
    assert not done.skipped and len(done.failed) == clients and apart(done.state, START) > 0


def test_a_clipped_update_is_never_beyond_reach(tmp_path: Path) -> None:
    """Who drops out may not depend on data, which a reach below the clip would make of it."""
    hidden = ClientLevelDP(noise=0.3, rate=1.0, population=5, delta=1e-2, clip=10.0, amplified=False)
    plan = replace(PLAN, client_level=hidden, metrics=False, secure=replace(SECURE, reach=1e-5))
    assert not run(line(tmp_path), plan)[0].failed


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_clients_can_be_hidden_from_all_but_a_sum(tmp_path: Path, quantile: float) -> None:
    """They clip before they mask; the server adds the noise to the sum, which is all it sees."""
    client_level = ClientLevelDP(noise=0.3, rate=0.9, population=5, delta=1e-2, clip=0.01, quantile=quantile, seed=4)
    plan = replace(PLAN, client_level=client_level, metrics=False)
    plain, secure = run(line(tmp_path / "a"), plan)[0], run(line(tmp_path / "b"), replace(plan, secure=SECURE))[0]
    assert plain.client_level is not None and secure.client_level is not None
    assert apart(plain.state, secure.state) < 2e-7
    assert secure.client_level.next_clip == pytest.approx(plain.client_level.next_clip, rel=1e-6)
    assert (secure.client_level.next_clip != 0.01) == bool(quantile)
