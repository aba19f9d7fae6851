"""Prometheus' metrics of a run, on a port of their own: rounds, clients, failures by kind, bytes and seconds."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from fedlora.errors import ConfigError, Failure, FailureKind
from fedlora.jobs import Client
from fedlora.run.directory import RunDirectory
from fedlora.run.preview import Preview
from fedlora.run.setup import RunSetup
from fedlora.server.run import RunObserver
from fedlora.strategy import Strategy

SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)


class PrometheusExporter:
    """A run's observer that counts what it is told, and tells an `inner` observer the same."""

    def __init__(self, inner: RunObserver, names: Mapping[int, str] = MappingProxyType({})) -> None:
        """`names` are those of clients elsewhere."""
        self._inner, self._names = inner, names
        self.registry = at = CollectorRegistry()
        self._rounds = Counter("fedlora_rounds", "Rounds finished by this process", registry=at)
        self._round = Gauge("fedlora_round", "The last round finished", registry=at)
        self._planned = Gauge("fedlora_rounds_planned", "Rounds that the run is to have", registry=at)
        self._clients = Gauge(
            "fedlora_clients",
            "Clients of the run (known), connected (online), of the last round (asked), "
            "and of the current one, once any has, or else of the last (answered)",
            ["state"],
            registry=at,
        )
        self._failures = Counter("fedlora_failures", "Clients' failed rounds", ["reason"], registry=at)
        self._refused = Counter("fedlora_refused_uploads", "Uploads that were not what they must be", registry=at)
        self._bytes = Counter(
            "fedlora_bytes", "Numbers sent to clients (down) and received (up), in bytes", ["direction"], registry=at
        )
        self._seconds = Histogram("fedlora_round_seconds", "Duration of a round", buckets=SECONDS, registry=at)
        self._loss = Gauge(
            "fedlora_train_loss", "Of the last round that was not skipped, mean over clients by weight", registry=None
        )
        self._eval = Gauge("fedlora_eval", "The global model on the held-out set", ["metric"], registry=at)
        self._epsilon = Gauge("fedlora_epsilon", "Spent so far, by the client that spent most", registry=None)
        self._shown = set[Gauge]()  # those of the last kind that have a value
        self._waiting = Gauge("fedlora_waiting_seconds", "For the client waited for longest", registry=at)
        self._waiting_for = Gauge("fedlora_waiting_for_seconds", "For each client waited for", ["client"], registry=at)
        self._done = set[int]()  # clients, in the current round
        self._begin()

    def _begin(self) -> None:
        """Begin every series at the start, so that Prometheus sees its first increase."""
        for state in ("known", "online", "asked", "answered"):
            self._clients.labels(state)
        for kind in FailureKind:
            self._failures.labels(kind)
        for direction in ("up", "down"):
            self._bytes.labels(direction)

    def _show(self, gauge: Gauge, value: float | None) -> None:
        """Set a gauge that is not there before its first value: 0 would be taken for one, and NaN breaks sums."""
        if value is None:
            return
        gauge.set(value)
        if gauge not in self._shown:
            self._shown.add(gauge)
            self.registry.register(gauge)

    def previewed(self, preview: Preview) -> None:
        """What the run is about to do is known; the log and the screen show it."""
        self._inner.previewed(preview)

    def started(
        self, setup: RunSetup, strategy: Strategy[Any], before: Mapping[str, float], done: int, statement: Sequence[str]
    ) -> None:
        """The run begins, with what it had done before."""
        self._round.set(done)
        self._planned.set(setup.config.rounds)
        self._clients.labels("known").set(setup.config.clients)
        self._clients.labels("asked").set(setup.config.cohort)
        self._evaluated(before)
        self._inner.started(setup, strategy, before, done, statement)

    def online(self, clients: int) -> None:
        """Take down how many clients are connected now."""
        self._clients.labels("online").set(clients)

    def joined(self, client: Client) -> None:
        """A client is there; `online` counts them."""
        self._inner.joined(client)

    def begins_without(self, missing: Sequence[int]) -> None:
        """These clients are not there as the run begins."""
        self._inner.begins_without(missing)

    def answered(self, client: int) -> None:
        """A client has answered in this round."""
        self._done.add(client)
        self._clients.labels("answered").set(len(self._done))
        self._inner.answered(client)

    def waiting(self, clients: Mapping[int, float]) -> None:
        """Take down which clients are waited for now, and for how many seconds already."""
        self._wait(clients)
        self._inner.waiting(clients)

    def round(self, record: Mapping[str, Any], failed: Mapping[int, Failure]) -> None:
        """A round is over: its line in rounds.jsonl, and the failures of its clients."""
        self._rounds.inc()
        self._round.set(record["round"])
        self._clients.labels("asked").set(record["clients"])
        self._clients.labels("answered").set(record["answered"])
        for failure in failed.values():
            self._failures.labels(failure.kind).inc()
            self._refused.inc(failure.kind == FailureKind.REFUSED)
        self._bytes.labels("up").inc(record["bytes_up"])
        self._bytes.labels("down").inc(record["bytes_down"])
        self._seconds.observe(record["seconds"])
        self._show(self._loss, record["train_loss"])
        self._evaluated(record["eval"] or {})
        self._show(self._epsilon, record.get("epsilon"))
        self._wait({})
        self._done.clear()
        self._inner.round(record, failed)

    def finished(self, folder: RunDirectory, stopped: bool) -> None:
        """The run is over."""
        self._wait({})
        self._inner.finished(folder, stopped)

    def serve(self, host: str = "127.0.0.1", port: int = 9100) -> Callable[[], None]:
        """Answer scrapes at `/metrics` in a thread; the returned function ends it.

        Nobody is asked for a password: give another host than this machine only on a network that nobody but the
        monitoring can reach. Raises `ConfigError` where the port cannot be had.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as e:
            why = getattr(e, "strerror", None) or e
            raise ConfigError(f"metrics cannot be served on {host}:{port}: {why}; choose another --metrics-port") from e

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return close

    def _wait(self, clients: Mapping[int, float]) -> None:
        self._waiting.set(max(clients.values(), default=0.0))
        self._waiting_for.clear()
        for client, seconds in clients.items():
            self._waiting_for.labels(self._names.get(client, f"client {client}")).set(seconds)

    def _evaluated(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._eval.labels(name).set(value)
