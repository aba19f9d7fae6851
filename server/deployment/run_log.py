"""What a run does, round by round, for `server.log`: the screen shows the same to people."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.errors import Failure
from fedlora.jobs import Client
from fedlora.run.directory import RunDirectory
from fedlora.run.preview import Preview
from fedlora.run.setup import RunSetup
from fedlora.server.run import RunObserver
from fedlora.strategy import Strategy

log = logging.getLogger("fedlora")


class RunLog:
    """A run's observer that logs each event with its round and its client, and tells an `inner` one the same."""

    def __init__(self, inner: RunObserver, names: Mapping[int, str]) -> None:
        """`names` are those of clients elsewhere, by their numbers."""
        self._inner, self._names = inner, names
        self._round = 0  # the one under way

    def joined(self, client: Client) -> None:
        """A client is there."""
        log.info("%s is here, with %d examples", self._name(client.id), client.examples, extra={"client": client.id})
        self._inner.joined(client)

    def begins_without(self, missing: Sequence[int]) -> None:
        """These clients are not there as the run begins."""
        for client in missing:
            log.info("%s is not here as the run begins", self._name(client), extra={"client": client})
        self._inner.begins_without(missing)

    def previewed(self, preview: Preview) -> None:
        """What the run is about to do is known."""
        for line in preview.lines():
            log.info("%s", line)
        self._inner.previewed(preview)

    def started(
        self, setup: RunSetup, strategy: Strategy[Any], before: Mapping[str, float], done: int, statement: Sequence[str]
    ) -> None:
        """The run begins, or goes on after `done` rounds."""
        self._round = done + 1
        log.info("%s of %d rounds, after round %d", setup.config.strategy, setup.config.rounds, done)
        self._inner.started(setup, strategy, before, done, statement)

    def answered(self, client: int) -> None:
        """A client has answered in this round."""
        log.info("%s has answered", self._name(client), extra={"client": client, "round": self._round})
        self._inner.answered(client)

    def waiting(self, clients: Mapping[int, float]) -> None:
        """These clients are waited for; the screen and the metrics show it."""
        self._inner.waiting(clients)

    def round(self, record: Mapping[str, Any], failed: Mapping[int, Failure]) -> None:
        """A round is over."""
        words = "%d of %d clients answered, in %.1f s"
        log.info(words, record["answered"], record["clients"], record["seconds"], extra={"round": record["round"]})
        self._round = record["round"] + 1
        self._inner.round(record, failed)

    def _name(self, client: int) -> str:
        return self._names.get(client, f"client {client}")

    def finished(self, folder: RunDirectory, stopped: bool) -> None:
        """The run is over."""
        log.info("the run has ended%s; the adapter is written", " early" if stopped else "")
        self._inner.finished(folder, stopped)
