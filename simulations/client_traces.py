"""How quick every simulated client is, when it is there, and how often it is lost: drawn by the seed, or from a file.

The speeds of `simulation.speed`, in examples a second, are written as one of

(nothing)          1 each
8,4,1              dealt in turn
uniform:1-10       drawn
loguniform:1-10    drawn, its logarithm uniformly
lognormal:0.8      drawn around 1; 0.8 is the standard deviation of the logarithm

A trace file is CSV with a line for each time that a client is there, under the names `client` (from 0), `speed`, and
where they are wanted `dropout`, `from` and `until` (seconds). A client without times is always there. After the largest
`until` of all clients, the times begin anew.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log
from pathlib import Path
from random import Random
from typing import Protocol

from fedlora.errors import ConfigError, DataError, cut, nearest
from fedlora.sections import SimulationConfig


class Presence(Protocol):
    """When a client is there."""

    def next(self, t: float) -> float:
        """The first moment from t on at which the client is there, in seconds since the run began."""


@dataclass(frozen=True)
class Always:
    """A client that is always there."""

    def next(self, t: float) -> float:
        """That very moment."""
        return t


@dataclass(frozen=True)
class DrawnTimes:
    """A client that is there in some periods and away in others, each drawn by itself."""

    share: float
    period: float  # seconds
    seed: str

    def next(self, t: float) -> float:
        """That moment, or the beginning of the next period in which the client is there."""
        n = int(t // self.period)
        while Random(f"{self.seed}/{n}").random() >= self.share:
            n += 1
        return max(t, n * self.period)


@dataclass(frozen=True)
class ListedTimes:
    """A client that is there between given moments, which begin anew after some time."""

    times: tuple[tuple[float, float], ...]  # from, until, in order
    length: float  # seconds

    def next(self, t: float) -> float:
        """That moment, or the beginning of the next time at which the client is there."""
        cycles, rest = divmod(t, self.length)
        later = (max(rest, begin) for begin, end in self.times if rest < end)
        return cycles * self.length + next(later, self.length + self.times[0][0])


@dataclass(frozen=True)
class ClientTrace:
    """One simulated client: how quick it is, when it is there, how often it is lost."""

    speed: float = 1.0  # examples a second
    dropout: float = 0.0  # probability that it is lost with its job
    presence: Presence = Always()

    def due(self, began: float, work: float) -> float:
        """When a job of so many examples, sent at `began`, is answered.

        It is taken, and its answer sent, when the client is there; between the two the client works on by itself.
        """
        return self.presence.next(self.presence.next(began) + work / self.speed)


def client_traces(config: SimulationConfig, *, clients: int, seed: int) -> list[ClientTrace]:
    """The trace of every client. Raises `ConfigError` or `DataError` for a spec or a file that is none."""
    if config.trace:
        return _read(Path(config.trace), clients)
    found = speeds(config.speed, clients=clients, seed=seed)
    if config.available < 1:
        drawn = [DrawnTimes(config.available, config.period, f"{seed}/available/{i}") for i in range(clients)]
        return [ClientTrace(speed, config.dropout, times) for speed, times in zip(found, drawn, strict=True)]
    return [ClientTrace(speed, config.dropout) for speed in found]


def speeds(spec: str, *, clients: int, seed: int) -> list[float]:
    """The speed of every client, which does not depend on how many others there are; `spec` is as in the head."""
    name, colon, parameter = spec.strip().partition(":")
    if not colon:
        given = [_positive(spec, word) for word in name.split(",")] if name else [1.0]
        return [given[i % len(given)] for i in range(clients)]
    if name not in DRAWS:
        raise _wrong(spec, f'there is no "{cut(name)}"; {nearest(name, DRAWS)}; or write speeds alone, as in 8,4,1')
    draw = DRAWS[name](spec, parameter)
    return [draw(Random(f"{seed}/speed/{i}")) for i in range(clients)]


Draw = Callable[[Random], float]


def _uniform(spec: str, parameter: str) -> Draw:
    low, high = _range(spec, parameter)
    return lambda random: random.uniform(low, high)


def _loguniform(spec: str, parameter: str) -> Draw:
    low, high = _range(spec, parameter)
    return lambda random: exp(random.uniform(log(low), log(high)))


def _lognormal(spec: str, parameter: str) -> Draw:
    sigma = _positive(spec, parameter)
    return lambda random: random.lognormvariate(0.0, sigma)


DRAWS: Mapping[str, Callable[[str, str], Draw]] = {
    "uniform": _uniform,
    "loguniform": _loguniform,
    "lognormal": _lognormal,
}


def _range(spec: str, parameter: str) -> tuple[float, float]:
    low, _, high = parameter.partition("-")
    first, last = _positive(spec, low), _positive(spec, high)
    if first > last:
        raise _wrong(spec, f"{first:g} is above {last:g}; write the lower speed first")
    return first, last


def _positive(spec: str, word: str) -> float:
    value = _number(word)
    if not 0 < value < inf:
        raise _wrong(spec, f'"{cut(word)}" is no number above 0; write it as in 8,4,1, uniform:1-10 or lognormal:0.8')
    return value


def _number(word: str) -> float:
    """The number that a word writes; -1 where it writes none."""
    try:
        return float(word)
    except ValueError:
        return -1.0


def _wrong(spec: str, why: str) -> ConfigError:
    return ConfigError(f'simulation.speed = "{cut(spec)}": {why}')


def _read(path: Path, clients: int) -> list[ClientTrace]:
    """The traces in a file. Raises `DataError` for one that has no line of some client, or a line that is none."""
    lines = _lines(path)
    length = max((line.until for line in lines if line.until < inf), default=inf)
    found = []
    for i in range(clients):
        own = [line for line in lines if line.client == i]
        if not own:
            raise DataError(f"{path} has no line of client {i}, and the run has {clients}; add one, or lower clients")
        found.append(_trace(own, length))
    return found


@dataclass(frozen=True)
class _TraceLine:
    """A line of a trace file."""

    client: int
    speed: float
    dropout: float
    begin: float
    until: float  # inf: the line says no time


def _trace(lines: Sequence[_TraceLine], length: float) -> ClientTrace:
    """One client's trace; speed and dropout are those of its first line."""
    times = tuple(sorted((line.begin, line.until) for line in lines if line.until < inf))
    return ClientTrace(lines[0].speed, lines[0].dropout, ListedTimes(times, length) if times else Always())


def _lines(path: Path) -> list[_TraceLine]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [_line(path, n, row) for n, row in enumerate(csv.DictReader(file), 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"simulation.trace = {path} cannot be read as CSV: {e}") from e


def _line(path: Path, n: int, row: Mapping[str, str | None]) -> _TraceLine:
    """The values of a line. Raises `DataError` naming one that cannot be."""
    numbers = {name: _value(path, n, name, row.get(name) or default) for name, default in COLUMNS.items()}
    client, speed, dropout, begin, until = numbers.values()
    checks = {
        "client": client >= 0 and client == int(client),
        "speed": 0 < speed < inf,
        "dropout": 0 <= dropout < 1,
        "until": 0 <= begin < until,
    }
    for name, is_right in checks.items():
        if not is_right:
            raise DataError(
                f"{path} line {n}: {name} = {cut(row.get(name) or '')}; a client is a whole number from 0, a speed "
                "above 0, a dropout below 1, and until later than from"
            )
    return _TraceLine(int(client), speed, dropout, begin, until)


COLUMNS = {"client": "", "speed": "", "dropout": "0", "from": "0", "until": "inf"}  # name -> what it is if left out


def _value(path: Path, n: int, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(
            f'{path} line {n}: {name} = "{cut(text)}" is no number; the columns are {", ".join(COLUMNS)}'
        ) from None
