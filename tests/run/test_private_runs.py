"""Private runs, as a person starts, breaks and resumes them."""

import json
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.jobs import Charge
from fedlora.privacy.accounting import epsilon
from tests.cli.test_simulate import SMALL, Done, adapter, fedlora, given, records, same, site  # noqa: F401
from tests.support.forked import Forked, preload

DP = ["--dp-epsilon", "6", "--dp.rate", "0.4", "--train.steps", "2", "--train.optimizer", "sgd", "--rounds", "3"]
SEEDED = [*DP, "--dp.seeded"]
preload("opacus.accountants")


@pytest.fixture(scope="module")
def private(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:  # noqa: F811
    """One finished private run, in truth, and what it printed."""
    out = tmp_path_factory.mktemp("private") / "run"
    done = fedlora("simulate", *given, *DP, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def ledgers(folder: Path) -> list[Path]:
    return sorted(folder.rglob("ledger.jsonl"))


def charges(path: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == "charge"]


def test_the_plan_is_told_before_the_start_and_kept_to(private: tuple[Path, str]) -> None:
    out, said = private
    assert "privacy: epsilon 5.9" in said and "for a row of a client's data, if it joins 3 of 3 rounds" in said
    spent = [r["epsilon"] for r in records(out)]
    assert spent == sorted(spent) and spent[-1] <= 6.0
    assert all(r["epsilon_median"] <= r["epsilon"] and r["train_loss"] is None for r in records(out))


def test_epsilon_in_the_log_is_that_of_the_ledgers(private: tuple[Path, str]) -> None:
    out, _ = private
    delta = json.loads((out / "privacy.json").read_text())["record"]["delta"]
    lines = [charges(path) for path in ledgers(out)]
    each = [
        epsilon([Charge(noise=c["noise"], rate=c["rate"], steps=c["steps"]) for c in own], delta=delta) for own in lines
    ]
    assert records(out)[-1]["epsilon"] == max(each) and sum(map(len, lines)) == 3 * 3


def test_the_report_says_what_a_data_protection_officer_asks(private: tuple[Path, str]) -> None:
    out, said = private
    text = (out / "privacy.md").read_text()
    for word in (
        "one record of one client",
        "adversary",
        "budget",
        "sigma",
        "Poisson",
        "several records",
        "not protected",
    ):
        assert word in text
    assert "NOT PRIVATE" not in text and "None" not in text and f"privacy report: {out}/privacy.md" in said
    found = json.loads((out / "privacy.json").read_text())
    assert found["spent"]["epsilon"] == records(out)[-1]["epsilon"] and found["preflight"]["sensitivity"] <= 1.001
    assert {c["rounds_joined"] for c in found["spent"]["clients"].values()} <= {1, 2, 3}


def test_two_private_runs_are_never_alike(private: tuple[Path, str], given: list[str], tmp_path: Path) -> None:  # noqa: F811
    assert fedlora("simulate", *given, *DP, "--out", tmp_path / "again").returncode == 0
    assert not same(private[0], tmp_path / "again")


def test_where_losses_may_be_told_those_who_have_higher_ones_weigh_more(experiment: Path, given: list[str]) -> None:  # noqa: F811
    """Without losses q-FFL would be FedIT, and nobody would see it."""
    told = experiment.with_name("told")
    done = fedlora("simulate", *given, *SEEDED, "--dp.metrics", "--strategy", "q_ffl", "--out", told)
    assert done.returncode == 0, done.stderr
    assert all(0 < r["train_loss"] < 10 for r in records(told))
    assert all(len({each["train_loss"] for each in r["each"].values()}) == 3 for r in records(told))
    assert not same(experiment, told)


@pytest.fixture(scope="module")
def experiment(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """One finished run whose noise is the seed's."""
    out = tmp_path_factory.mktemp("experiment") / "run"
    done = fedlora("simulate", *given, *SEEDED, "--out", out)
    assert done.returncode == 0 and "NOT PRIVATE" in done.stdout, done.stderr
    return out


def test_an_experiment_can_be_repeated_and_says_that_it_is_not_private(
    experiment: Path,
    given: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    assert fedlora("simulate", *given, *SEEDED, "--out", tmp_path / "again").returncode == 0
    assert same(experiment, tmp_path / "again")
    assert "**NOT PRIVATE.**" in (experiment / "privacy.md").read_text()
    assert all(c["seeded"] for path in ledgers(experiment) for c in charges(path))


@pytest.fixture(scope="module")
def one_by_one(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The same experiment with clients that train one after another."""
    out = tmp_path_factory.mktemp("one_by_one") / "run"
    assert fedlora("simulate", *given, *SEEDED, "--engine", "serial", "--out", out).returncode == 0
    return out


def kill_and_resume(command: Sequence[Any], out: Path, moment: str) -> None:
    """Kill a run as soon as it has written a file of this name, and resume it to its end."""
    process = Forked("simulate", *command, "--out", out)
    while not list(out.rglob(moment)):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = fedlora("simulate", "--resume", out)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("moment", ["ledger.jsonl", "answer.safetensors"])
def test_a_killed_run_goes_on_and_no_client_pays_twice(
    one_by_one: Path,
    given: list[str],  # noqa: F811
    tmp_path: Path,
    moment: str,
) -> None:
    """kill -9 as soon as a client has charged, or has its answer: the job that comes again costs nothing more."""
    out = tmp_path / "killed"
    kill_and_resume([*given, *SEEDED, "--engine", "serial"], out, moment)
    assert same(one_by_one, out)
    assert sum(len(charges(path)) for path in ledgers(out)) == 9


@pytest.mark.parametrize("moment", ["ledger.jsonl", "answer.safetensors"])
def test_clients_of_a_pass_that_was_killed_pay_once(given: list[str], tmp_path: Path, moment: str) -> None:  # noqa: F811
    """Those without an answer are trained again, in a pass with other dropout; those with one give it again."""
    out = tmp_path / "killed"
    kill_and_resume([*given, *SEEDED], out, moment)
    assert sum(len(charges(path)) for path in ledgers(out)) == 9
    assert [record["round"] for record in records(out)] == [1, 2, 3]


ASYNCHRONOUS = ["--server.mode", "async", "--server.buffer", "2", "--simulation.speed", "1,3.7", "--engine", "serial"]


@pytest.fixture(scope="module")
def asynchronous(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The experiment of clients for whom nobody waits."""
    out = tmp_path_factory.mktemp("asynchronous") / "run"
    done = fedlora("simulate", *given, *SEEDED, *ASYNCHRONOUS, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("moment", ["ledger.jsonl", "answer.safetensors", "round-000001*"])
def test_a_killed_asynchronous_run_goes_on_to_the_same_end_and_no_client_pays_twice(
    asynchronous: Path,
    given: list[str],  # noqa: F811
    tmp_path: Path,
    moment: str,
) -> None:
    out = tmp_path / "killed"
    kill_and_resume([*given, *SEEDED, *ASYNCHRONOUS], out, moment)
    assert same(asynchronous, out)
    paid, wanted = ({path.parent.name: len(charges(path)) for path in ledgers(run)} for run in (out, asynchronous))
    assert paid == wanted


def test_a_client_whose_budget_is_spent_sits_out_and_the_round_goes_on(given: list[str], tmp_path: Path) -> None:  # noqa: F811
    """It allows less than the run would spend: who is drawn a second time says so."""
    some = ["--dp.budget", "4.5", "--server.below_quorum", "skip", "--cohort", "4"]
    done = fedlora("simulate", *given, *DP, *some, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    failed = {why for r in records(tmp_path / "run") for why in r["failed"].values()}
    assert failed and all("privacy budget is spent" in why for why in failed)
    assert all(len(charges(path)) == 1 for path in ledgers(tmp_path))
    assert "privacy budget is spent" in (tmp_path / "run" / "privacy.md").read_text()


def test_who_has_joined_as_often_as_it_may_is_not_asked_again(given: list[str], tmp_path: Path) -> None:  # noqa: F811
    """Noise for one round each: after two rounds of three, none of the six is left."""
    done = fedlora("simulate", *given, *DP, "--dp.joins", "1", "--out", tmp_path / "run")
    assert done.returncode == 1 and "round 3: every client has joined dp.joins = 1 rounds" in done.stderr
    assert [r["answered"] for r in records(tmp_path / "run")] == [3, 3] and adapter(tmp_path / "run")
    assert [len(charges(path)) for path in ledgers(tmp_path)] == [1] * 6


def test_a_ledger_outlives_its_run(given: list[str], tmp_path: Path) -> None:  # noqa: F811
    kept = ["--dp.ledger", str(tmp_path / "ledgers"), "--dp.joins", "1", "--rounds", "1"]
    assert fedlora("simulate", *given, *DP, *kept, "--out", tmp_path / "one").returncode == 0
    before = {path: path.read_bytes() for path in ledgers(tmp_path / "ledgers")}
    assert len(before) == 3 and not ledgers(tmp_path / "one")
    again = fedlora("simulate", *given, *DP, *kept, "--train.lr", "0.2", "--out", tmp_path / "two")
    assert again.returncode == 1 and "privacy budget is spent" in again.stderr and "Traceback" not in again.stderr
    assert before == {path: path.read_bytes() for path in ledgers(tmp_path / "ledgers")}


def test_a_second_run_on_a_ledger_says_before_its_start_what_both_will_have_spent(
    given: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """By another seed, which moves no record to another client."""
    noise = ["--dp.noise", "2", "--dp.rate", "0.4", "--train.steps", "2", "--rounds", "1", "--cohort", "6"]
    kept = ["--dp.ledger", str(tmp_path / "ledgers"), "--dp.budget", "4"]
    ends = []
    for name in ("one", "two"):
        done = fedlora("simulate", *given, *noise, *kept, "--seed", str(len(ends)), "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / name / "privacy.md").read_text()
        ends.append(records(tmp_path / name)[-1]["epsilon"])
        assert f"| at the end | epsilon {ends[-1]:.3g} for" in text
        assert f"privacy: epsilon {ends[-1]:.3g} at delta" in done.stdout
    assert ends[0] < ends[1] and "the ledgers hold up to epsilon" in done.stdout
    again = fedlora("simulate", *given, *noise, *kept, "--dp.budget", f"{ends[1]}", "--out", tmp_path / "three")
    assert again.returncode == 1 and "no round can be done: the privacy budget is spent of 6 of 6" in again.stderr
    assert not (tmp_path / "three").exists()


def test_a_ledger_of_other_data_charges_and_trains_nothing(given: list[str], site: Path, tmp_path: Path) -> None:  # noqa: F811
    kept = ["--dp.ledger", str(tmp_path / "ledgers"), "--rounds", "1", "--cohort", "6"]
    assert fedlora("simulate", *given, *DP, *kept, "--out", tmp_path / "one").returncode == 0
    other = site / "train.jsonl"
    (tmp_path / "other.jsonl").write_text("\n".join(other.read_text().splitlines()[1:]) + "\n")
    done = fedlora("simulate", *given, *DP, *kept, "--data", tmp_path / "other.jsonl", "--out", tmp_path / "two")
    assert done.returncode == 1 and "is of another data set" in done.stderr
    assert all(len(charges(path)) == 1 for path in ledgers(tmp_path))


def test_a_lost_ledger_is_missed_when_the_run_goes_on(private: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(private[0], tmp_path / "run")
    for client in (tmp_path / "run" / "checkpoint" / "clients").iterdir():
        shutil.rmtree(client)
    done = fedlora("simulate", "--resume", tmp_path / "run", "--rounds", "4")
    assert done.returncode == 1 and "0 charges, and the server has had" in done.stderr and not ledgers(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dp-epsilon", "0"], "dp.epsilon = 0"),
        (["--dp-epsilon", "-1"], "dp.epsilon = -1"),
        (["--dp-noise", "0"], "dp.noise = 0 adds no noise"),
        (["--dp-epsilon", "3", "--dp-level", "patient"], "dp.level = 'patient'"),
        (["--dp-epsilon", "3", "--dp-delta", "0.5"], "dp.delta = 0.5 is not below 1/N"),
        (["--dp-epsilon", "3", "--train.batch_size", "64"], "is more than the records of client"),
        (["--dp-epsilon", "3", "--dp.rate", "0.001"], "is less than one record a step"),
        (["--dp-epsilon", "3", "--data.holdout", "0.2"], "data.holdout = 0.2 lets clients tell scores"),
        (["--dp-epsilon", "3", "--dp-level", "client", "--exactness"], "exactness needs every client's update"),
        (["--dp-epsilon", "3", "--dp-level", "client", "--strategy", "flora"], "FLoRA needs every client's own update"),
        (["--secure.aggregation", "--strategy", "fedex_lora"], "FedEx-LoRA needs every client's own update"),
        (["--secure.aggregation", "--cohort", "2"], "secure.aggregation hides a client among 3 or more"),
        (["--secure.aggregation", "--cohort", "3", "--secure.colluders", "2"], "a client among 4 or more where 2 may"),
        (["--dp-epsilon", "3", "--lora.kind", "dora"], "choose lora.kind = lora"),
    ],
)
def test_a_mistake_is_one_sentence_and_costs_nothing(
    given: list[str],  # noqa: F811
    words: list[str],
    says: str,
    tmp_path: Path,
) -> None:
    done: Done = fedlora("simulate", *given, *words, "--out", tmp_path / "run")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and says in "\n".join(errors), done.stderr
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert not ledgers(tmp_path) and not (tmp_path / "run" / "adapter").exists()


def test_a_folder_in_which_nothing_has_begun_is_used_again(given: list[str], tmp_path: Path) -> None:  # noqa: F811
    words = [*given, "--rounds", "1", "--out", tmp_path / "run"]
    assert fedlora("simulate", *words, "--dp-epsilon", "3", "--lora.kind", "dora").returncode == 1
    done = fedlora("simulate", *words, "--dp-epsilon", "3")
    assert done.returncode == 0, done.stderr


def test_clients_are_hidden_with_a_warning_that_they_are_few(given: list[str], tmp_path: Path) -> None:  # noqa: F811
    level = ["--dp-level", "client", "--dp-epsilon", "8", "--dp.quantile", "0.5", "--rounds", "2"]
    done = fedlora("simulate", *given, *level, "--out", tmp_path / "run", "--server.below_quorum", "skip")
    assert done.returncode == 0, done.stderr
    assert "WARNING: 6 clients are too few to hide one among" in done.stdout
    last = records(tmp_path / "run")[-1]
    assert last["epsilon"] <= 8 and last["clip"] != last["next_clip"] and last["noise_to_signal"] > 1
    text = (tmp_path / "run" / "privacy.md").read_text()
    assert "one client with all its data" in text and "None" not in text


def test_sides_that_never_leave_are_trained_privately_too(given: list[str], tmp_path: Path) -> None:  # noqa: F811
    done = fedlora("simulate", *given, *DP, "--strategy", "fedsa_lora", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (
        "of which B, H never leave the client and are clipped and noised all the same"
        in (tmp_path / "run" / "privacy.md").read_text()
    )
