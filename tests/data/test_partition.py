"""How rows are shared out: every one to exactly one client, and by the seed alone."""

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlora.data.federated import load
from fedlora.data.partition import hold_out, keyed_places, sample_out, split
from fedlora.errors import ConfigError, DataError
from fedlora.sections import DataConfig

SPECS = ("auto", "iid", "dirichlet:0.5", "dirichlet:100", "labels:1", "labels:2", "natural:user", "size:linear",
         "size:square", "size:exponential", "size:0.5")  # fmt: skip


def rows(n: int, classes: int = 3) -> list[dict[str, Any]]:
    return [{"text": f"t{i}", "label": f"c{i % classes}", "user": i % 4} for i in range(n)]


def shared(data: list[dict[str, Any]], spec: str, clients: int, seed: int) -> list[list[int]]:
    return split(data, spec, clients=0 if spec.startswith("natural") else clients, label="label", seed=seed)


@given(st.sampled_from(SPECS), st.integers(1, 90), st.integers(1, 9), st.integers(2, 12), st.integers(0, 2**40))
def test_every_row_falls_to_exactly_one_client(spec: str, n: int, clients: int, classes: int, seed: int) -> None:
    try:
        shares = shared(rows(n, classes), spec, clients, seed)
    except DataError as e:
        assert "ask for" in str(e)
        assume(False)
    assert sorted(i for share in shares for i in share) == list(range(n))
    assert all(shares)
    assert len(shares) == (min(n, 4) if spec.startswith("natural") else clients)


@given(st.sampled_from(SPECS), st.integers(0, 2**40))
def test_nothing_but_the_seed_decides(spec: str, seed: int) -> None:
    first = shared(rows(200), spec, 4, seed)
    random.seed(seed + 1)
    np.random.seed(7)
    assert shared(rows(200), spec, 4, seed) == first


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5", "labels:2", "size:linear"])
def test_another_seed_is_another_partition(spec: str) -> None:
    assert shared(rows(200), spec, 4, 0) != shared(rows(200), spec, 4, 1)


@pytest.mark.parametrize("spec", ["iid", "natural:each"])
def test_ten_thousand_clients_are_dealt_in_a_moment(spec: str) -> None:
    """To load each client's partition from flwr-datasets took 8 s."""
    data = [{"text": "", "each": i % 10_000} for i in range(20_000)]
    began = time.process_time()
    shares = split(data, spec, clients=0 if spec.startswith("natural") else 10_000, label=None, seed=0)
    assert len(shares) == 10_000 and time.process_time() - began < 6


def test_iid_is_even_and_not_in_the_order_of_the_file() -> None:
    shares = split(rows(103), "iid", clients=10, label=None, seed=0)
    assert {len(share) for share in shares} == {10, 11}
    assert shares[0] != list(range(11))


@given(st.integers(1, 6), st.integers(6, 30), st.integers(0, 99))
def test_every_client_has_exactly_as_many_labels_as_asked_for(each: int, clients: int, seed: int) -> None:
    data = rows(600, 6)
    shares = split(data, f"labels:{each}", clients=clients, label="label", seed=seed)
    assert {len({data[i]["label"] for i in share}) for share in shares} == {each}


def test_few_labels_reach_all_classes_with_fewer_clients_than_classes() -> None:
    data = rows(770, 77)
    shares = split(data, "labels:2", clients=39, label="label", seed=0)
    assert len({data[i]["label"] for share in shares for i in share}) == 77


def test_a_small_alpha_sets_the_clients_further_apart() -> None:
    def largest_class(spec: str) -> float:
        shares = split(data, spec, clients=5, label="label", seed=0)
        return float(np.mean([max(Counter(data[i]["label"] for i in s).values()) / len(s) for s in shares]))

    data = rows(3000, 10)
    assert largest_class("dirichlet:0.1") > 0.25 > largest_class("dirichlet:100")


def test_a_natural_partition_has_a_client_for_every_value() -> None:
    data = rows(20)
    shares = split(data, "natural:user", clients=4, label=None, seed=0)
    assert [{data[i]["user"] for i in share} for share in shares] == [{0}, {1}, {2}, {3}]


def test_sizes_follow_the_skew() -> None:
    sizes = [len(share) for share in split(rows(1000), "size:linear", clients=4, label=None, seed=0)]
    assert sizes == [100, 200, 300, 400]
    assert [len(share) for share in split(rows(300), "size:2", clients=2, label=None, seed=0)] == [60, 240]


BAD = "random dirichlet dirichlet:x dirichlet:0 dirichlet:nan labels:0 labels:two natural size:big size:-1 iid:3 files"


@pytest.mark.parametrize("spec", [*BAD.split(), "natural:user"])
def test_a_spec_that_is_none_is_refused_by_name(spec: str) -> None:
    with pytest.raises(ConfigError, match=spec if spec != "natural:user" else "clients = 7"):
        split(rows(100), spec, clients=7, label="label", seed=0)


@pytest.mark.parametrize(("spec", "clients", "says"), [
    ("iid", 101, "100 examples cannot be shared among 101"),
    ("labels:4", 5, "only 3 classes"),
    ("labels:1", 2, "2 clients of 1 classes cannot hold all 3; ask for 3 clients or more, or for labels:2"),
    ("labels:3", 90, "would share a class of"),
    ("size:exponential", 20, "fewer clients"),
    ("dirichlet:0.001", 60, "a larger alpha"),
    ("natural:usr", 0, 'did you mean "user"'),
])  # fmt: skip
def test_what_the_rows_do_not_allow_is_said_in_a_sentence(spec: str, clients: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        split(rows(100), spec, clients=clients, label="label", seed=0)


def test_a_partition_by_class_wants_a_label() -> None:
    with pytest.raises(ConfigError, match=r"set data\.label"):
        split(rows(10), "dirichlet:1", clients=2, label=None, seed=0)


def test_examples_without_an_owner_are_counted() -> None:
    with pytest.raises(DataError, match="1 of 5 examples have no user"):
        split([*rows(4), {"text": "", "user": None}], "natural:user", clients=0, label=None, seed=0)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.floats(0.001, 0.999), st.integers(0, 99))
def test_what_is_held_out_is_some_and_never_all(sizes: list[int], share: float, seed: int) -> None:
    parts = [rows(n) for n in sizes]
    kept, held = sample_out(parts, share, "data.holdout", seed=seed)
    for part, stays, out in zip(parts, kept, held, strict=True):
        assert len(stays) and len(out)
        assert sorted(r["text"] for r in [*stays, *out]) == sorted(r["text"] for r in part)
        assert abs(len(out) - share * len(part)) <= 1


def held_out(texts: list[str], share: float, key: bytes = b"key") -> set[str]:
    """Those of the texts that are held out."""
    _, [held] = hold_out([[{"text": t} for t in texts]], share, "data.holdout", columns=["text"], key=key)
    return {row["text"] for row in held}


@given(st.integers(40, 200), st.floats(0.2, 0.8), st.data())
def test_one_record_more_changes_no_other_records_side(n: int, share: float, data: st.DataObject) -> None:
    """By a sample of their numbers, some ten others would change sides: then one record is not all that differs."""
    texts = [f"row {i}" for i in range(n)]
    where = data.draw(st.integers(0, n))
    more = [*texts[:where], "one more", *texts[where:]]
    assert held_out(more, share) - {"one more"} == held_out(texts, share)


def test_whose_side_a_record_is_on_depends_on_the_key_and_the_purpose() -> None:
    table = [{"text": f"row {i}"} for i in range(50)]
    draws = [(b"a", "data.holdout"), (b"b", "data.holdout"), (b"a", "data.eval_share")]
    places = [keyed_places(table, ["text"], key=key, purpose=purpose) for key, purpose in draws]
    assert len({tuple(p) for p in places}) == 3
    assert all(0 <= min(p) < 0.2 and 0.8 < max(p) < 1 for p in places)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.floats(0.001, 0.999))
def test_by_content_too_some_are_held_out_and_never_all(sizes: list[int], share: float) -> None:
    parts = [rows(n) for n in sizes]
    kept, held = hold_out(parts, share, "data.holdout", columns=["text"], key=b"key")
    for part, stays, out in zip(parts, kept, held, strict=True):
        assert len(stays) and len(out)
        assert sorted(r["text"] for r in [*stays, *out]) == sorted(r["text"] for r in part)


def test_nothing_is_held_out_of_a_single_example() -> None:
    with pytest.raises(DataError, match=r"data\.holdout = 0\.1 takes the one example of client 1"):
        hold_out([rows(5), rows(1)], 0.1, "data.holdout", columns=["text"], key=b"key")


def test_banking77_is_shared_out_in_well_under_five_seconds(real_data: Path) -> None:
    data = DataConfig(path=str(real_data / "banking77" / "train.csv"), eval_share=0.0, partition="dirichlet:0.5")
    split(rows(10), "iid", clients=2, label=None, seed=0)  # the import is not what is measured
    begin = time.perf_counter()
    federated = load(data, "classify", clients=50, seed=0)
    assert time.perf_counter() - begin < 5
    assert sum(map(len, federated.clients)) == 10003
    assert len(federated.schema.labels) == 77
