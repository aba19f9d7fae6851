"""A deployed run's parties have a simulation's examples, ranks and start, each from its own disk."""

import json
from pathlib import Path
from random import Random

import pytest
import torch

from fedlora import config
from fedlora.client.policy import client_policy
from fedlora.config import check_client_settings
from fedlora.errors import ClientFailed, ConfigError
from fedlora.run.agreement import agreement_for_clients
from fedlora.run.setup import RunSetup, for_client, for_server, prepare
from tests.support.models import make

SETTINGS = {"cohort": 2, "lora.rank": 4, "lora.ranks": "2,4,3", "strategy": "flora", "model.max_length": 16}
SETTINGS |= {"data.holdout": 0.3, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("parties")
    make("bert", made / "model")
    draw = Random(0)
    for name in ("site_0", "site_1", "site_2", "eval"):
        rows = [
            {"text": " ".join(f"w{draw.randrange(28)}" for _ in range(8)), "label": draw.choice(["no", "yes", "maybe"])}
            for _ in range(12)
        ]
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def settings(folder: Path) -> dict[str, object]:
    return {**SETTINGS, "model.path": str(folder / "model"), "data.eval": str(folder / "eval.jsonl")}


def agreed(server: RunSetup) -> dict[str, bool | int | float | str]:
    return agreement_for_clients(server).settings


@pytest.fixture(scope="module")
def whole(folder: Path) -> RunSetup:
    return prepare(config.build(settings(folder), {"data.path": str(folder / "site_*.jsonl")}))


@pytest.fixture(scope="module")
def server(folder: Path) -> RunSetup:
    return for_server(config.build(settings(folder), {"clients": 3}), 3)


def test_the_server_has_the_simulations_start_labels_and_evaluation(server: RunSetup, whole: RunSetup) -> None:
    assert server.config.data.labels == whole.config.data.labels and server.ranks == whole.ranks
    assert list(server.evaluation_rows) == list(whole.evaluation_rows) and server.clients_data == ()
    for side in "ABH":
        assert all(torch.equal(t, whole.start.side(side)[m]) for m, t in server.start.side(side).items())


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_client_has_the_simulations_examples_and_rank(
    i: int, folder: Path, server: RunSetup, whole: RunSetup
) -> None:
    mine = {"data.path": str(folder / f"site_{i}.jsonl"), "model.path": str(folder / "model")}
    mine |= {"data.labels": ", ".join(server.config.data.labels), "data.holdout": 0.3}
    party = for_client(agreed(server), mine, i)
    assert party.rank == whole.ranks[i] and party.model.fingerprint == server.model.fingerprint
    assert list(party.client_data.train_rows) == list(whole.clients_data[i].train_rows)
    assert list(party.client_data.heldout_rows) == list(whole.clients_data[i].heldout_rows)
    assert all(
        torch.equal(x["input_ids"], y["input_ids"])
        for x, y in zip(party.client_data.train, whole.clients_data[i].train, strict=True)
    )


def test_a_deployed_client_keeps_no_texts_on_a_disk_unless_it_says_so(
    folder: Path, server: RunSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "user"))
    mine = {"data.path": str(folder / "site_0.jsonl"), "model.path": str(folder / "model")}
    mine |= {"data.labels": ", ".join(server.config.data.labels)}
    agreed_on = agreed(server) | {"data.cache": str(tmp_path / "wanted by the server")}
    assert len(for_client(agreed_on, mine, 0).client_data.train) and not [*tmp_path.iterdir()]
    assert len(for_client(agreed_on, mine | {"data.cache": str(tmp_path / "own")}, 0).client_data.train)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*")} == {0o600}
    assert len(prepare(config.build(settings(folder), {"data.path": str(folder / "site_*.jsonl")})).evaluation)
    assert (tmp_path / "user").is_dir()  # of a simulation


def test_a_part_of_the_evaluation_is_spread_evenly(folder: Path, whole: RunSetup) -> None:
    some = {"data.path": str(folder / "site_*.jsonl"), "data.eval_limit": 5}
    few = prepare(config.build(settings(folder), some)).evaluation
    expected = [example["input_ids"].tolist() for example in whole.evaluation][::3]
    assert [example["input_ids"].tolist() for example in few] == expected and len(expected) == 4


def test_of_each_clients_held_out_examples_a_part_can_be_measured(folder: Path, whole: RunSetup) -> None:
    """Who is held out stays the same, and so what a client trains on."""
    some = {"data.path": str(folder / "site_*.jsonl"), "data.holdout_limit": 2}
    for few, all_of_them in zip(
        prepare(config.build(settings(folder), some)).clients_data, whole.clients_data, strict=True
    ):
        n = len(all_of_them.heldout)
        expected = [example["input_ids"].tolist() for example in all_of_them.heldout][:: max(1, -(-n // 2))]
        assert [example["input_ids"].tolist() for example in few.heldout] == expected and 1 <= len(expected) <= 2
        assert list(few.train_rows) == list(all_of_them.train_rows)


def test_clients_are_not_told_where_the_server_has_its_files(server: RunSetup, folder: Path) -> None:
    assert str(folder) not in json.dumps(agreed(server))
    with pytest.raises(ConfigError, match="in a folder of its own, model; give --model"):
        for_client(agreed(server), {"data.path": str(folder / "site_0.jsonl")}, 0)


def test_a_server_cannot_name_files_of_a_clients(server: RunSetup, folder: Path) -> None:
    """A server may send any setting: the client reads its own data, or its share of the embedded data."""
    evil = agreed(server) | {
        "data.path": str(folder / "site_1.jsonl"),
        "model.task": "lm",
        "data.labels": "",
    }
    party = for_client(evil | {"dp.ledger": "/", "model.path": ""}, {}, 0)
    assert "package" in party.client_data.train_rows[0]


def test_an_embedded_client_beyond_the_shares_is_told_so(server: RunSetup) -> None:
    with pytest.raises(ClientFailed, match="client 7 has no share of the embedded data of 3 clients"):
        for_client(agreed(server) | {"model.path": ""}, {}, 7)


def test_only_what_is_its_own_is_a_clients_to_set() -> None:
    assert check_client_settings({"data.path": "x.jsonl", "threads": 2, "dp.budget": 3}).dp.budget == 3
    with pytest.raises(ConfigError, match=r"train.lr is the server's to set; a client's own are data.\*"):
        check_client_settings({"train.lr": 1})


def test_what_a_client_insists_on_is_its_own_settings_and_its_ledgers_outlive_runs(tmp_path: Path) -> None:
    own = client_policy({"dp.epsilon": 3.0, "client.egress": "A *"}, tmp_path)
    assert own.private and own.budget == 3.0 and own.egress == ("A *",) and own.ledgers == tmp_path
    assert not own.seeded and not client_policy({}, tmp_path).private


def test_a_server_without_data_must_know_the_classes(folder: Path) -> None:
    given = settings(folder) | {"data.eval": "", "clients": 3, "model.task": "classify"}
    with pytest.raises(ConfigError, match=r"no data to find the classes in; set data\.labels"):
        for_server(config.build(given), 3)
    assert for_server(config.build(given, {"data.labels": "no,yes"}), 3).evaluation_rows == ()


@pytest.mark.parametrize(
    ("chosen", "engine"),
    [
        ({}, "stacked"),
        ({"engine": "serial"}, "serial"),
        ({"engine": "flower"}, "flower"),
        ({"dp.noise": 1.0}, "stacked"),
        ({"dp.noise": 1.0, "dp.level": "client"}, "serial"),
        ({"dp.noise": 1.0, "dp.level": "client", "engine": "stacked"}, "serial"),
    ],
)
def test_an_engine_that_is_left_open_is_the_fastest_that_can(chosen: dict[str, object], engine: str) -> None:
    """Where clients are hidden, none may change another's update, be it by rounding."""
    made = config.build(chosen)
    assert config.engine_of(made) == engine
    assert ("dp.level = client" in config.why_apart(made)) == (chosen.get("dp.level") == "client")


def test_products_in_mixed_precision_are_agreed_on(folder: Path) -> None:
    """In the others the number type of the base says it, and the setting is none that clients have to know."""
    names = {}
    for precision in ("auto", "fp32", "mixed"):
        server = for_server(config.build(settings(folder), {"clients": 3, "precision": precision}), 3)
        names[precision] = agreed(server).get("precision")
    assert names == {"auto": None, "fp32": None, "mixed": "mixed"}
    mine = {"data.path": str(folder / "site_0.jsonl"), "model.path": str(folder / "model")}
    mine |= {"data.labels": ", ".join(server.config.data.labels), "data.holdout": 0.3}
    assert not for_client(agreed(server), mine, 0).model.offset.folds  # as in mixed precision
