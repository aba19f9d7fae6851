"""The audit is worth what it catches: a sound product passes, and every bug that is planted is found by its test."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora import config as configuration
from fedlora import jobs
from fedlora.audit import (
    canaries,
    client_level,
    planted_bugs,
    planted_client_level_bugs,
    record_level,
    report,
    schemas,
    sensitivity,
    statistics,
    subject,
)
from fedlora.audit.planted_bugs import PlantedBug
from fedlora.audit.statistics import Finding
from fedlora.audit.subject import RecordLevelSetting
from fedlora.checks.small_models import Kind, small_model
from fedlora.client import handlers
from fedlora.errors import PrivacyError
from fedlora.models.model import Model
from fedlora.privacy import client_level as client_level_dp
from fedlora.run.directory import RunDirectory
from tests.cli.test_simulate import Done, fedlora
from tests.support.models import make

SOUND = subject.RecordLevelSubject()
LOOKS: dict[str, Callable[[Any, Any], Iterator[Finding]]] = {  # by the number of what it finds
    "T1": record_level.sensitivity,
    "T2": record_level.noise,
    "T3": record_level.noise,
    "T4": record_level.training,
    "T5": record_level.training,
    "T6": record_level.training,
    "T7": record_level.noise,
    "T8": record_level.noise,
    "T9": record_level.answers,
}
COUNTS = {
    "T1": client_level.sensitivity,
    "T2": client_level.noise,
    "T3": client_level.noise,
    "T4": client_level.noise,
    "T5": client_level.draws,
}
ATTACKED = ["no clipping", "noise divided by the root of the batch", "one seed for the noise of all clients"]
TOGETHER = ["each tensor clipped by itself", "one side without noise", "dropout seeded for all"]
CROWD = ["--dp-level", "client", "--dp-noise", "1"]  # noise that is given need not be reckoned out first
BY_NAME = {c.name: c for c in planted_bugs.RECORD}


@cache
def staged(kind: Kind = "bert", **given: Any) -> RecordLevelSetting:
    """What `fedlora audit` builds, on a tiny model of a kind, for clients that train one after another."""
    settings = {"engine": "serial"} | {key.replace("__", "."): value for key, value in given.items()}
    path = {"model.path": small_model(kind).config.path}
    return subject.record_level_setting(configuration.build(report.EPSILON, report.EMBEDDED, path, settings))


@cache
def crowd(**given: Any) -> client_level.ClientLevelSetting:
    """The same, of a run that hides clients."""
    settings = {key.replace("__", "."): value for key, value in given.items()}
    hidden = {"model.path": small_model("bert").config.path, "dp.level": "client", "dp.noise": 1.0}
    return client_level.client_level_setting(configuration.build(report.EMBEDDED, hidden, settings))


def failed(findings: Iterator[Finding]) -> list[str]:
    return [f.name for f in findings if not f.passed]


@pytest.mark.parametrize("engine", ["stacked", "serial"])
@pytest.mark.parametrize("look", record_level.TESTS)
def test_a_sound_product_passes(
    look: Callable[[RecordLevelSetting, subject.RecordLevelSubject], Iterator[Finding]], engine: str
) -> None:
    here = staged(engine=engine)
    assert here.stacked == (engine == "stacked")
    assert failed(look(here, SOUND)) == []


@pytest.mark.parametrize("control", planted_bugs.RECORD, ids=lambda c: c.name)
def test_a_planted_bug_is_caught_by_its_test(control: PlantedBug) -> None:
    found = failed(LOOKS[control.caught_by[:2]](staged(), control.plant(staged())))
    assert any(name.startswith(control.caught_by) for name in found)


def test_reasons_are_asked_of_every_kind_of_message() -> None:
    asked = list[str]()

    def handle(kind: str, *given: Any, **named: Any) -> Any:
        asked.append(kind)
        return handlers.handle(kind, *given, **named)

    assert failed(record_level.answers(staged(), replace(SOUND, handle=handle))) == []
    assert all(asked.count(kind) >= 10 for kind in ("who", "secure", "train", "evaluate"))


@pytest.mark.parametrize("name", TOGETHER)
def test_a_bug_planted_in_one_pass_over_all_clients_is_caught_too(name: str) -> None:
    here, control = staged(engine="stacked"), BY_NAME[name]
    assert control.is_caught(failed(LOOKS[control.caught_by[:2]](here, control.plant(here))))


@pytest.mark.parametrize("name", ATTACKED)
def test_canaries_catch_it_too(name: str) -> None:
    assert "T6 canaries" in failed(record_level.training(staged(), BY_NAME[name].plant(staged())))


def test_a_mean_over_all_tokens_of_a_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's loss: one long record takes weight from all the others."""
    here = staged("llama")

    def losses(batch: dict[str, Tensor]) -> Tensor:
        scores, targets = here.model.logits(batch)
        each = F.cross_entropy(scores, targets, ignore_index=-100, reduction="none").view(len(batch["labels"]), -1)
        return each.sum(1) * len(each) / (targets != -100).sum()

    assert failed(record_level.sensitivity(here, SOUND)) == []
    monkeypatch.setattr(here.model, "losses", losses)
    assert failed(record_level.sensitivity(here, SOUND)) == ["T1 sensitivity", "T1 sensitivity, micro-batches"]


@pytest.mark.parametrize(
    ("strategy", "looks"),
    [
        ("fedsa_lora", (record_level.sensitivity, record_level.noise)),  # B and the head are trained, and never leave
        ("fed_sb", (record_level.sensitivity,)),  # a core
        ("rolora", (record_level.noise,)),  # another side every round
        ("la_lora", (record_level.noise,)),  # another side every step
        ("fedask", (record_level.noise,)),  # a sketch of the product, and its projection
        ("fedex_lora", (record_level.training,)),  # whose clients go on from factors of their own
    ],
)
def test_what_is_trained_is_seen_whatever_a_strategy_sends(strategy: str, looks: tuple[Any, ...]) -> None:
    option = {"option__assignment": "keep"} if strategy == "fedex_lora" else {}
    here = staged(strategy=strategy, **option)
    assert [f for look in looks for f in failed(look(here, SOUND))] == []


def test_the_sensitivity_of_sides_that_are_trained_in_turn_is_that_of_a_step_of_each() -> None:
    tried = sensitivity.jobs_to_try(staged(strategy="la_lora"))
    assert [(job.sides_of(0), job.smoothing) for job in tried] == [("BH", ()), ("AH", ())]


def test_clients_that_go_on_from_factors_of_their_own_are_audited_in_one_pass() -> None:
    here = staged(strategy="fedex_lora", option__assignment="keep", engine="stacked")
    assert here.stacked and failed(record_level.training(here, SOUND)) == []


@pytest.mark.parametrize("given", [{"model.head": "frozen"}, {"dp.engine": "one", "lora.kind": "dora"}], ids=str)
def test_other_heads_and_adapters_are_audited_too(given: dict[str, Any]) -> None:
    assert failed(record_level.noise(staged(**{key.replace(".", "__"): v for key, v in given.items()}), SOUND)) == []


def test_noise_from_a_seed_is_found_out() -> None:
    seeded = staged(dp__seeded=True)
    assert failed(record_level.noise(seeded, SOUND)) == ["T3 noise, done again", "T8 dropout seeds"]
    assert failed(record_level.training(seeded, SOUND)) == ["T5 batch, steps apart"]


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_a_sound_crowd_passes(quantile: float) -> None:
    here = crowd(dp__quantile=quantile)
    findings = [f for look in client_level.TESTS for f in look(here, client_level.ClientLevelSubject())]
    assert failed(iter(findings)) == [] and len(findings) == (13 if quantile else 11)


@pytest.mark.parametrize("control", planted_client_level_bugs.CLIENT, ids=lambda c: c.name)
def test_a_bug_planted_in_the_crowd_is_caught_by_its_test(control: PlantedBug) -> None:
    found = failed(COUNTS[control.caught_by[:2]](crowd(), control.plant(crowd())))
    assert any(name.startswith(control.caught_by) for name in found)


def test_too_little_noise_on_the_count_is_caught() -> None:
    class Less(client_level_dp.ClientLevelDP):
        @property
        def count_noise(self) -> float:
            return super().count_noise / 2

    assert "T2 count, size" in failed(
        client_level.noise(crowd(dp__quantile=0.5), client_level.ClientLevelSubject(mechanism=Less))
    )


def test_canaries_bound_epsilon_from_below_and_not_too_high() -> None:
    """A bit that is true with probability e^eps / (1 + e^eps) is (eps, 0)-private; a copy is not private at all."""
    draw, above = np.random.default_rng(1), 0
    for _ in range(40):
        there = draw.random(1000) < 0.5
        truth = draw.random(1000) < 1 / (1 + np.exp(-1.0))
        score = np.where(truth == there, 1.0, -1.0) + 1e-3 * draw.standard_normal(1000)
        above += canaries.lower_bound(score, there, delta=1e-5) > 1.0
    assert above <= 2
    assert canaries.lower_bound(there.astype(float), there, delta=1e-5) > 3.5
    assert canaries.lower_bound(draw.standard_normal(1000), there, delta=1e-5) < 0.3


def test_a_stream_that_is_taken_up_later_is_the_same_stream() -> None:
    x = np.random.default_rng(0).standard_normal(5000)

    def passes(first: Any, second: Any) -> bool:
        return statistics.uncorrelated("", {"first": first, "second": second}, [("first", "second")]).passed

    assert not passes(x[:-3], x[3:]) and not passes(x, 0 * x) and passes(x[:2500], x[2500:])


def test_sizes_of_samples_must_vary_and_have_their_mean() -> None:
    draw = np.random.default_rng(0)
    for n, rate, steps in ((1208, 0.25, 60), (50, 0.02, 400)):
        sizes = draw.binomial(n, rate, steps).astype(float)
        assert statistics.poisson_sizes("", sizes, n=n, rate=rate).passed
        assert not statistics.poisson_sizes("", np.full(steps, n * rate), n=n, rate=rate).passed
        assert not statistics.poisson_sizes("", sizes + np.sqrt(n * rate), n=n, rate=rate).passed


@pytest.mark.parametrize(("kind", "form"), [("llama", "text"), ("llama-cls", "label"), ("vit", "image")])
def test_a_model_without_data_is_audited_at_what_it_was_made_for(kind: str, form: str, tmp_path: Path) -> None:
    made = str(make(kind, tmp_path / "model"))
    settings = configuration.build(report.EPSILON, {"model.path": made, "threads": 1, "lora.rank": 3})
    assert schemas.schema_of(settings).kind == form
    here = subject.record_level_setting(settings)
    assert failed(record_level.noise(here, SOUND)) == []
    assert len(here.made_up[0]) == subject.RECORDS


def test_an_audit_is_a_table_with_a_verdict() -> None:
    said = fedlora("audit", *CROWD)
    assert said.returncode == 0, said.stderr
    assert all(f"+  {name}" in said.stdout for name in ("T1 sensitivity", "T2 noise, shape", "T5 cohort sizes"))
    assert "passed, in" in said.stdout and "proves little" in " ".join(said.stdout.split())


def test_an_audit_that_fails_ends_so_and_says_what() -> None:
    done = fedlora("audit", *CROWD, "--dp.seeded", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 1 and not told["passed"]
    assert [t["name"] for t in told["tests"] if not t["passed"]] == [
        "T3 noise, done again",
        "T5 cohort, steps apart",
        "T5 cohort, done again",
    ]
    keys = {"name", "passed", "measured", "unit", "allowed", "detail", "seconds"}
    assert all(t.keys() == keys for t in told["tests"]) and told["settings"]["dp.seeded"] is True


def test_a_runs_settings_are_audited_and_the_findings_left_with_it(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run").create(replace(staged().config, strategy="ffa_lora"))
    done = fedlora("audit", tmp_path / "run", "--json")
    told = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert done.returncode == 0 and told == json.loads(done.stdout), done.stderr
    assert told["settings"]["strategy"] == "ffa_lora" and told["settings"]["audit.rounds"] == subject.ROUNDS
    assert (
        " ".join(t["name"][:2] for t in told["tests"]) == "T1 T1 T1 T2 T2 T2 T3 T3 T3 T3 T7 T8 T4 T5 T5 T5 T6 T9 T9 T9"
    )


def test_other_settings_than_the_runs_leave_nothing_with_it(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run").create(crowd().config)
    done = fedlora("audit", tmp_path / "run", "--dp.clip", "2", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["settings"]["dp.clip"] == 2.0, done.stderr
    assert not (tmp_path / "run" / "audit.json").exists()


def test_audits_are_repeated_and_controls_planted_by_the_command() -> None:
    told = json.loads(fedlora("audit", *CROWD, "--repeat", "2", "--json").stdout)
    assert told["runs"] == 2 and told["passed"] and set(told["alarms"].values()) == {0}
    done = fedlora("audit", *CROWD, "--controls")
    assert done.returncode == 0 and "every planted bug was caught" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dp-epsilon", "inf"], "has no privacy to audit"),
        (["nowhere"], "nowhere is no run directory"),
        (["--lora.kind", "dora"], "cannot tell one example's gradient from another's"),
        (["--dp-level", "client", "--strategy", "flora"], "needs every client's own update"),
        (["--membership"], "name its directory"),
        (["--lora.rnk", "4"], 'did you mean "lora.rank"'),
    ],
)
def test_what_cannot_be_audited_is_one_sentence(words: list[str], says: str) -> None:
    done: Done = fedlora("audit", *words)
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("error: ") == 1


def test_without_a_second_accountant_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(PrivacyError, match=r"pip install 'fedlora\[dev\]'"):
        statistics.epsilon(jobs.Charge(noise=1.0, rate=0.1, steps=10), delta=1e-5)


def test_a_client_that_refuses_ends_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: Model, batch: dict[str, Tensor]) -> Tensor:
        return torch.full((len(batch["labels"]),), float("nan"), requires_grad=True)

    monkeypatch.setattr(Model, "losses", breaks)
    with pytest.raises(PrivacyError):
        next(record_level.training(staged("gpt2", lora__targets="c_attn"), SOUND))
