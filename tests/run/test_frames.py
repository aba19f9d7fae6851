"""A run's records as tables of pandas."""

from pathlib import Path

from fedlora.run.directory import RunDirectory
from fedlora.run.frames import clients_frame, rounds_frame

RECORDS = [
    {
        "round": 1,
        "clients": 2,
        "answered": 1,
        "failed": {"0": "away"},
        "train_loss": 0.5,
        "eval": {"loss": 0.4, "accuracy": 0.8},
        "eval_clients": {"mean": 0.7, "worst_client": 1},
        "bytes_up": 10,
        "bytes_down": 20,
        "seconds": 1.5,
        "before": {"loss": 0.7, "accuracy": 0.5},
        "names": {"1": "north"},
        "each": {"1": {"rank": 4, "examples": 9, "train_loss": 0.5}, "0": {"rank": 4, "heldout": 3, "loss": 0.9}},
    },
    {"round": 2, "train_loss": None, "eval": None, "eval_clients": None, "seconds": 1.0},
]


def begun(path: Path) -> RunDirectory:
    (path / "config.toml").write_text('strategy = "flora"\nseed = 3\n')
    return RunDirectory(path)


def test_a_row_is_a_round_and_tells_whose_it_is(tmp_path: Path) -> None:
    frame = rounds_frame(begun(tmp_path), RECORDS)
    assert list(frame["round"]) == [0, 1, 2] and set(frame["strategy"]) == {"flora"} and set(frame["seed"]) == {3}
    assert list(frame["eval/accuracy"][:2]) == [0.5, 0.8] and frame["eval_clients/mean"][1] == 0.7
    assert not {"failed", "names", "each", "before"} & set(frame.columns)


def test_a_row_is_a_client_and_its_round(tmp_path: Path) -> None:
    frame = clients_frame(begun(tmp_path), RECORDS).sort_values("client", ignore_index=True)
    assert list(frame["client"]) == [0, 1] and list(frame["round"]) == [1, 1] and frame["name"][1] == "north"
    assert frame["loss"][0] == 0.9 and frame["examples"][1] == 9


def test_a_run_that_tells_nothing_of_its_clients_has_an_empty_table(tmp_path: Path) -> None:
    assert len(clients_frame(begun(tmp_path), RECORDS[1:])) == 0
