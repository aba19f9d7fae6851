"""Which client trains at which rank."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import build
from fedlora.errors import ConfigError
from fedlora.run.client_ranks import ranks
from fedlora.run.setup import prepare
from fedlora.simulations.serial import Serial
from tests.support.models import make

SPECS = st.one_of(
    st.just(""),
    st.lists(st.integers(1, 16), min_size=1, max_size=4).map(lambda rs: ",".join(map(str, rs))),
    st.tuples(st.integers(1, 8), st.integers(8, 16)).map(lambda pair: f"uniform:{pair[0]}-{pair[1]}"),
    st.dictionaries(st.integers(1, 16), st.floats(0.01, 9.0), min_size=1, max_size=4).map(
        lambda weights: "weighted:" + ",".join(f"{r}={w}" for r, w in weights.items())
    ),
    st.lists(st.integers(2, 40), min_size=1, max_size=4).map(lambda gb: "auto:" + ",".join(f"{n}GB" for n in gb)),
)


def memory(rank: int) -> int:
    """1 GB for the model, and a tenth of that for a rank."""
    return 10**9 + rank * 10**8


def given_out(spec: str, clients: int = 6, largest: int = 16, seed: int = 0) -> list[int]:
    return ranks(spec, largest=largest, clients=clients, seed=seed, memory=memory)


@given(SPECS, st.integers(4, 30), st.integers(0, 2**32))
def test_every_client_has_one_rank_from_1_to_the_largest(spec: str, clients: int, seed: int) -> None:
    found = given_out(spec, clients, seed=seed)
    assert len(found) == clients and all(1 <= r <= 16 for r in found)
    assert found == given_out(spec, clients, seed=seed)


@given(SPECS, st.integers(4, 15), st.integers(0, 2**32))
def test_a_clients_rank_does_not_depend_on_how_many_there_are(spec: str, clients: int, seed: int) -> None:
    assert given_out(spec, 2 * clients, seed=seed)[:clients] == given_out(spec, clients, seed=seed)


def test_nothing_said_is_the_largest_for_all() -> None:
    assert given_out("", 3) == [16, 16, 16]


def test_ranks_are_dealt_in_turn() -> None:
    assert given_out("4, 8,16", 5) == [4, 8, 16, 4, 8]
    assert given_out("2,4,4,8,8,8", 6) == [2, 4, 4, 8, 8, 8]
    assert given_out("4", 3) == [4, 4, 4]


@given(st.integers(1, 16), st.integers(0, 15), st.integers(0, 2**32))
def test_a_uniform_draw_stays_between_its_ends(low: int, more: int, seed: int) -> None:
    high = min(16, low + more)
    assert set(given_out(f"uniform:{low}-{high}", seed=seed)) <= set(range(low, high + 1))


def test_a_uniform_draw_gives_every_rank_its_share() -> None:
    """Of 4000 draws, 1000 for each of 4 ranks, with a standard deviation of 27."""
    counts = Counter(given_out("uniform:5-8", 4000))
    assert set(counts) == {5, 6, 7, 8} and all(abs(n - 1000) < 5 * 27 for n in counts.values())


def test_a_weighted_draw_gives_every_rank_its_share_whatever_the_weights_sum_to() -> None:
    for spec in ("weighted:4=0.5,8=0.3,16=0.2", "weighted:4=5,8=3,16=2"):
        counts = Counter(given_out(spec, 4000))
        assert [round(counts[r] / 400) for r in (4, 8, 16)] == [5, 3, 2]


def test_another_seed_is_another_draw() -> None:
    assert given_out("uniform:1-16", 20, seed=1) != given_out("uniform:1-16", 20, seed=2)


@given(st.floats(1.11, 4.0))
def test_the_rank_that_fits_is_the_largest_that_does(gb: float) -> None:
    rank, *_ = given_out(f"auto:{gb:.3f}GB")
    budget = round(gb, 3) * 1e9
    assert memory(rank) <= budget and (rank == 16 or memory(rank + 1) > budget)


def test_budgets_are_dealt_in_turn_in_any_unit() -> None:
    assert given_out("auto:1.2GB,1400MB,9gb", 4, largest=8) == [2, 4, 8, 2]


def test_memory_is_not_asked_where_no_budget_is_given() -> None:
    def unknown(rank: int) -> int:
        raise AssertionError(rank)

    assert ranks("4,8", largest=8, clients=2, seed=0, memory=unknown) == [4, 8]


def test_the_server_is_told_every_clients_own_rank(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) for i in range(20)))
    given = {"model.path": str(make("llama", tmp_path / "model")), "data.path": str(data), "data.partition": "iid"}
    setup = prepare(build(given, {"clients": 5, "lora.rank": 4, "lora.ranks": "1,2,4"}))
    fleet = Serial(setup.model, setup.clients_data, setup.ranks, tmp_path / "clients")
    assert [client.rank for client in fleet.clients()] == [1, 2, 4, 1, 2]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("4,32", r'lora.ranks = "4,32": rank 32 is not in 1 to lora.rank = 16; change it, or raise lora.rank'),
        ("0", r"rank 0 is not in 1 to lora.rank = 16"),
        ("4,,8", r'"" is no rank; write whole numbers, as in 4,8,16'),
        ("4,-8", r'"-8" is no rank'),
        ("1,2,3,4,5,6,7", r"7 are more than the 6 clients there are; leave some out"),
        ("unifrom:4-16", r'there is no "unifrom"; did you mean "uniform"\?'),
        ("uniform:4", r"uniform takes two ranks, as in uniform:4-16"),
        ("uniform:16-4", r"16 is above 4; write the lower rank first"),
        ("uniform:4-32", r"rank 32 is not in 1 to lora.rank = 16"),
        ("weighted:4", r'"4" is no rank with a weight above 0'),
        ("weighted:4=0.5,8=nan", r'"8=nan" is no rank with a weight above 0'),
        ("weighted:4=1,4=2", r"rank 4 has two weights; give it one"),
        ("auto:4", r'"4" is no amount of memory; write it as in auto:4GB,500MB'),
        ("auto:infGB", r'"infGB" is no amount of memory'),
        ("auto:2GB,1.05GB", r"rank 1 takes about 1,100.0 MB, and 1.05GB is 1,050.0 MB; give more, or a smaller train"),
    ],
)
def test_what_is_wrong_is_named(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        given_out(spec)
