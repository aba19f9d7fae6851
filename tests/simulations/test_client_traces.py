"""How quick simulated clients are, and when they are there."""

from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import ConfigError, DataError, FedloraError
from fedlora.sections import SimulationConfig
from fedlora.simulations.client_traces import ClientTrace, DrawnTimes, ListedTimes, client_traces, speeds


def test_speeds_are_dealt_in_turn_or_drawn() -> None:
    assert speeds("", clients=3, seed=0) == [1, 1, 1]
    assert speeds("8,4,1", clients=4, seed=0) == [8, 4, 1, 8]
    for spec, low, high in (("uniform:1-10", 4.5, 6.5), ("loguniform:1-100", 7, 14), ("lognormal:0.8", 0.9, 1.1)):
        drawn = speeds(spec, clients=2000, seed=1)
        assert low < median(drawn) < high and drawn[:5] == speeds(spec, clients=5, seed=1)


@pytest.mark.parametrize("spec", ["fast", "normal:1", "uniform:5-1", "uniform:5", "lognormal:0", "1,-2", "0"])
def test_a_spec_that_is_none_is_named(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"simulation.speed = "):
        speeds(spec, clients=3, seed=0)


def test_a_job_takes_as_long_as_its_examples_at_the_clients_speed() -> None:
    assert ClientTrace(speed=4.0).due(100.0, 20.0) == 105.0


def test_a_job_is_taken_and_answered_when_its_client_is_there() -> None:
    trace = ClientTrace(1.0, presence=ListedTimes(((10, 20), (30, 40)), 50.0))
    assert trace.due(0, 5) == 15
    assert trace.due(15, 10) == 30
    assert trace.due(38, 4) == 60  # the times begin anew


@given(t=st.floats(0, 1e5), share=st.floats(0.2, 1))
def test_a_moment_at_which_a_client_is_there_is_not_before_it_is_asked_for(t: float, share: float) -> None:
    times = DrawnTimes(share, 60.0, "0/available/3")
    there = times.next(t)
    assert there >= t and times.next(there) == there


def test_a_client_is_there_for_its_share_of_the_time() -> None:
    times = DrawnTimes(0.3, 10.0, "1/available/0")
    assert sum(times.next(t) == t for t in range(0, 20_000, 10)) / 2000 == pytest.approx(0.3, abs=0.04)


def test_a_trace_file_says_it_client_by_client(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("client,speed,dropout,from,until\n0,2.5,0.1,,\n1,4,,0,60\n1,4,,120,180\n")
    slow, quick = client_traces(SimulationConfig(trace=str(path)), clients=2, seed=0)
    assert slow == ClientTrace(2.5, 0.1) and quick.presence == ListedTimes(((0, 60), (120, 180)), 180)


@pytest.mark.parametrize(("text", "why"), [
    ("client,speed\n0,1\n", "has no line of client 1, and the run has 2"),
    ("client,speed\n0,1\n1,fast\n", 'line 3: speed = "fast" is no number'),
    ("client,speed\n0,1\n1,0\n", "line 3: speed = 0"),
    ("client,speed,from,until\n0,1,,\n1,1,9,3\n", "line 3: until = 3"),
    ("id,speed\n0,1\n", 'line 2: client = "" is no number; the columns are client, speed'),
])  # fmt: skip
def test_a_trace_file_that_cannot_be_is_refused_by_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        client_traces(SimulationConfig(trace=str(path)), clients=2, seed=0)


def test_a_trace_goes_with_no_other_speeds(tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match=r"leave simulation.speed"):
        SimulationConfig(trace="trace.csv", speed="1,2")
    with pytest.raises(DataError, match="cannot be read"):
        client_traces(SimulationConfig(trace=str(tmp_path / "none.csv")), clients=2, seed=0)
