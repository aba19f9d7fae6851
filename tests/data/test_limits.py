"""The part of the data that data.limit leaves: how much of each file, which rows, and what one row more changes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedlora.data.federated import Federated, load
from fedlora.data.limits import proportional, sample_of
from fedlora.sections import DataConfig

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 400))
@example([7, 7, 7, 1], 20)
def test_shares_are_in_proportion_and_nobody_is_left_out(sizes: list[int], limit: int) -> None:
    counts = proportional(sizes, limit)
    assert sum(counts) == min(sum(sizes), max(limit, len(sizes)))
    for count, size in zip(counts, sizes, strict=True):
        assert 1 <= count <= size
        assert count <= max(1, limit * size / sum(sizes) + 1)


def rows(n: int) -> list[dict[str, Any]]:
    return [{"text": f"t{i}"} for i in range(n)]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_one_row_more_moves_at_most_one_other(n: int, limit: int, key: int) -> None:
    before = {f"t{i}" for i in sample_of([rows(n)], limit, bytes([key]))[0]}
    after = {f"t{i}" for i in sample_of([rows(n + 1)], limit, bytes([key]))[0]}
    assert len(before - after) <= 1 and len(after - before) <= 1


def files(folder: Path, *sizes: int) -> str:
    for i, size in enumerate(sizes):
        lines = [json.dumps({"text": f"site {i} row {n}", "label": ("no", "yes", "maybe")[n % 3]}) for n in range(size)]
        (folder / f"site_{i}.jsonl").write_text("\n".join(lines))
    return str(folder / "site_*.jsonl")


def read(path: str, *, seed: int = 0, **settings: Any) -> Federated:
    return load(DataConfig(path=path, **{"eval_share": 0.0, **settings}), "auto", clients=0, seed=seed)


def texts(federated: Federated) -> list[list[str]]:
    return [[row["text"] for row in client] for client in federated.clients]


def test_a_limit_is_of_all_files_in_proportion(tmp_path: Path) -> None:
    assert [*map(len, read(files(tmp_path, 100, 40, 2), limit=15).clients)] == [10, 4, 1]


def test_a_sample_is_no_beginning_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = files(tmp_path, 60, 60)
    one, again, other = (texts(read(path, seed=seed, limit=12)) for seed in (1, 1, 2))
    assert one == again != other
    assert one[0] != [f"site 0 row {n}" for n in range(6)]


def test_of_one_file_rows_of_every_place_are_dealt(tmp_path: Path) -> None:
    """Six clients' rows behind one another in one file: all of them are among the sample."""
    lines = [json.dumps({"text": f"{client} {n}"}) for client in range(6) for n in range(50)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    federated = load(DataConfig(str(tmp_path / "all.jsonl"), limit=60, eval_share=0.0), "auto", clients=3, seed=0)
    assert {text[0] for client in texts(federated) for text in client} == set("012345")


def test_classes_are_those_of_all_rows(tmp_path: Path) -> None:
    assert set(read(files(tmp_path, 30), limit=1, partition="files").schema.labels) == {"no", "yes", "maybe"}


def test_the_sample_of_the_evaluation_is_the_same_with_every_seed(tmp_path: Path) -> None:
    path = files(tmp_path, 50)
    one, other = (read(path, seed=seed, limit=9, eval=path, partition="files").evaluation for seed in (1, 2))
    assert [*one] == [*other] and len(one) == 9


def test_the_first_of_every_file_are_had_by_saying_so(tmp_path: Path) -> None:
    found = texts(read(files(tmp_path, 20, 20), limit=2, limit_takes="first"))
    assert found == [[f"site {i} row {n}" for n in range(2)] for i in range(2)]


def test_the_embedded_data_are_limited_too() -> None:
    sizes = [len(rows) for rows in load(DataConfig(limit=8), "auto", clients=4, seed=0).clients]
    assert sum(sizes) == 8 and min(sizes) >= 1


@pytest.mark.parametrize("limit", [1, 100])
def test_an_error_names_the_line_of_a_row_that_is_in_no_sample(tmp_path: Path, limit: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 30 + '{"text": 5}\n')
    with pytest.raises(Exception, match=r"a\.jsonl line 31"):
        load(DataConfig(str(tmp_path / "a.jsonl"), limit=limit), "auto", clients=2, seed=0)
